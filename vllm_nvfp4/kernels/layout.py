# SPDX-License-Identifier: Apache-2.0
"""Checkpoint order <-> the order the CUDA kernels read. Torch only, on the weight's own device.

A packed tile is 16 rows x 64 columns. With g = lane // 4 and t = lane % 4, lane and word j of the
tile's codes hold, in byte i,

    code[g, 16j + 4t + i] << 4 | code[g + 8, 16j + 4t + i]

and its block scales are, for each g, one word for every two blocks of a row:

    scale[g, 2p], scale[g, 2p + 1], scale[g + 8, 2p], scale[g + 8, 2p + 1]

csrc/fragments.cuh says why. N is padded to 16 and K to 64 with zero codes and zero scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from vllm_nvfp4.numerics.codes import pack_codes, unpack_codes
from vllm_nvfp4.numerics.formats import BlockFormat
from vllm_nvfp4.numerics.quantize import row_chunks
from vllm_nvfp4.numerics.weight import BlockScaledWeight

TILE_N = 16
TILE_K = 64
_LARGEST_E4M3 = 0x7E  # 448; 0x7F is NaN, larger bytes are negative
_LARGEST_E8M0 = 0xFE  # 2^127; 0xFF is NaN


@dataclass(frozen=True)
class PackedWeight:
    """A block-scaled weight in the order a kernel reads it.

    codes:        kernel order, uint8
    block_scale:  kernel order, uint8 (bits of e4m3 or e8m0)
    global_scale: [N] float32, multiplies, plain order
    num_rows:     N, unpadded
    num_cols:     K, unpadded
    """

    codes: torch.Tensor
    block_scale: torch.Tensor
    global_scale: torch.Tensor
    num_rows: int
    num_cols: int
    fmt: BlockFormat


def check_stack(name: str, stack: PackedWeight, rows: int, cols: int) -> None:
    """Raise ValueError unless a stack of experts holds the codes of [rows, cols], which are N and K
    as its kernel pads them, for each."""
    found, needed = 2 * stack.codes[0].numel(), rows * cols
    if found != needed:
        raise ValueError(
            f"vllm_nvfp4.moe: {name} holds {found} codes an expert; needed {needed} for "
            f"[{stack.num_rows}, {stack.num_cols}]"
        )


def pack_weight(weight: BlockScaledWeight) -> PackedWeight:
    """The weight in fragment order.

    Returns codes [ceil(N/16), ceil(K/64), 512] uint8 and block_scale [ceil(N/16), ceil(K/64), 64]
    uint8 (NVFP4) or [..., 32] (MXFP4).
    Raises ValueError where K is not a multiple of the block size, a tensor's shape does not fit the
    codes', or a block scale is NaN or negative: the kernels read non-negative scales only.
    """
    _check(weight)
    rows, cols, block = weight.num_rows, weight.num_cols, weight.fmt.block_size
    tiles_n, tiles_k = math.ceil(rows / TILE_N), math.ceil(cols / TILE_K)
    codes = weight.codes.new_empty(tiles_n, tiles_k, TILE_N * TILE_K // 2)
    scale = weight.codes.new_empty(tiles_n, tiles_k, TILE_N * TILE_K // block)
    bits = weight.block_scale.view(torch.uint8)
    # In pieces, so that besides the two forms of a weight little of it lies in memory.
    for rows_here in row_chunks(tiles_n * TILE_N, cols, TILE_N):
        tiles = slice(rows_here.start // TILE_N, rows_here.stop // TILE_N)
        codes[tiles] = _codes_of(weight.codes[rows_here], tiles.stop - tiles.start, tiles_k)
        scale[tiles] = _scales_of(
            bits[rows_here], tiles.stop - tiles.start, tiles_k, TILE_K // block
        )
    return PackedWeight(
        codes, scale, weight.global_scale.float().contiguous(), rows, cols, weight.fmt
    )


def _codes_of(codes: torch.Tensor, tiles_n: int, tiles_k: int) -> torch.Tensor:
    codes = unpack_codes(codes)
    more = tiles_k * TILE_K - codes.shape[1], tiles_n * TILE_N - len(codes)
    codes = pad(codes, (0, more[0], 0, more[1]))
    # [n tile, row half, g, k tile, j, t, i] -> [n tile, k tile, g, t, j, i] for each row half
    codes = codes.view(tiles_n, 2, 8, tiles_k, 4, 4, 4)
    codes = codes[:, 0] << 4 | codes[:, 1]
    return codes.permute(0, 2, 1, 4, 3, 5).reshape(tiles_n, tiles_k, TILE_N * TILE_K // 2)


def _scales_of(scale: torch.Tensor, tiles_n: int, tiles_k: int, per_tile: int) -> torch.Tensor:
    """per_tile: blocks of a row in a tile"""
    more = tiles_k * per_tile - scale.shape[1], tiles_n * TILE_N - len(scale)
    scale = pad(scale, (0, more[0], 0, more[1]))
    # [n tile, row half, g, k tile, p, block of the pair] -> [n tile, k tile, g, p, row half, block]
    scale = scale.view(tiles_n, 2, 8, tiles_k, per_tile // 2, 2)
    return scale.permute(0, 3, 2, 4, 1, 5).reshape(tiles_n, tiles_k, TILE_N * per_tile)


def unpack_weight(packed: PackedWeight) -> BlockScaledWeight:
    """The inverse of :func:`pack_weight`, bit for bit."""
    rows, cols, block = packed.num_rows, packed.num_cols, packed.fmt.block_size
    tiles_n, tiles_k = packed.codes.shape[:2]

    codes = packed.codes.view(tiles_n, tiles_k, 8, 4, 4, 4).permute(0, 2, 1, 4, 3, 5)
    codes = torch.stack([codes >> 4, codes & 0xF], dim=1)
    codes = codes.reshape(tiles_n * TILE_N, tiles_k * TILE_K)[:rows, :cols]

    scale = packed.block_scale.view(tiles_n, tiles_k, 8, TILE_K // block // 2, 2, 2)
    scale = scale.permute(0, 4, 2, 1, 3, 5).reshape(tiles_n * TILE_N, tiles_k * TILE_K // block)
    scale = scale[:rows, : cols // block].contiguous()
    if packed.fmt.scale_type == "e4m3":
        scale = scale.view(torch.float8_e4m3fn)
    return BlockScaledWeight(pack_codes(codes).contiguous(), scale, packed.global_scale, packed.fmt)


def _check(weight: BlockScaledWeight) -> None:
    rows, cols, fmt = weight.num_rows, weight.num_cols, weight.fmt
    if cols % fmt.block_size or cols == 0 or rows == 0:
        raise ValueError(
            f"{fmt.name}: a weight of {rows} rows and K={cols} cannot be packed; it needs at least "
            f"one row and K a multiple of {fmt.block_size}"
        )
    for name, shape, needed in (
        ("block_scale", weight.block_scale.shape, (rows, cols // fmt.block_size)),
        ("global_scale", weight.global_scale.shape, (rows,)),
    ):
        if tuple(shape) != needed:
            raise ValueError(f"{fmt.name}: {name} is {list(shape)}, needed {list(needed)}")
    largest = _LARGEST_E4M3 if fmt.scale_type == "e4m3" else _LARGEST_E8M0
    is_bad = weight.block_scale.view(torch.uint8) > largest
    if bool(is_bad.any()):
        row, column = (int(i) for i in is_bad.nonzero()[0])
        found = int(weight.block_scale.view(torch.uint8)[row, column])
        raise ValueError(
            f"{fmt.name}: block_scale[{row}, {column}] is NaN or negative (byte 0x{found:02X}, "
            f"{int(is_bad.sum())} such in all); needed bytes 0x00 to 0x{largest:02X}. "
            "The checkpoint is damaged: write it again"
        )
