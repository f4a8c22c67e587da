# SPDX-License-Identifier: Apache-2.0
"""What a layer's routed experts give once they are all in NVFP4, less what they give now."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch

from vllm_nvfp4.checkpoints.model_class import ExpertPlace
from vllm_nvfp4.checkpoints.source import Source
from vllm_nvfp4.numerics.quantize import nvfp4_global_scale
from vllm_nvfp4.quantize.changes import quantize_four
from vllm_nvfp4.quantize.forward import LayerwiseModel
from vllm_nvfp4.quantize.routed import ExpertInputs, Moments, Routing, Stack, pairs, quantize_routed


def expert_effects(
    source: Source,
    model: LayerwiseModel,
    layer: torch.nn.Module,
    index: int,
    places: Mapping[str, ExpertPlace],
    samples: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor],
    method: str,
) -> list[torch.Tensor]:
    """For each chunk of the samples: the change of the module's output, [tokens, hidden size].

    places:  stored name -> where it stands, of all the experts of the layer
    samples, others: what goes into the layer, [num_samples, length, hidden size] each; others are
             what a calibrated ``method`` quantises for, and none for another
    In memory is a second copy of the layer's experts.
    """
    name = next(iter(places.values())).module
    plain = layer.get_submodule(name)
    changed = copy.deepcopy(plain)
    full = f"{model.prefix(index)}{name}"
    stack = Stack(full, changed, places)

    def inputs(chunk: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found: list[tuple[torch.Tensor, ...]] = []
        model.watch(layer, index, chunk, {name: lambda *given: found.append(given)})
        return found[0]

    def rounded(names: list[str], moments: Moments | None) -> dict[str, torch.Tensor]:
        weights = [source.load(n, "cpu").float() for n in names]
        shared = torch.stack([nvfp4_global_scale(w) for w in weights]).amax()
        moment = None if moments is None else moments.hessian
        made = [quantize_four(w, method, moment, shared) for w in weights]
        return {n: weight.dequantize() for n, weight in zip(names, made, strict=True)}

    if others:
        calls = [Routing.of(full, inputs(chunk), stack.num_experts) for chunk in others]
        stack.check(calls[0])
        routing = Routing.joined(calls)
        quantize_routed(
            ExpertInputs(stack, routing),
            pairs(places),
            lambda names, moments, _: rounded(names, moments),
        )
    else:
        for groups in pairs(places).values():
            for group in groups:
                for n, value in rounded(group, None).items():
                    stack.set(n, value)
    effects = []
    with torch.inference_mode():
        for chunk in samples:
            given_here = inputs(chunk)
            effects.append(changed.forward(*given_here) - plain.forward(*given_here))
    return effects
