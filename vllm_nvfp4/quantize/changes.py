# SPDX-License-Identifier: Apache-2.0
"""By how much each format changes the weights of a decoder layer, all its linear layers alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_nvfp4.checkpoints.source import Source
from vllm_nvfp4.numerics.quantize import nvfp4_global_scale, quantize_fp8_per_row, quantize_nvfp4
from vllm_nvfp4.numerics.weight import BlockScaledWeight
from vllm_nvfp4.quantize.forward import LayerwiseModel
from vllm_nvfp4.quantize.hessian import quantize_fp8_gptq, quantize_gptq, quantize_hessian
from vllm_nvfp4.quantize.methods import CALIBRATED
from vllm_nvfp4.quantize.moments import second_moment

# W' - W, [N, K] float32, by weight and format.
Changes = dict[str, dict[str, torch.Tensor]]


def layer_changes(
    source: Source,
    model: LayerwiseModel,
    layer: torch.nn.Module,
    index: int,
    groups: Sequence[tuple[str, ...]],
    others: Sequence[torch.Tensor],
    method: str,
) -> Changes:
    """Of the fused layers ``groups``.

    others: chunks of what goes into the layer, [num_samples, length, hidden size], whose inputs a
            calibrated ``method`` quantises for
    """
    moments = {}
    if method in CALIBRATED:
        asked = {model.module(index, group[0]) for group in groups}
        moments = _second_moments(model, layer, index, others, sorted(asked))
    changes: Changes = {}
    for group in groups:
        moment = moments.get(model.module(index, group[0]))
        changes |= weight_changes(source, group, method, moment)
    return changes


def _second_moments(
    model: LayerwiseModel,
    layer: torch.nn.Module,
    index: int,
    hidden: Sequence[torch.Tensor],
    modules: Sequence[str],
) -> dict[str, torch.Tensor]:
    """E[x x^T] of the inputs of each module, [K, K] float32."""
    total: dict[str, torch.Tensor] = {}
    num_samples = sum(map(len, hidden))
    for chunk in hidden:
        inputs, _ = model.inputs(layer, index, chunk, modules)
        for name, x in inputs.items():
            total[name] = total.get(name, 0) + second_moment(x) * (len(chunk) / num_samples)
    return total


def quantize_four(
    weight: torch.Tensor, method: str, moment: torch.Tensor | None, shared: torch.Tensor
) -> BlockScaledWeight:
    """A weight [N, K] in NVFP4 by a method. moment: E[x x^T] of its inputs, None for a method that
    looks at no text; shared: the global scale of its fused layer"""
    if moment is None:
        return quantize_nvfp4(weight, method, shared)
    if method == "gptq":
        # The descent lowers all layers' errors alike, and takes as long as all the rest.
        return quantize_gptq(weight, moment, shared, descent_rounds=0)
    return quantize_hessian(weight, moment, shared)


def weight_changes(
    source: Source, group: Sequence[str], method: str, moment: torch.Tensor | None
) -> Changes:
    """W' - W of each weight of a fused layer in each format."""
    weights = {n: source.load(n, "cpu").float() for n in group}
    shared = torch.stack([nvfp4_global_scale(w) for w in weights.values()]).amax()
    found: Changes = {}
    for name, weight in weights.items():
        four = quantize_four(weight, method, moment, shared)
        if method == "gptq" and moment is not None:
            codes, scale = quantize_fp8_gptq(weight, moment)
        else:
            codes, scale = quantize_fp8_per_row(weight)
        eight = codes.float() * scale
        found[name] = {"nvfp4": four.dequantize() - weight, "fp8": eight - weight}
    return found
