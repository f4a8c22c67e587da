# SPDX-License-Identifier: Apache-2.0
"""FP-Quant checkpoints (``quant_method: fp_quant``), the format of the MR-GPTQ paper.

y = (x H) W^T with H block-diagonal, one [g, g] rotation for each g inputs, and
W[n, k] = E2M1(qweight[n, k]) * scales[n, k // block] / weight_global_scale

The weight is stored rotated, so the activations have to be. Source: fp_quant 0.3.2
(module/linear.py) and vLLM's loader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_nvfp4.checkpoints.fields import as_text, as_texts
from vllm_nvfp4.checkpoints.spec import (
    UNQUANTIZED,
    CheckpointError,
    KvCacheSpec,
    LayerKind,
    LayerSpec,
    Role,
    TensorSpec,
)
from vllm_nvfp4.numerics.formats import FORMATS

WHERE = "config.json (quantization_config)"
_FLOATS = ("F32", "BF16", "F16")


class FpQuantDialect:
    """An FP-Quant checkpoint. ``config``: ``quantization_config`` of config.json."""

    name = "fp_quant"
    kv_cache = KvCacheSpec()

    def __init__(self, config: Mapping[str, Any]) -> None:
        fmt = FORMATS.get(as_text(config.get("forward_dtype"), WHERE, "forward_dtype"))
        if fmt is None:
            raise CheckpointError(
                WHERE,
                "forward_dtype",
                config.get("forward_dtype"),
                "one of " + ", ".join(FORMATS),
                "Quantise the model again with one of these.",
            )
        for key in ("pseudoquantization", "store_master_weights"):
            if config.get(key):
                raise CheckpointError(
                    WHERE,
                    key,
                    True,
                    "false: quantised weights in the file (qweight, scales)",
                    f"Quantise the model again with {key}=False.",
                )
        size = config.get("hadamard_group_size", 32)
        if type(size) is not int or size < 1 or size & (size - 1):
            raise CheckpointError(
                WHERE, "hadamard_group_size", repr(size), "a power of two", "Correct the file."
            )
        key = "modules_to_not_convert"
        self._ignore = as_texts(config.get(key), WHERE, key)
        self._spec = LayerSpec(
            LayerKind.MICROSCALED,
            fmt,
            (
                TensorSpec("qweight", Role.CODES, ("U8",)),
                TensorSpec("scales", Role.BLOCK_SCALE, ("U8",)),
                TensorSpec("weight_global_scale", Role.GLOBAL_DIVISOR, _FLOATS),
                TensorSpec("act_global_scale", Role.INPUT_SCALE, _FLOATS, optional=True),
                TensorSpec("forward_hadamard_matrix", Role.HADAMARD, _FLOATS),
                TensorSpec("backward_hadamard_matrix", Role.UNUSED, _FLOATS, optional=True),
            ),
            activation_bits=4,
            hadamard_size=size,
            algo=f"FP-Quant {fmt.name}",
        )

    def has_microscaled_layers(self) -> bool:
        return True

    def layer_spec(self, name: str) -> LayerSpec:
        return UNQUANTIZED if self.excludes(name) else self._spec

    def excludes(self, name: str) -> bool:
        return any(name.endswith(module) for module in self._ignore)

    def named_layers(self) -> tuple[str, ...]:
        return ()

    def settle(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """The configuration says it all."""

    def rename(self, mapper: Any) -> None:
        self._ignore = mapper.apply_list(self._ignore)
