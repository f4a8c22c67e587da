# SPDX-License-Identifier: Apache-2.0
"""The products in float64: what every kernel is compared with."""

from __future__ import annotations

import torch

from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row
from vllm_nvfp4.numerics.weight import BlockScaledWeight


def reference_linear(
    a: torch.Tensor,
    weight: BlockScaledWeight,
    bias: torch.Tensor | None = None,
    activation_bits: int = 16,
) -> torch.Tensor:
    """y[m, n] = sum_k A[m, k] * w[n, k] + bias[n], in float64.

    a:               [M, K] floating point
    activation_bits: 16 takes A = a; 8 takes A = a rounded to E4M3 with one scale per row
    Returns [M, N] float64.
    """
    if activation_bits == 8:
        q, scale = quantize_fp8_per_row(a)
        activations = q.double() * scale.double()
    else:
        activations = a.double()
    y = activations @ weight.dequantize(torch.float64).T
    return y if bias is None else y + bias.double()
