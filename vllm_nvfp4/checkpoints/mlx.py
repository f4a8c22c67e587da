# SPDX-License-Identifier: Apache-2.0
"""MLX checkpoints (``mlx_lm.convert --q-mode nvfp4`` or mxfp4), read as ModelOpt would write them.

For a layer P, [N, K], or [E, N, K] of experts, with b bits an element, the first the lowest:
    P.weight        uint32 [N, K b/32]
    P.scales        uint8 [N, K/16] E4M3 (nvfp4), [N, K/32] E8M0 (mxfp4, mxfp8); 16 bits (affine)
    P.biases        affine alone, as its scales [N, K/group]: W = code * scale + bias
    P.global_scale  nvfp4 experts, optional, float32 [E]: the largest magnitude; 1/2688 multiplies
The sizes and dtypes tell nvfp4, mxfp4 and mxfp8; of affine layers the configuration has the bits,
for all of them or by name. mlx_lm also renames experts, has convolutions' channels last, and adds 1
to the norms of models with Qwen's gated delta nets; mlx_vlm renames towers: all turned back here.
Source: mlx 0.32.4 (quantize), mlx_lm 0.32.2 (utils, switch_layers, every model's sanitize).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_nvfp4.checkpoints import modelopt
from vllm_nvfp4.checkpoints.autoround import MXFP8
from vllm_nvfp4.checkpoints.headers import TensorHeader
from vllm_nvfp4.checkpoints.spec import (
    UNQUANTIZED,
    CheckpointError,
    KvCacheSpec,
    LayerKind,
    LayerSpec,
    Role,
    TensorSpec,
)
from vllm_nvfp4.checkpoints.stacks import PROJECTIONS

if TYPE_CHECKING:
    import torch

_WHERE = "config.json (quantization)"
_FLOATS = ("BF16", "F16", "F32")
_AGAIN = "Convert the model again with mlx_lm.convert."
_FROM_BF16 = "Serve the BF16 model (it is quantised while it loads), or `vllm-nvfp4 quantize` it."
AFFINE = LayerSpec(
    LayerKind.WIDENED,
    tensors=(
        TensorSpec("weight", Role.WEIGHT, ("U8",)),
        TensorSpec("weight_scale", Role.BLOCK_SCALE, _FLOATS),
        TensorSpec("weight_offset", Role.OFFSET, _FLOATS),
    ),
    algo="MLX affine",
)
_SPECS = {
    "nvfp4": replace(modelopt.ALGOS["W4A16_NVFP4"], algo="MLX nvfp4"),
    "mxfp4": replace(modelopt.ALGOS["MXFP4"], algo="MLX mxfp4", activation_bits=16),
    "mxfp8": MXFP8,
    "affine": AFFINE,
}
# What scales in a byte share a product of bits and group size with.
_MODES = {4 * 16: "nvfp4", 4 * 32: "mxfp4", 8 * 32: "mxfp8"}
_AS_READ = {"weight": "weight", "scales": "weight_scale", "biases": "weight_offset",
            "global_scale": "weight_scale_2"}  # fmt: skip
_LARGEST = 448 * 6
_EXPERTS = re.compile(r"(?:\.experts)?\.switch_(?:mlp|glu)(?=\.)")
_SHIFTED = re.compile(r"(?:_layernorm|model\.norm|\.[qk]_norm)\.weight$")


class MlxDialect:
    """``config``: ``quantization`` of config.json. Raises CheckpointError where all is affine."""

    name = "mlx"
    kv_cache = KvCacheSpec()

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._default = _spec(config, "mode")
        tables = {n: v for n, v in config.items() if isinstance(v, Mapping)}
        self._layers = {_renamed(n): _spec(v, f"{n}: mode") for n, v in tables.items()}
        # (bits, group size) of affine layers, "" for the others
        self.sizes: dict[str, tuple[Any, Any]]
        self.sizes = {_renamed(n): (v.get("bits"), v.get("group_size")) for n, v in tables.items()}
        self.sizes[""] = config["bits"], config["group_size"]
        if all(spec is AFFINE for spec in (self._default, *self._layers.values())):
            found = f"{str(config['bits'])[:9]}-bit integers alone (affine)"
            raise CheckpointError(_WHERE, "mode", found, "nvfp4, mxfp4 or mxfp8", _FROM_BF16)

    def has_microscaled_layers(self) -> bool:
        specs = (self._default, *self._layers.values())
        return any(spec.kind is LayerKind.MICROSCALED for spec in specs)

    def layer_spec(self, name: str) -> LayerSpec:
        return self._layers.get(name, self._default)

    def note(self, name: str, spec: LayerSpec) -> None:
        """Take from a module's tensors what no configuration has: that it has no scales and so is
        in 16 bits; the group size of affine ones."""
        self._layers[name] = spec

    def excludes(self, name: str) -> bool:
        return not self.layer_spec(name).is_quantized

    def named_layers(self) -> tuple[str, ...]:
        return ()

    def settle(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """The shapes are looked at in :class:`Restored`."""

    def rename(self, mapper: Any) -> None:
        self._layers = mapper.apply_dict(self._layers)


def _spec(entry: Mapping[str, Any], key: str) -> LayerSpec:
    mode = entry.get("mode", "affine")
    if not isinstance(mode, str) or mode not in _SPECS:
        raise CheckpointError(_WHERE, key, str(mode)[:80], "one of " + ", ".join(_SPECS), _AGAIN)
    return _SPECS[mode]


def _renamed(name: str) -> str:
    if (parts := _EXPERTS.split(name)) == [name]:
        return name
    return ".experts".join(parts).replace(".fc1", ".up_proj").replace(".fc2", ".down_proj")


class Restored:
    """The tensors of an MLX checkpoint as ModelOpt would have them.

    headers: of these; names: a file's tensor -> those that it becomes
    Raises CheckpointError for scales that do not go with their weight.
    """

    def __init__(self, headers: Mapping[str, TensorHeader], dialect: MlxDialect) -> None:
        self.headers: dict[str, TensorHeader] = {}
        self.names: dict[str, tuple[str, ...]] = {}
        self._stored = headers
        self._dialect = dialect
        self._bits: dict[str, int] = {}  # of affine modules, by the file's name
        patches = headers.get("vision_tower.patch_embed.proj.weight")
        self._tower = "visual." if patches and len(patches.shape) == 5 else "vision_tower."
        convs = [h.shape for n, h in headers.items() if n.endswith(".linear_attn.conv1d.weight")]
        self._shifts_norms = any(len(c) == 3 and c[1] > c[2] for c in convs)
        for name, header in headers.items():
            found = self._headers_of(name, header)
            if twice := found.keys() & self.headers.keys():
                raise _refuse(header, name, f"a second {min(twice)}", "each tensor once")
            self.headers |= found
            self.names[name] = tuple(found)

    def tensors(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The same of a stream of the files' tensors."""
        for name, tensor in weights:
            for known in self.names.get(name, (name,)):
                yield known, self._value(name, known, tensor)

    def _value(self, name: str, known: str, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        header = self.headers.get(known)
        if header and _is_conv(name, self._stored[name]):
            return tensor.movedim(-1, 1)
        if header is None or (known == name and header == self._stored[name]):
            is_shifted = self._shifts_norms and _SHIFTED.search(name)
            return tensor - 1 if is_shifted else tensor
        if known.endswith(".weight_scale_2"):
            if name.endswith(".scales"):
                return tensor.new_ones((), dtype=torch.float32)
            return tensor / _LARGEST
        if header.dtype == "F8_E4M3":
            return tensor.view(torch.float8_e4m3fn)
        if bits := self._bits.get(name):
            return _unpacked(tensor, bits)
        return tensor.view(torch.uint8) if header.dtype == "U8" else tensor

    def _headers_of(self, name: str, header: TensorHeader) -> dict[str, TensorHeader]:
        module, _, leaf = name.rpartition(".")
        known = _renamed(module).replace("vision_tower.", self._tower)
        weight, scales = (self._stored.get(f"{module}.{n}") for n in ("weight", "scales"))
        if weight is None or weight.dtype != "U32" or leaf not in _AS_READ:
            if leaf == "weight":
                self._dialect.note(known, UNQUANTIZED)
                if _EXPERTS.search(module):
                    found = f"experts in one tensor of {header.dtype}"
                    raise _refuse(header, name, found, "quantised ones", _FROM_BF16)
            if _is_conv(name, header):
                rows, *sizes, channels = header.shape
                header = replace(header, shape=(rows, channels, *sizes))
            return {f"{known}.{leaf}" if module else leaf: header}
        as_read = f"{known}.{_AS_READ[leaf]}"
        if scales is None:
            raise _refuse(header, f"{module}.scales", "no such tensor", f"one beside {name}")
        fits = scales.shape[-1:] > (0,) and weight.shape[:-1] == scales.shape[:-1] != ()
        ratio, rest = divmod(32 * weight.shape[-1], scales.shape[-1]) if fits else (0, 1)
        mode = _MODES.get(ratio, "") if scales.dtype == "U8" else "affine"
        if rest or not mode:
            shapes = f"{scales.dtype} {list(scales.shape)} of a weight U32 {list(weight.shape)}"
            needed = "one scale for 16 or 32 elements of 4 bits, or for 32 of 8"
            raise _refuse(scales, f"{module}.scales", shapes, needed)
        if leaf == "weight":
            if len(header.shape) > 2 and known.rpartition(".")[2] not in PROJECTIONS:
                found = f"several matrices in one, {list(header.shape)}, which mlx_lm has made"
                needed = "matrices as the model has them, or experts"
                raise _refuse(header, name, found, needed, _FROM_BF16)
            return {as_read: self._weight(name, known, mode, ratio)}
        if leaf == "scales" and mode == "nvfp4":
            become = {as_read: replace(header, dtype="F8_E4M3")}
            if f"{module}.global_scale" not in self._stored:
                one = replace(header, dtype="F32", shape=(), end=header.start)
                become[f"{known}.weight_scale_2"] = one
            return become
        return {as_read: header}

    def _weight(self, name: str, module: str, mode: str, ratio: int) -> TensorHeader:
        header = self._stored[name]
        *rows, words = header.shape
        if mode != "affine":
            dtype = "F8_E4M3" if mode == "mxfp8" else "U8"
            return replace(header, dtype=dtype, shape=(*rows, 4 * words))
        bits, group = self._dialect.sizes.get(_renamed(name[:-7]), self._dialect.sizes[""])
        is_known = type(bits) is int and 1 <= bits <= 8 and type(group) in (int, type(None))
        if not is_known or ratio != bits * (group or ratio // bits) or ratio // bits % 8:
            found = f"{str(bits)[:9]} bits in groups of {str(group)[:9]}, in {_WHERE}"
            raise _refuse(header, name, found, f"{ratio} bits in a group, as its sizes have it")
        self._bits[name] = bits
        group = ratio // bits
        algo = f"MLX affine, {bits} bits in {group}s"
        self._dialect.note(module, replace(AFFINE, scale_block=group, algo=algo))
        return replace(header, dtype="U8", shape=(*rows, 32 * words // bits))


def _is_conv(name: str, header: TensorHeader) -> bool:
    """Whether its last dimension belongs after the first."""
    sizes = header.shape[2:]
    return name.endswith(".weight") and (len(sizes) in (2, 3) or ("conv" in name and sizes == (1,)))


def _refuse(
    header: TensorHeader, what: str, found: str, needed: str, todo: str = _AGAIN
) -> CheckpointError:
    return CheckpointError(header.file, what, found, needed, todo)


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Elements of ``bits`` bits, the first the lowest, as uint8: eight of them in so many bytes."""
    import torch

    data = packed.view(torch.uint8).unflatten(-1, (-1, bits)).int()
    data = torch.cat([data, torch.zeros_like(data[..., :1])], -1)
    found = []
    for i in range(8):
        byte, shift = divmod(bits * i, 8)
        pair = data[..., byte] | data[..., byte + 1] << 8
        found.append((pair >> shift & (1 << bits) - 1).to(torch.uint8))
    return torch.stack(found, -1).flatten(-2)


def unfold(config: Any) -> None:
    """Set to 1 what mlx_lm has multiplied into Falcon-H1's weights, in vLLM's configuration."""
    if not hasattr(config, "ssm_multipliers"):
        return
    head, table = config.lm_head_multiplier, config.embedding_multiplier
    config.lm_head_multiplier = head / table if config.tie_word_embeddings else 1.0
    for name in ("embedding", "attention_in", "attention_out", "ssm_in", "ssm_out"):
        setattr(config, f"{name}_multiplier", 1.0)
    config.mlp_multipliers, config.ssm_multipliers = [1.0] * 2, [1.0] * 5
