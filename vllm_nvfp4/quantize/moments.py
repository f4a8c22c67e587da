# SPDX-License-Identifier: Apache-2.0
"""Second moments of a layer's inputs over the tokens of the calibration text."""

from __future__ import annotations

import torch

from vllm_nvfp4.quantize.row_counts import with_zero_rows

# Tokens whose float32 copy is in memory at a time.
_TOKENS = 4096
# Columns of a symmetric product that are computed together with all that are not to their left.
_PANEL = 256


def second_moment(x: torch.Tensor) -> torch.Tensor:
    """H = E[x x^T], [K, K] float32: a mean over tokens.

    x: [..., K] floating point
    """
    x = x.flatten(0, -2)
    size = x.shape[1]
    total = torch.zeros(size, size, dtype=torch.float32, device=x.device)
    for tokens in x.split(_TOKENS):
        part = tokens.float()
        for start in range(0, size, _PANEL):
            end = min(start + _PANEL, size)
            total[start:end, start:].addmm_(part[:, start:end].T, part[:, start:])
    total /= len(x)
    return total.triu() + total.triu(1).T


def difference_moment(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """E[(a - b) x^T], [N, K] float32. Products of x's own dtype: the difference is small, and what
    is made of it is a correction.

    a, b: [..., N], a on any device; x: [..., K]
    """
    a, b, x = (t.flatten(0, -2) for t in (a, b, x))
    total = torch.zeros(a.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    parts = (t.split(_TOKENS) for t in (a, b, x))
    for theirs, mine, inputs in zip(*parts, strict=True):
        difference = theirs.to(inputs.device).float() - mine.to(inputs.device).float()
        total += with_zero_rows(difference.to(inputs.dtype)).T @ with_zero_rows(inputs)
    return total.div_(len(x))
