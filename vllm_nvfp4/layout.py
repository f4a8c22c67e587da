# SPDX-License-Identifier: Apache-2.0
"""Checkpoint order <-> kernel order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_nvfp4.numerics.formats import BlockFormat


@dataclass(frozen=True)
class PackedWeight:
    """A microscaled weight in the order a kernel reads it.

    codes:        uint8, kernel order
    block_scale:  uint8, kernel order: the bits of E4M3 or E8M0 scales
    global_scale: [N] float32, multiplies, in plain order
    num_rows:     N, without padding
    num_cols:     K, without padding
    """

    codes: torch.Tensor
    block_scale: torch.Tensor
    global_scale: torch.Tensor
    num_rows: int
    num_cols: int
    fmt: BlockFormat
