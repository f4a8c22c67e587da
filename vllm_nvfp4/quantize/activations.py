# SPDX-License-Identifier: Apache-2.0
"""Inputs as a layer with 8-bit activations meets them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_nvfp4.numerics.quantize import INT8_GROUP, quantize_fp8_per_row, quantize_int8_per_group

# Tokens whose float32 copies are in memory at a time.
_TOKENS = 4096


def rounded(
    x: torch.Tensor,
    variant: str,
    rotate: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> torch.Tensor:
    """R(q * scale) of R(x), in x's dtype: what the products of a layer are computed of.

    x: [..., K]; variant: "exact", E4M3 with one scale per token, or "int8", with one per token and
    64 columns; rotate: R, its own inverse, for weights that are stored rotated
    """
    rows = x.flatten(0, -2)
    made = torch.empty_like(rows)
    for part, out in zip(rows.split(_TOKENS), made.split(_TOKENS), strict=True):
        turned = rotate(part.float())
        if variant == "int8":
            q, scale = quantize_int8_per_group(turned)
            scale = scale.repeat_interleave(INT8_GROUP, -1)[..., : q.shape[-1]]
        else:
            q, scale = quantize_fp8_per_row(turned)
        out.copy_(rotate(q.float() * scale))
    return made.view(x.shape)
