# SPDX-License-Identifier: Apache-2.0
"""The block-diagonal rotation of activations that FP-Quant checkpoints ask for."""

from __future__ import annotations

import torch


def rotate_blocks(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """y[..., b*g + j] = sum_i x[..., b*g + i] * rotation[i, j] for every block b of g elements.

    x:        [..., K] floating point, K a multiple of g
    rotation: [g, g]; applied in x's dtype
    Source: FP-Quant, ``forward_hadamard_matrix``.
    """
    size = rotation.shape[0]
    blocks = x.reshape(*x.shape[:-1], -1, size)
    return (blocks @ rotation.to(x.dtype)).view(x.shape)
