# SPDX-License-Identifier: Apache-2.0
"""The products in float64: what every kernel is compared with."""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row
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
    activation_bits: 16 takes A = a; 8 takes A = a rounded to E4M3 with one scale per row
    variant:         "folded" takes w = :func:`folded_weight`
    Returns [M, N] float64.
    """
    if activation_bits == 8:
        q, scale = quantize_fp8_per_row(a)
        activations = q.double() * scale.double()
    else:
        activations = a.double()
    w = folded_weight(weight) if variant == "folded" else weight.dequantize(torch.float64)
    y = activations @ w.T
    return y if bias is None else y + bias.double()


def folded_weight(weight: BlockScaledWeight) -> torch.Tensor:
    """w[n, k] = 8 * e4m3(code[n, k] * block_scale[n, k] / 8) * global_scale[n], in float64.

    What the 8-bit kernel's variant "folded" multiplies. The largest product, 6 * 448, becomes 336,
    inside E4M3; those below 1/8 lose bits to its subnormals. Returns [N, K] float64.
    """
    in_blocks = replace(weight, global_scale=torch.ones_like(weight.global_scale))
    folded = (in_blocks.dequantize(torch.float32) / 8).to(torch.float8_e4m3fn)
    return folded.double() * 8 * weight.global_scale.double()[:, None]
