# SPDX-License-Identifier: Apache-2.0
"""Checkpoint order <-> the order the CPU kernels read, bit-exact both ways.

Sixteen output rows stand side by side, so that one 512-bit vector of codes feeds sixteen
accumulators, a block scale is one vector, and an activation is one broadcast::

    codes       [ceil(N/16), K/8, 16, 4]        one 32-bit word = eight codes of one row
    block_scale [ceil(N/16), K/block_size, 16]

Within a word the even columns lie in the low half and the odd ones in the high half: nibble i
holds column ``COLUMN_OF_NIBBLE[i]``. Read as 32 lanes of 16 bits, shifted right by 4j, a vector
then holds the pairs (2j, 2j+1) of sixteen rows, which is what a BF16 dot-product instruction takes;
read as 16 lanes of 32 bits, shifted by 4i, it holds column ``COLUMN_OF_NIBBLE[i]`` of each row.
Rows are padded to sixteen with zero codes.
"""

from __future__ import annotations

import torch

from vllm_nvfp4.kernels.layout import PackedWeight
from vllm_nvfp4.numerics.codes import pack_codes, unpack_codes
from vllm_nvfp4.numerics.formats import E8M0_BIAS
from vllm_nvfp4.numerics.quantize import row_chunks
from vllm_nvfp4.numerics.weight import BlockScaledWeight

ROWS = 16
_LARGEST_E8M0 = 252
COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
_NIBBLE_OF_COLUMN = tuple(COLUMN_OF_NIBBLE.index(column) for column in range(8))


def pack_weight(weight: BlockScaledWeight) -> PackedWeight:
    """Bring a weight [N, K] into kernel order.

    Raises ValueError where the shapes do not fit each other, where a block scale is NaN (the
    kernels' decoding has none), and for an E8M0 scale of 2^126 or more: six times that is beyond
    float32, and infinity times an activation of zero would be NaN.
    """
    _check(weight)
    n, k = weight.num_rows, weight.num_cols
    bits, groups = weight.block_scale.view(torch.uint8), -(-n // ROWS)
    codes = weight.codes.new_empty(groups, k // 8, ROWS, 4)
    scales = weight.codes.new_empty(groups, bits.shape[1], ROWS)
    # In pieces, so that besides the two forms of a weight little of it lies in memory.
    for rows in row_chunks(n, k, ROWS):
        here = slice(rows.start // ROWS, -(-rows.stop // ROWS))
        words = unpack_codes(weight.codes[rows]).view(-1, k // 8, 8)[..., COLUMN_OF_NIBBLE]
        words = _pad_rows(pack_codes(words))
        codes[here] = words.view(-1, ROWS, k // 8, 4).transpose(1, 2)
        scales[here] = _pad_rows(bits[rows]).view(-1, ROWS, bits.shape[1]).transpose(1, 2)
    return PackedWeight(
        codes=codes,
        block_scale=scales,
        global_scale=weight.global_scale.contiguous(),
        num_rows=n,
        num_cols=k,
        fmt=weight.fmt,
    )


def unpack_weight(packed: PackedWeight) -> BlockScaledWeight:
    """The inverse of :func:`pack_weight`."""
    return unpack_rows(packed, torch.arange(packed.num_rows, device=packed.codes.device))


def unpack_rows(packed: PackedWeight, rows: torch.Tensor) -> BlockScaledWeight:
    """The chosen rows in checkpoint order. rows: [R] int64, each in 0..N-1."""
    k = packed.num_cols
    group, lane = rows // ROWS, rows % ROWS
    codes = unpack_codes(packed.codes[group, :, lane])[..., _NIBBLE_OF_COLUMN]
    block_scale = packed.block_scale[group, :, lane]
    if packed.fmt.scale_type == "e4m3":
        block_scale = block_scale.view(torch.float8_e4m3fn)
    return BlockScaledWeight(
        codes=pack_codes(codes.reshape(-1, k)),
        block_scale=block_scale,
        global_scale=packed.global_scale[rows],
        fmt=packed.fmt,
    )


def _pad_rows(x: torch.Tensor) -> torch.Tensor:
    missing = -x.shape[0] % ROWS
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def _check(weight: BlockScaledWeight) -> None:
    n, k, block = weight.num_rows, weight.num_cols, weight.fmt.block_size
    if n == 0 or k == 0 or k % block:
        raise ValueError(
            f"{weight.fmt.name}: a weight of {n} rows and K={k} cannot be packed; it needs at "
            f"least one row and K a multiple of {block}"
        )
    if weight.block_scale.shape != (n, k // block) or weight.global_scale.shape != (n,):
        raise ValueError(
            f"{weight.fmt.name}: block_scale is {list(weight.block_scale.shape)} and global_scale "
            f"{list(weight.global_scale.shape)}; a weight [{n}, {k}] needs [{n}, {k // block}] "
            f"and [{n}]"
        )
    bits = weight.block_scale.view(torch.uint8)
    is_nan = (bits & 0x7F) == 0x7F if weight.fmt.scale_type == "e4m3" else bits == 0xFF
    is_huge = bits > (_LARGEST_E8M0 if weight.fmt.scale_type == "e8m0" else 0xFF)
    if is_huge.any() and not is_nan.any():
        row, block_idx = is_huge.nonzero()[0].tolist()
        raise ValueError(
            f"{weight.fmt.name}: the block scale at row {row}, block {block_idx} is "
            f"2^{int(bits[row, block_idx]) - E8M0_BIAS}; weights beyond float32 need a scale of "
            f"2^{_LARGEST_E8M0 - E8M0_BIAS} at most. The checkpoint is damaged, fetch or quantise "
            "it again"
        )
    if is_nan.any():
        row, block_idx = is_nan.nonzero()[0].tolist()
        raise ValueError(
            f"{weight.fmt.name}: the block scale at row {row}, block {block_idx} is NaN; the "
            "checkpoint is damaged, fetch or quantise it again"
        )
