# SPDX-License-Identifier: Apache-2.0
"""``quant_method: mxfp4``, the format of gpt-oss: MXFP4 experts, all else as it is.

The experts of a layer are stacked, with biases; E experts, hidden size H, intermediate size I:

    experts.gate_up_proj_blocks  uint8 [E, 2 I, H/32, 16]   rows of gate and up take turns
    experts.gate_up_proj_scales  uint8 [E, 2 I, H/32]       E8M0
    experts.gate_up_proj_bias    16 bits [E, 2 I]
    experts.down_proj_blocks     uint8 [E, H, I/32, 16]
    experts.down_proj_scales     uint8 [E, H, I/32]
    experts.down_proj_bias       16 bits [E, H]

vLLM's model of this family hands them on under the names of TensorSpec below. MXFP4 linear layers
come in the compressed-tensors, FP-Quant and ModelOpt dialects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_nvfp4.checkpoints.fields import as_texts
from vllm_nvfp4.checkpoints.headers import TensorHeader
from vllm_nvfp4.checkpoints.inventory import LINEAR, LayerRecord
from vllm_nvfp4.checkpoints.spec import (
    UNQUANTIZED,
    CheckpointError,
    KvCacheSpec,
    LayerKind,
    LayerSpec,
    Role,
    TensorSpec,
)
from vllm_nvfp4.numerics.formats import MXFP4

_FLOATS = ("BF16", "F16", "F32")
_BLOCK = MXFP4.block_size
SPEC = LayerSpec(
    LayerKind.MICROSCALED,
    MXFP4,
    (
        TensorSpec("weight", Role.CODES, ("U8",)),
        TensorSpec("weight_scale", Role.BLOCK_SCALE, ("U8",)),
        TensorSpec("bias", Role.BIAS, _FLOATS),
    ),
    algo="gpt-oss",
)


class Mxfp4Dialect:
    """A checkpoint of gpt-oss. ``config``: ``quantization_config`` of config.json."""

    name = "mxfp4"
    kv_cache = KvCacheSpec()

    def __init__(self, config: Mapping[str, Any]) -> None:
        key = "modules_to_not_convert"
        self._ignore = as_texts(config.get(key), "config.json (quantization_config)", key)

    def has_microscaled_layers(self) -> bool:
        return True

    def layer_spec(self, name: str) -> LayerSpec:
        return SPEC if "experts" in name.split(".") else UNQUANTIZED

    def excludes(self, name: str) -> bool:
        return any(word in name for word in self._ignore)

    def named_layers(self) -> tuple[str, ...]:
        return ()

    def settle(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """The format leaves nothing open."""

    def rename(self, mapper: Any) -> None:
        self._ignore = mapper.apply_list(self._ignore)


def is_stacked(tensors: Mapping[str, Any]) -> bool:
    """Whether a module's tensors are a layer of experts in this format, or a part of one."""
    return any(leaf.endswith(("_proj_blocks", "_proj_scales")) for leaf in tensors)


def stacked_record(
    name: str, tensors: Mapping[str, TensorHeader], config: Mapping[str, Any]
) -> LayerRecord:
    """The record of a layer's experts; its shape, [E, 3 I, H], counts the weights.

    config: config.json. Raises CheckpointError for a tensor that is missing, or of a dtype or shape
    other than the configuration's sizes ask for.
    """
    sizes = {key: config.get(key) for key in ("num_local_experts", "intermediate_size")}
    sizes["hidden_size"] = config.get("hidden_size")
    for key, value in sizes.items():
        if type(value) is not int or value < 1:
            raise CheckpointError("config.json", key, value, "a number", "Restore the file.")
    num_experts, inner, hidden = (int(value or 0) for value in sizes.values())
    for leaf, rows, cols in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        if cols % _BLOCK:
            raise CheckpointError(
                "config.json", f"{name}.{leaf}", f"K={cols}", f"a multiple of {_BLOCK}",
                "Correct the sizes in config.json.",
            )  # fmt: skip
        for kind, dtypes, shape in (
            ("blocks", ("U8",), (num_experts, rows, cols // _BLOCK, _BLOCK // 2)),
            ("scales", ("U8",), (num_experts, rows, cols // _BLOCK)),
            ("bias", _FLOATS, (num_experts, rows)),
        ):
            _check(tensors, name, f"{leaf}_{kind}", dtypes, shape)
    files = tuple(sorted({header.file for header in tensors.values()}))
    num_bytes = sum(header.num_bytes for header in tensors.values())
    shape = (num_experts, 3 * inner, hidden)
    bias_bytes = sum(tensors[f"{leaf}_bias"].num_bytes for leaf in ("gate_up_proj", "down_proj"))
    return LayerRecord(name, LINEAR, SPEC, MXFP4.name, shape, num_bytes, files, bias_bytes)


def _check(
    tensors: Mapping[str, TensorHeader], name: str, leaf: str, dtypes: tuple[str, ...],
    shape: tuple[int, ...],
) -> None:  # fmt: skip
    header = tensors.get(leaf)
    needed = f"{dtypes[0]} {list(shape)}, by the sizes in config.json"
    if header is None:
        raise CheckpointError(
            next(iter(tensors.values())).file,
            f"{name}.{leaf}",
            "no such tensor; the experts have " + ", ".join(sorted(tensors)),
            needed,
            "Download the missing files.",
        )
    if header.dtype not in dtypes or header.shape != shape:
        found = f"{header.dtype} {list(header.shape)}"
        raise CheckpointError(
            header.file, f"{name}.{leaf}", found, needed, "Download the checkpoint again."
        )
