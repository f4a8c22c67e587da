# SPDX-License-Identifier: Apache-2.0
"""How far ``vllm-nvfp4 quantize`` has come: by work, not by layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from vllm_nvfp4.checkpoints.source import Source
from vllm_nvfp4.checkpoints.units import by_layer
from vllm_nvfp4.quantize.methods import DATA_FREE, follows_exact
from vllm_nvfp4.serving.progress import Step

TITLE = "Quantising"
# What a phase costs, in microseconds of a CPU, fitted to those of SmolLM2-135M and of a mixture
# made of it: the rounding of a weight; a product of a moment, of a factorisation or of a layer's
# forward pass.
_ROUNDING = {"rtn": 0.05, "mse": 0.15, "hessian": 0.25, "gptq": 0.45, "mr-gptq": 0.7}
_MOMENT, _FACTOR, _FORWARD = 1e-5, 4e-5, 1.3e-5
# A method with a text rounds what is in no layer of the decoder by the weights alone, so.
_OUTSIDE = "mse"


class Progress:
    """Moves a progress line on when a layer begins: the ones before it are done.

    quantized: the weights that are; formats come later, and change little of the time
    prefixes:  of the layers that ``method`` runs; None for all of the model
    num_tokens: that it runs them on
    """

    def __init__(
        self,
        current: Step,
        source: Source,
        quantized: set[str],
        method: str,
        prefixes: Iterable[str] | None = None,
        num_tokens: int = 0,
    ) -> None:
        self._current = current
        self._before: dict[str, float] = {}
        self._total = 0.0
        calibrated = None if prefixes is None else {*prefixes}
        for unit in by_layer(source.tensors, quantized):
            is_inside = calibrated is None or unit.prefix in calibrated
            costs = _Costs(source, method if is_inside else _OUTSIDE, num_tokens)
            groups = [group for group in unit.groups if group[0] in quantized]
            places = (source.model_class.expert(n) for group in unit.groups for n in group)
            experts = len({place.expert for place in places if place is not None})
            # A layer runs before its first weight is rounded, and while the others are.
            forward = costs.forward(unit.groups, experts)
            for group in groups:
                layers = (name.removesuffix(".weight") for name in group)
                self._before |= dict.fromkeys(layers, self._total)
                self._total += costs.rounding(group, experts) + forward
                forward = 0.0

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


@dataclass(frozen=True)
class _Costs:
    """Of the parts of a layer. experts: that it routes to, 0 where it has none"""

    source: Source
    method: str
    num_tokens: int

    def _tokens(self, group: Sequence[str], experts: int) -> float:
        """That a weight sees."""
        if self.method in DATA_FREE or self.source.model_class.expert(group[0]) is None:
            return self.num_tokens * (self.method not in DATA_FREE)
        return self.num_tokens * min(1.0, self.source.model_class.experts_per_token / experts)

    def _weights(self, group: Sequence[str]) -> int:
        return sum(prod(self.source.tensors[name].shape) for name in group)

    def rounding(self, group: Sequence[str], experts: int) -> float:
        """With the moments that it looks at; hessian's are a third of the others'."""
        found = _ROUNDING[self.method] * self._weights(group)
        if self.method in DATA_FREE:
            return found
        columns = self.source.tensors[group[0]].shape[-1]
        products = 3 if follows_exact(self.method) else 1
        moments = products * _MOMENT * self._tokens(group, experts) * columns**2
        return found + moments + (products > 1) * _FACTOR * columns**3

    def forward(self, groups: Iterable[Sequence[str]], experts: int) -> float:
        """Of the quantised model, and of the source where the method looks at it. groups: all"""
        runs = 2 if follows_exact(self.method) else 1
        products = sum(self._tokens(group, experts) * self._weights(group) for group in groups)
        return runs * _FORWARD * products
