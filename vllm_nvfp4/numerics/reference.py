# SPDX-License-Identifier: Apache-2.0
"""The products in float64: what every kernel is compared with."""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_nvfp4.numerics.formats import INT8_GROUP, INT8_MAX
from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row, quantize_int8_per_group
from vllm_nvfp4.numerics.weight import BlockScaledWeight


def reference_linear(
    a: torch.Tensor,
    weight: BlockScaledWeight,
    bias: torch.Tensor | None = None,
    activation_bits: int = 16,
    variant: str = "exact",
) -> torch.Tensor:
    """y[m, n] = sum_k A[m, k] * w[n, k] + bias[n], in float64.

    a:               [M, K] floating point
    activation_bits: 16 takes A = a; 8 takes A = :func:`rounded_activations`
    variant:         of 8 bits: "int8" rounds a to INT8 with one scale per row and 64 columns, any
                     other to E4M3 with one per row; "folded" takes w = :func:`folded_weight`
    Returns [M, N] float64.
    """
    activations = rounded_activations(a, variant) if activation_bits == 8 else a.double()
    w = folded_weight(weight) if variant == "folded" else weight.dequantize(torch.float64)
    y = activations @ w.T
    return y if bias is None else y + bias.double()


def rounded_activations(a: torch.Tensor, variant: str = "exact") -> torch.Tensor:
    """What 8-bit activations of a variant stand for: q * scale, [M, K] float64."""
    if variant != "int8":
        q, scale = quantize_fp8_per_row(a)
        return q.double() * scale.double()
    q, scale = quantize_int8_per_group(a)
    return q.double() * _by_column(scale.double(), a.shape[-1])


def int8_error_bound(a: torch.Tensor, weight: BlockScaledWeight) -> torch.Tensor:
    """bound[m, n] = sum_k step[m, k] * |w[n, k]|, step = amax of k's group * (1 / 254 + 2^-23)

    What rounding activations to INT8 changes in a product at most: half a step of each one. The
    expected change is far less: errors are spread evenly over half a step to either side, so their
    root mean square is step / sqrt(3), and they add with random signs.

    a: [M, K] finite. Returns [M, N] float64.
    """
    _, scale = quantize_int8_per_group(a)
    step = _by_column(scale.double(), a.shape[-1]) * (0.5 + INT8_MAX * 2.0**-23)
    return step @ weight.dequantize(torch.float64).abs().T


def _by_column(scale: torch.Tensor, num_cols: int) -> torch.Tensor:
    """[M, groups] -> [M, K]"""
    return scale.repeat_interleave(INT8_GROUP, -1)[..., :num_cols]


def folded_weight(weight: BlockScaledWeight) -> torch.Tensor:
    """w[n, k] = 8 * e4m3(code[n, k] * block_scale[n, k] / 8) * global_scale[n], in float64.

    What the 8-bit kernel's variant "folded" multiplies. The largest product, 6 * 448, becomes 336,
    inside E4M3; those below 1/8 lose bits to its subnormals. Returns [N, K] float64.
    """
    in_blocks = replace(weight, global_scale=torch.ones_like(weight.global_scale))
    folded = (in_blocks.dequantize(torch.float32) / 8).to(torch.float8_e4m3fn)
    return folded.double() * 8 * weight.global_scale.double()[:, None]
