# SPDX-License-Identifier: Apache-2.0
"""Quantise each decoder layer for the inputs that it gets from the quantised layers below it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from vllm_nvfp4.checkpoints.source import FUSED, Source, Unit
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.numerics.weight import BlockScaledWeight
from vllm_nvfp4.quantize.calibration import Calibration
from vllm_nvfp4.quantize.forward import LayerwiseModel
from vllm_nvfp4.quantize.hessian import quantize_gptq, quantize_hessian

_METHODS = {"hessian": quantize_hessian, "gptq": quantize_gptq}


class Calibrated:
    """A Quantizer (see vllm_nvfp4.checkpoints.write) that runs the model on a text.

    source: the 16-bit checkpoint; method: "hessian" or "gptq"
    Raises CheckpointError where transformers cannot run the model, or the text is too short.
    """

    def __init__(
        self, source: Source, method: str, calibration: Calibration, device: str = "cpu"
    ) -> None:
        self._quantize: Callable[..., BlockScaledWeight] = _METHODS[method]
        self._device = device
        samples = calibration.samples(source.folder)
        self._model = LayerwiseModel(
            source.folder, source.tensors, lambda name: source.load(name, "cpu"), samples, device
        )
        self._index = 0
        self._key_of: dict[str, str] = {}
        self._moments: dict[str, torch.Tensor] = {}

    def start(self, unit: Unit, quantized: set[str]) -> None:
        if not unit.prefix:
            return
        if unit.prefix != self._model.prefix(self._index):
            raise CheckpointError(
                unit.prefix,
                "decoder layer",
                f"{unit.prefix} where {self._model.prefix(self._index)} comes next",
                "the layers of one decoder, all there and in order",
                "Use --method mse, which needs no forward pass.",
            )
        names = [n for n in unit.names if n in quantized]
        self._key_of = {n: _input_key(n) for n in names}
        linears = {n.removesuffix(".weight"): key for n, key in self._key_of.items()}
        self._moments = self._model.second_moments(self._index, linears)

    def quantize(
        self, weights: Mapping[str, torch.Tensor], global_scale: torch.Tensor
    ) -> dict[str, BlockScaledWeight]:
        # Shards of a fused layer have the same inputs, and rows do not know of each other: one
        # tall weight is quantised in fewer, larger steps than several.
        names = list(weights)
        key = self._key_of[names[0]]
        stacked = torch.cat([weights[name].to(self._device) for name in names])
        whole = self._quantize(stacked, self._moments[key], global_scale)
        bounds = [len(weights[name]) for name in names]
        parts = zip(
            whole.codes.split(bounds),
            whole.block_scale.split(bounds),
            whole.global_scale.split(bounds),
            strict=True,
        )
        return {
            name: BlockScaledWeight(codes, block_scale, scale, whole.fmt)
            for name, (codes, block_scale, scale) in zip(names, parts, strict=True)
        }

    def finish(self, unit: Unit, weights: Callable[[], dict[str, Any]]) -> None:
        if not unit.prefix:
            return
        self._moments = {}
        # Nothing is asked of what the last layer gives.
        if self._index + 1 < self._model.num_layers:
            self._model.advance(self._index, weights())
        self._index += 1


def _input_key(name: str) -> str:
    """The same for layers that have the same input."""
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    fused = next((shards for shards in FUSED if leaf in shards), (leaf,))
    return f"{parent}.{fused[0]}"
