# SPDX-License-Identifier: Apache-2.0
"""``quant_method: auto-round`` with floating-point data types, as Intel AutoRound writes them.

``data_type`` nv_fp or nv_fp4*, 4 bits: the tensors of compressed-tensors' NVFP4, whose global
scale divides; mx_fp*, 4 bits: those of its MXFP4; mx_fp*, 8 bits: MXFP8, weight float8_e4m3fn
[N, K] with weight_scale uint8 [N, K/32]. ``extra_config`` has what differs for a layer by its
name, or by a regular expression that is found anywhere in it; layers outside the blocks of
``block_name_to_quantize`` are in 16 bits unless it names them. A rotation of the activations stands
in the configuration alone. Source: auto_round 0.16.1, export_to_autoround (qlinear_fp,
export_to_nvfp_mx) and algorithms/transforms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm_nvfp4.checkpoints import compressed_tensors
from vllm_nvfp4.checkpoints.fields import Patterns, as_table, as_text, as_texts
from vllm_nvfp4.checkpoints.spec import (
    UNQUANTIZED,
    CheckpointError,
    KvCacheSpec,
    LayerKind,
    LayerSpec,
    Role,
    TensorSpec,
)

METHODS = ("auto-round", "intel/auto-round")
_WHERE = "config.json (quantization_config)"
_SIXTEEN = 16
_FP8 = ("fp8", "float8_e4m3fn")
_OF_PATTERNS = frozenset("*+?^$()[]{}|\\")  # of no layer's name
MXFP8 = LayerSpec(
    LayerKind.WIDENED,
    tensors=(
        TensorSpec("weight", Role.WEIGHT, ("F8_E4M3",)),
        TensorSpec("weight_scale", Role.BLOCK_SCALE, ("U8",)),
    ),
    algo="MXFP8",
    scale_block=32,
)


class AutoRoundDialect:
    """An AutoRound checkpoint. ``config``: ``quantization_config`` of config.json. Raises
    CheckpointError for another data type than those above, and for rotated activations."""

    name = "auto-round"

    def __init__(self, config: Mapping[str, Any]) -> None:
        _refuse_rotations(config)
        is_fp8 = str(config.get("static_kv_dtype")).removeprefix("torch.") in _FP8
        self.kv_cache = KvCacheSpec("fp8" if is_fp8 else None)
        self._default = _spec(config, config)
        extra = as_table(config.get("extra_config"), _WHERE, "extra_config")
        self._extra: dict[str, LayerSpec] = {}  # by a layer's name
        self._by_pattern: dict[str, LayerSpec] = {}  # by a regular expression
        self._patterns = Patterns(_WHERE)
        for name, entry in extra.items():
            spec = _spec(as_table(entry, _WHERE, f"extra_config.{name}"), config)
            if _OF_PATTERNS.isdisjoint(name):
                self._extra[name] = spec
            else:
                self._by_pattern[f".*?(?:{name})"] = spec
                self._patterns.add(f".*?(?:{name})")
        key = "block_name_to_quantize"
        blocks = config.get(key)
        names = blocks.split(",") if isinstance(blocks, str) else _flat(blocks)
        self._blocks = as_texts(names, _WHERE, key)

    def has_microscaled_layers(self) -> bool:
        specs = (self._default, *self._extra.values(), *self._by_pattern.values())
        return any(spec.kind is LayerKind.MICROSCALED for spec in specs)

    def layer_spec(self, name: str) -> LayerSpec:
        if (spec := self._own(name)) is not None:
            return spec
        if name.rpartition(".")[2] == "lm_head":
            return UNQUANTIZED
        inside = any(name.startswith(f"{block}.") for block in self._blocks)
        return self._default if inside or not self._blocks else UNQUANTIZED

    def excludes(self, name: str) -> bool:
        spec = self._own(name)
        return spec is not None and not spec.is_quantized

    def _own(self, name: str) -> LayerSpec | None:
        if name in self._extra:
            return self._extra[name]
        specs = self._by_pattern.items()
        return next((spec for p, spec in specs if self._patterns.matches(p, name)), None)

    def named_layers(self) -> tuple[str, ...]:
        return ()

    def settle(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """The configuration says it all."""

    def rename(self, mapper: Any) -> None:
        self._extra = mapper.apply_dict(self._extra)
        # Blocks are parts of names: a tensor of theirs has one that the mapper knows.
        tensor = ".0.weight"
        renamed = mapper.apply_list([block + tensor for block in self._blocks])
        self._blocks = [name.removesuffix(tensor) for name in renamed]


def _refuse_rotations(config: Mapping[str, Any]) -> None:
    """No tensor shows a rotation, and without it the weights are those of another basis."""
    for key in ("rotation_config", "spinquant_config"):
        if config.get(key):
            raise CheckpointError(
                _WHERE,
                key,
                "activations that are rotated while the model runs",
                "none",
                "Quantise the model again with AutoRound, without a rotation.",
            )


def _spec(entry: Mapping[str, Any], config: Mapping[str, Any]) -> LayerSpec:
    """How a layer is stored. entry: its own fields; config: those that it does not have."""
    bits = entry.get("bits", config.get("bits"))
    if type(bits) is int and bits >= _SIXTEEN:
        return UNQUANTIZED
    kind = as_text(entry.get("data_type", config.get("data_type")), _WHERE, "data_type")
    act_bits = entry.get("act_bits", config.get("act_bits", _SIXTEEN))
    if kind.startswith("nv_fp") and bits == 4:
        activation_bits = act_bits if type(act_bits) is int and act_bits < _SIXTEEN else _SIXTEEN
        algo = f"NVFP4 W4A{activation_bits}"
        return replace(compressed_tensors.NVFP4_W4A16, algo=algo, activation_bits=activation_bits)
    if kind.startswith("mx_fp") and bits == 4:
        return compressed_tensors.MXFP4_W4A16
    if kind.startswith("mx_fp") and bits == 8:
        return MXFP8
    raise CheckpointError(
        _WHERE,
        "data_type",
        f"{kind or 'none'} with {bits} bits",
        "nv_fp4 or mx_fp with 4 bits, or mx_fp with 8",
        "Quantise the model again with AutoRound's scheme NVFP4 or MXFP4.",
    )


def _flat(value: object) -> list[Any]:
    """A list of names, which AutoRound may have as a list of lists."""
    if not isinstance(value, list):
        return []
    found: list[Any] = []
    for entry in value:
        found += _flat(entry) if isinstance(entry, list) else [entry]
    return found
