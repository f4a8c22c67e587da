# SPDX-License-Identifier: Apache-2.0
"""The block-diagonal rotation of FP-Quant checkpoints."""

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


def hadamard(size: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix over sqrt(size): orthogonal and symmetric, [size, size] float32.

    size: a power of two. BF16 holds the entries exactly where it is a power of four.
    """
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5
