# SPDX-License-Identifier: Apache-2.0
"""What a kernel holds of a weight: the tensors of one layer in that kernel's own order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_nvfp4.numerics.formats import BlockFormat


@dataclass(frozen=True)
class PackedWeight:
    """A :class:`~vllm_nvfp4.numerics.weight.BlockScaledWeight` in a kernel's order.

    codes:        uint8, kernel order
    block_scale:  uint8, kernel order; the bits of an e4m3 or an e8m0
    global_scale: [N] float32, plain order; multiplies
    num_rows:     N, without padding
    num_cols:     K
    """

    codes: torch.Tensor
    block_scale: torch.Tensor
    global_scale: torch.Tensor
    num_rows: int
    num_cols: int
    fmt: BlockFormat
