# SPDX-License-Identifier: Apache-2.0
"""Routed experts at random, their products in float64, and how far a kernel may be from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import torch

from vllm_nvfp4.kernels.layout import PackedWeight, pack_weight
from vllm_nvfp4.numerics.activation import ExpertActivation
from vllm_nvfp4.numerics.formats import FORMATS
from vllm_nvfp4.numerics.quantize import quantize_mxfp4, quantize_nvfp4
from vllm_nvfp4.numerics.reference import reference_linear
from vllm_nvfp4.numerics.weight import BlockScaledWeight
from vllm_nvfp4.testing.metrics import UNIT_ROUNDOFF, Comparison, compare, linear_tolerance

# What an activation function computed in f32 with __expf and erff may be off, relative to its
# largest term.
_FUNCTION_LOSS = 2.0**-19


@dataclass(frozen=True)
class Experts:
    """One product's weights: of each expert, and as the kernels take them.

    bias: [experts, N] of the activations' dtype, or None
    """

    weights: list[BlockScaledWeight]
    bias: torch.Tensor | None

    @property
    def stack(self) -> PackedWeight:
        """As the CUDA kernels take them, with a leading dimension of experts."""
        return self.stacked_by(pack_weight)

    def stacked_by(self, pack: Callable[[BlockScaledWeight], PackedWeight]) -> PackedWeight:
        """Packed one by one and stacked."""
        packed = [pack(w) for w in self.weights]
        return replace(
            packed[0],
            codes=torch.stack([p.codes for p in packed]),
            block_scale=torch.stack([p.block_scale for p in packed]),
            global_scale=torch.stack([p.global_scale for p in packed]),
        )


def random_experts(
    num_experts: int, n: int, k: int, fmt_name: str, *, bias: torch.dtype | None = None,
    seed: int = 0, device: str | torch.device = "cpu",
) -> Experts:  # fmt: skip
    """Student-t weights; rows with multipliers of their own, as where w1's and w3's differ.

    bias: its dtype, or None for experts without
    """
    generator = torch.Generator(device).manual_seed(seed)
    quantize = quantize_nvfp4 if fmt_name == "nvfp4" else quantize_mxfp4
    weights, factors = [], torch.linspace(0.5, 1.5, n, device=device)
    for _ in range(num_experts):
        normal = torch.randn(n, k, 5, generator=generator, device=device)
        # Four degrees of freedom: outliers, whose blocks have larger scales than others.
        tailed = normal[..., 0] / normal[..., 1:].square().mean(-1).sqrt()
        w = quantize(tailed * k**-0.5)
        weights.append(
            BlockScaledWeight(w.codes, w.block_scale, w.global_scale * factors, FORMATS[fmt_name])
        )
    offsets = None
    if bias is not None:
        offsets = torch.randn(num_experts, n, generator=generator, device=device).to(bias)
    return Experts(weights, offsets)


def route(ids: torch.Tensor, expert_map: torch.Tensor | None, num_experts: int) -> torch.Tensor:
    """The number of each choice's expert on this rank, -1 where it is elsewhere. ids: [M, k]"""
    if expert_map is not None:
        known = (ids >= 0) & (ids < len(expert_map))
        ids = torch.where(known, expert_map[ids.clamp(0, len(expert_map) - 1).long()], -1)
    return torch.where((ids >= 0) & (ids < num_experts), ids, -1)


def expected_schedule(
    local: torch.Tensor, num_experts: int, largest_tile: int = 64
) -> tuple[list[list[int]], list[int]]:
    """(entries of expert, first choice, count, tile; sorted choices) as csrc/moe_route.cuh says."""
    entries: list[list[int]] = []
    order: list[int] = []
    flat = local.flatten().tolist()
    for expert in range(num_experts):
        mine = [i for i, e in enumerate(flat) if e == expert]
        for first in range(0, len(mine), largest_tile):
            count = min(largest_tile, len(mine) - first)
            tile = next(t for t in (8, 16, 32, 64) if t >= count)
            entries.append([expert, len(order) + first, count, tile])
        order += mine
    return entries, order


def reference_product(
    x: torch.Tensor, weight: BlockScaledWeight, bias: torch.Tensor | None,
    activation: ExpertActivation | None, activation_bits: int = 16, variant: str = "exact",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(y, tolerance), float64: f(x w^T + bias) of one expert, and how far a kernel may be from it.

    The tolerance is the dense kernels' for the sums, carried through the activation by trying the
    ends of their ranges, with the roundings of the function and of y.
    """
    sums = reference_linear(x, weight, bias, activation_bits, variant)
    u = UNIT_ROUNDOFF[x.dtype]
    off = linear_tolerance(x, weight, sums, activation_bits, variant) - u * sums.abs()
    if activation is None:
        return sums, off + u * sums.abs()
    y = activation(sums)
    if activation.is_gated:
        signs = torch.ones_like(off).unflatten(1, (2, -1))
        ends = [
            activation(
                sums + off * (signs * torch.tensor([[g], [v]], device=off.device)).flatten(1)
            )
            for g, v in product((-1.0, 1.0), repeat=2)
        ]
    else:
        ends = [activation(sums + off), activation(sums - off)]
    spread = torch.stack([(end - y).abs() for end in ends]).amax(0)
    if activation.is_gated:
        # GELU's own value ends in cancellation: its error is relative to the gate.
        gate, up = sums.chunk(2, dim=1)
        largest = gate.abs() * (up.abs() + abs(activation.beta))
    else:
        largest = sums.abs().maximum(y.abs())
    smallest = torch.finfo(x.dtype).smallest_normal * u
    return y, 1.5 * spread + _FUNCTION_LOSS * largest + u * y.abs() + smallest


def reference_moe(
    a: torch.Tensor, w13: Experts, w2: Experts, weights: torch.Tensor, local: torch.Tensor,
    activation: ExpertActivation,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(y, tolerance), float64, of the whole layer with 16-bit activations.

    local: [M, k] number of each choice's expert, or -1
    """
    y = torch.zeros(a.shape[0], w2.weights[0].num_rows, dtype=torch.float64, device=a.device)
    off, u = torch.zeros_like(y), UNIT_ROUNDOFF[a.dtype]
    for e in range(len(w13.weights)):
        token, j = (local == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        bias = [None if w.bias is None else w.bias[e] for w in (w13, w2)]
        h, off_h = reference_product(a[token], w13.weights[e], bias[0], activation)
        # h in float64 as if it had a's dtype: its roundings are in off_h.
        out = reference_linear(h, w2.weights[e], bias[1])
        dense = w2.weights[e].dequantize(torch.float64).abs()
        loss = linear_tolerance(h.to(a.dtype), w2.weights[e], out) + off_h @ dense.T
        factor = weights[token, j].double()[:, None]
        y.index_add_(0, token, out * factor)
        off.index_add_(0, token, loss * factor.abs())
    return y, off + u * y.abs() + torch.finfo(a.dtype).smallest_normal * u


def compare_moe(
    y: torch.Tensor, a: torch.Tensor, w13: Experts, w2: Experts, weights: torch.Tensor,
    local: torch.Tensor, activation: ExpertActivation,
) -> Comparison:  # fmt: skip
    """Compare the whole layer's output with float64; arguments as of :func:`reference_moe`."""
    return compare(y, *reference_moe(a, w13, w2, weights, local, activation))
