# SPDX-License-Identifier: Apache-2.0
"""Quantise each linear layer for the inputs that it gets from the quantised layers before it.

Two streams of hidden states go through the decoder: one through the layers as they are quantised,
one through the layers of the source. GPTQ rounds towards what brings the first back to the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from vllm_nvfp4.checkpoints.model_class import ExpertPlace
from vllm_nvfp4.checkpoints.quantizer import DataFree
from vllm_nvfp4.checkpoints.source import Source
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.checkpoints.units import Unit
from vllm_nvfp4.numerics.hadamard import hadamard, rotate_blocks
from vllm_nvfp4.numerics.quantize import nvfp4_global_scale, quantize_fp8_per_row
from vllm_nvfp4.numerics.weight import BlockScaledWeight
from vllm_nvfp4.quantize.activations import rounded
from vllm_nvfp4.quantize.calibration import Calibration
from vllm_nvfp4.quantize.exact import ExactLayer, run_exact
from vllm_nvfp4.quantize.forward import LayerwiseModel, forward_dtype
from vllm_nvfp4.quantize.hessian import (
    quantize_fp8_gptq,
    quantize_gptq,
    quantize_hessian,
    shifted_target,
)
from vllm_nvfp4.quantize.methods import follows_exact
from vllm_nvfp4.quantize.moments import difference_moment, second_moment
from vllm_nvfp4.quantize.routed import (
    ExpertInputs,
    Moments,
    Routing,
    Stack,
    few_tokens,
    pairs,
    quantize_routed,
)

# Inputs that mr-gptq mixes: the largest Hadamard matrix that BF16 holds exactly and that every
# layer's inputs can be cut into.
_LARGEST_ROTATION = 64


class Calibrated:
    """A Quantizer (see vllm_nvfp4.checkpoints.quantizer) that runs the model on a text.

    source: the 16-bit checkpoint, which was asked what is ``quantizable``; method: one of
            methods.CALIBRATED.
    "mr-gptq" is GPTQ in a rotated space: what it gives is W R for inputs x R, R block-diagonal
    with a Hadamard matrix of size ``rotation`` (MR-GPTQ: Egiazarian et al., arXiv 2509.23202)
    a8_variant: what rounds the inputs of quantised layers to 8 bits (see ``rounded``), for weights
    that come near to the source's output on such inputs; "" for 16 bits. What is between a routed
    expert's two products is rounded where its weights are chosen, not where its output is made.
    Raises CheckpointError where transformers cannot run the model, or the text is too short.
    """

    def __init__(
        self,
        source: Source,
        method: str,
        calibration: Calibration,
        device: str = "cpu",
        rotation: int = 0,
        a8_variant: str = "",
    ) -> None:
        self._source, self._device = source, device
        # What is in no decoder layer is rounded by its weights alone.
        self._by_weights, self._is_layer = DataFree("mse"), False
        self._follows_exact = follows_exact(method)
        self._rotation = hadamard(rotation).to(device) if rotation else None
        self._a8_variant = a8_variant
        self._samples = calibration.samples(source.folder)
        self._model, self._hidden = self._embedded({})  # through the quantised layers
        self._exact_hidden = self._hidden  # through the source's
        self._index = 0
        self._found: dict[str, BlockScaledWeight] = {}  # the current layer's
        self._fp8: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._input_amax: dict[str, float] = {}
        self._output: torch.Tensor | None = None  # the layer's, with these
        self._exact = ExactLayer()
        # Called with the name of each layer before it is quantised.
        self.progress: Callable[[str], None] | None = None
        # For the moments of experts: max_bytes of quantize_routed.
        self.moment_bytes = math.inf
        # Tokens of the text that each routed expert of a layer got.
        self.expert_tokens: dict[str, list[int]] = {}

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Of the decoder layers: what is in none of them is rounded by its weights alone."""
        return self._model.prefixes

    def _embedded(self, weights: Mapping[str, torch.Tensor]) -> tuple[LayerwiseModel, torch.Tensor]:
        """(The model, what goes into its first layer: all samples in one tensor, so that each layer
        computes them at once.) weights: in place of the source's, by name"""

        model = LayerwiseModel(
            self._source.folder,
            self._source.tensors,
            lambda name: weights[name] if name in weights else self._load(name),
            self._samples,
            self._device,
            forward_dtype(self._device),
            model_class=self._source.model_class,
        )
        hidden, model.hidden = torch.cat(model.hidden), []
        return model, hidden

    def _load(self, name: str) -> torch.Tensor:
        return self._source.load(name, "cpu")

    def start(
        self,
        unit: Unit,
        quantized: set[str],
        fp8: set[str],
        representable: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Run the layer once. Each module waits for its input, is quantised for it, and goes on."""
        self._by_weights.start(unit, quantized, fp8, representable)
        # A draft model's layers, or a tower's, are rounded by their weights alone too.
        self._is_layer = unit.prefix in self._model.prefixes
        if not self._is_layer:
            return
        self._go_to(unit.prefix, quantized)
        layer = self._model.layer(self._index, {})
        groups = [list(group) for group in unit.groups if group[0] in quantized]
        # The forward passes of a layer are part of its time.
        if groups and self.progress is not None:
            self.progress(groups[0][0].removesuffix(".weight"))
        experts = self._routed(groups)
        plain = [group for group in groups if self._model.expert(self._index, group[0]) is None]
        if self._follows_exact:
            asked = [*map(self._module, (g[0] for g in plain)), *experts]
            self._exact = run_exact(self._model, layer, self._index, self._exact_hidden, asked)
        seen: dict[str, torch.Tensor] = {}

        def quantize_before(names: list[str]) -> Callable[..., Any]:
            def hook(x: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
                x = self._rounded(x)
                if names[0] in {**self._found, **self._fp8}:  # by the hook on another shard
                    return x, *rest
                target, hessian = self._target(names, x, seen)
                is_fp8, amax = names[0] in fp8, self._amax(x)
                weights = self._round(names, target, hessian, amax, is_fp8, representable)
                for name, weight in weights.items():
                    layer.get_parameter(f"{self._module(name)}.weight").copy_(weight)
                return x, *rest

            return hook

        def quantize_experts(name: str) -> Callable[..., Any]:
            def hook(x: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
                inputs = (self._rounded(x), *rest)
                self._quantize_experts(layer, name, experts[name], inputs, fp8, representable)
                return inputs

            return hook

        hooks = {self._module(n): quantize_before(group) for group in plain for n in group}
        hooks |= {name: quantize_experts(name) for name in experts}
        for name in self._exact.adds_to.values():
            if name:
                hooks[name] = lambda x, *rest, name=name: seen.update({name: x})  # type: ignore[misc]
        self._output = self._model.watch(layer, self._index, self._hidden, hooks)

    def _go_to(self, prefix: str, quantized: set[str]) -> None:
        """Run both streams through the layers before one, where nothing is quantised."""
        index = self._model.prefixes.index(prefix)
        passed = tuple(self._model.prefixes[self._index : index])
        if index < self._index or (passed and any(n.startswith(passed) for n in quantized)):
            raise CheckpointError(
                prefix,
                "decoder layer",
                f"{prefix} where {self._model.prefix(self._index)} comes next",
                "the layers of one decoder in order",
                "Use --method mse, which needs no forward pass.",
            )
        for i in range(self._index, index):
            layer = self._model.layer(i, {})
            before = self._hidden
            self._hidden = self._model.run(layer, i, before)
            theirs = self._exact_hidden
            is_same = theirs is before or not self._follows_exact
            self._exact_hidden = self._hidden if is_same else self._model.run(layer, i, theirs)
        self._index = index

    def _routed(self, groups: list[list[str]]) -> dict[str, dict[str, ExpertPlace]]:
        """The modules of routed experts in the layer -> where each of their weights stands."""
        found: dict[str, dict[str, ExpertPlace]] = {}
        for name in (n for group in groups for n in group):
            if (place := self._model.expert(self._index, name)) is not None:
                found.setdefault(place.module, {})[name] = place
        return found

    def _quantize_experts(
        self,
        layer: torch.nn.Module,
        module: str,
        places: dict[str, ExpertPlace],
        inputs: tuple[torch.Tensor, ...],
        fp8: set[str],
        representable: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        full = f"{self._model.prefix(self._index)}{module}"
        stack = Stack(full, layer.get_submodule(module), places)
        routing = Routing.of(full, inputs, stack.num_experts)
        stack.check(routing)

        def quantize(names: list[str], moments: Moments, largest: float) -> dict[str, torch.Tensor]:
            target = self._weights(names, moments.hessian)
            if moments.shift is not None:
                target = shifted_target(target, moments.hessian, moments.shift)
            return self._round(
                names, target, moments.hessian, largest, names[0] in fp8, representable
            )

        exact = None
        if self._follows_exact:
            exact = routing.counterpart(self._exact.inputs[module])
        seen = ExpertInputs(stack, routing, exact, self._load, self._rounded, self._amax)
        counts = quantize_routed(seen, pairs(places), quantize, self.moment_bytes)
        self.expert_tokens[full] = [counts[e] for e in sorted(counts)]

    def _round(
        self,
        names: list[str],
        target: torch.Tensor,
        hessian: torch.Tensor,
        amax: float,
        is_fp8: bool,
        representable: Callable[[torch.Tensor], torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Shards as they are stored, as numbers, [N, K] float32. amax: of their inputs"""
        if self.progress is not None:
            self.progress(names[0].removesuffix(".weight"))
        if is_fp8:
            return self._quantize_fp8(names, target, hessian)
        self._input_amax |= dict.fromkeys(names, amax)
        return self._quantize(names, target, hessian, representable)

    def _module(self, name: str) -> str:
        """A weight's module, by its name in the layer."""
        return self._model.module(self._index, name)

    def _target(
        self, names: list[str], x: torch.Tensor, seen: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(What to come near, [N, K] float32; H.) GPTQ's aim is :func:`shifted_target`.

        Shards of a fused layer have the same inputs, and rows do not know of each other: one tall
        weight is quantised in fewer, larger steps than several.
        """
        module = self._module(names[0])
        hessian = second_moment(x)
        target = self._weights(names, hessian)
        if not self._follows_exact:
            return target, hessian
        input_shift = difference_moment(self._exact.inputs[module], x, x)
        stream = self._exact.adds_to.get(module)
        output_shift = None
        if stream is not None:
            theirs = self._exact.inputs[stream] if stream else self._exact_hidden
            output_shift = difference_moment(theirs, seen[stream] if stream else self._hidden, x)
        return shifted_target(target, hessian, input_shift, output_shift), hessian

    def _weights(self, names: list[str], hessian: torch.Tensor) -> torch.Tensor:
        """The source's shards, [N, K] float32; hessian: of their inputs, which has to be finite."""
        if not hessian.isfinite().all():
            raise CheckpointError(
                names[0],
                "inputs on the calibration text",
                "NaN or infinite numbers",
                "finite ones",
                "Check the checkpoint's embedding, norms and biases.",
            )
        return torch.cat([self._source.load_finite(n, self._device).float() for n in names])

    def _bounds(self, names: list[str]) -> list[int]:
        return [self._source.tensors[name].shape[0] for name in names]

    def _quantize(
        self,
        names: list[str],
        target: torch.Tensor,
        hessian: torch.Tensor,
        representable: Callable[[torch.Tensor], torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Shards in NVFP4; returns them as numbers, [N, K] float32."""
        bounds = self._bounds(names)
        target, hessian = self._rotate(target), self._rotate(self._rotate(hessian).T)
        largest = torch.stack([nvfp4_global_scale(t) for t in target.split(bounds)]).amax()
        choose = quantize_gptq if self._follows_exact else quantize_hessian
        whole = choose(target, hessian, representable(largest))
        parts = zip(
            whole.codes.split(bounds),
            whole.block_scale.split(bounds),
            whole.global_scale.split(bounds),
            strict=True,
        )
        found = {
            name: BlockScaledWeight(codes, block_scale, scale, whole.fmt)
            for name, (codes, block_scale, scale) in zip(names, parts, strict=True)
        }
        self._found |= found
        # R is symmetric and its own inverse: rotated twice is not rotated.
        return {name: self._rotate(weight.dequantize()) for name, weight in found.items()}

    def _quantize_fp8(
        self, names: list[str], target: torch.Tensor, hessian: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        if self._follows_exact:
            codes, scale = quantize_fp8_gptq(target, hessian)
        else:
            codes, scale = quantize_fp8_per_row(target)
        bounds = self._bounds(names)
        parts = zip(codes.split(bounds), scale.split(bounds), strict=True)
        found = dict(zip(names, parts, strict=True))
        self._fp8 |= found
        return {name: codes.float() * scale for name, (codes, scale) in found.items()}

    def few_tokens(self) -> str:
        """One line on experts that got few tokens of the text, or "" where none did."""
        return few_tokens([n for of_layer in self.expert_tokens.values() for n in of_layer])

    def _amax(self, x: torch.Tensor) -> float:
        """Of the inputs, rotated as the weight is."""
        if not len(x):
            return 0.0
        return max(float(self._rotate(sample.float()).abs().amax()) for sample in x)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        """The inputs of a quantised layer as it is going to be served."""
        return rounded(x, self._a8_variant, self._rotate) if self._a8_variant else x

    def _run_stored(self, layer: torch.nn.Module, index: int, names: Iterable[str]) -> torch.Tensor:
        """The output of a layer with its quantised weights, ``names``."""
        if not self._a8_variant:
            return self._model.run(layer, index, self._hidden)
        places = {n: self._model.expert(index, n) for n in names}
        modules = {
            self._model.module(index, n) if place is None else place.module
            for n, place in places.items()
        }
        hooks = {m: lambda x, *rest: (self._rounded(x), *rest) for m in sorted(modules)}
        return self._model.watch(layer, index, self._hidden, hooks)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._rotation is None else rotate_blocks(x, self._rotation)

    def quantize(self, weights: Mapping[str, torch.Tensor]) -> dict[str, BlockScaledWeight]:
        if not self._is_layer:  # lm_head or the embedding
            return self._by_weights.quantize(weights)
        return {name: self._found[name] for name in weights}

    def quantize_fp8(
        self, weights: Mapping[str, torch.Tensor]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        if not self._is_layer:
            return self._by_weights.quantize_fp8(weights)
        return {name: self._fp8[name] for name in weights}

    def input_amax(self, name: str) -> float | None:
        return self._input_amax.get(name)

    def finish(self, unit: Unit, weights: Callable[[], dict[str, torch.Tensor]]) -> None:
        if unit.prefix not in self._model.prefixes:
            # The layers make up for an embedding that is not the source's.
            stored = {} if unit.prefix else weights()
            if self._model.embedding_name in stored:
                self._hidden = self._embedded(stored)[1]
            return
        self._go_to(unit.prefix, set())
        index, self._index = self._index, self._index + 1
        # Nothing is asked of what the last layer gives.
        if self._index < self._model.num_layers:
            exact, output = self._exact.output, self._output
            if self._follows_exact and exact is None:  # an earlier run quantised this layer
                layer = self._model.layer(index, {})
                exact = self._model.run(layer, index, self._exact_hidden)
            if output is None:
                stored = weights()
                layer = self._model.layer(index, stored)
                output = self._run_stored(layer, index, stored)
            self._hidden = output
            self._exact_hidden = output if exact is None else exact
        self._found, self._fp8, self._input_amax = {}, {}, {}
        self._output, self._exact = None, ExactLayer()


def rotation_size(source: Source, quantized: set[str]) -> int:
    """How large a Hadamard matrix mr-gptq takes for a model."""
    return math.gcd(_LARGEST_ROTATION, *(source.tensors[n].shape[1] for n in quantized))
