# SPDX-License-Identifier: Apache-2.0
"""How far ``vllm-nvfp4 quantize`` has come: by work, not by layers."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from vllm_nvfp4.checkpoints.source import Source, by_layer
from vllm_nvfp4.serving.progress import Step

TITLE = "Quantising"
# CPU time for a weight, of which SmolLM2-135M has 106 million and 16,384 tokens of text pass
# through: 31 s by mse and 233 s by gptq (quantize_cpu.csv), 102 s by hessian, 345 s by mr-gptq.
_COST = {"rtn": 0.1, "mse": 0.3, "hessian": 1.0, "gptq": 2.2, "mr-gptq": 3.3}
# A method with a text rounds what is in no layer of the decoder by the weights alone, so.
_OUTSIDE = "mse"


class Progress:
    """Moves a progress line on when a layer begins: the ones before it are done.

    quantized: the weights that are; formats come later, and change little of the time
    prefixes:  of the layers that ``method`` runs; None for all of the model
    """

    def __init__(
        self,
        current: Step,
        source: Source,
        quantized: set[str],
        method: str,
        prefixes: Iterable[str] | None = None,
    ) -> None:
        self._current = current
        self._before: dict[str, float] = {}
        self._total = 0.0
        calibrated = None if prefixes is None else {*prefixes}
        for unit in by_layer(source.tensors, quantized):
            is_inside = calibrated is None or unit.prefix in calibrated
            cost = _COST[method if is_inside else _OUTSIDE]
            for group in unit.groups:
                if group[0] in quantized:
                    layers = (name.removesuffix(".weight") for name in group)
                    self._before |= dict.fromkeys(layers, self._total)
                    weights = sum(prod(source.tensors[name].shape) for name in group)
                    self._total += cost * weights

    def begun(self, layer: str) -> None:
        """For WriteOptions.progress."""
        if self._current.title != TITLE:
            self._current.begin(TITLE)
        # A layer that was quantised while it ran is named a second time when it is written.
        before = max(self._current.fraction or 0.0, self._before[layer] / max(self._total, 1))
        self._current.advance(before, layer)

    def skipped(self, layer: str) -> None:
        """For WriteOptions.skipped."""
        self.begun(layer)
        self._current.skip(self._current.fraction or 0.0)
