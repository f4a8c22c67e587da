# SPDX-License-Identifier: Apache-2.0
"""The packed layout: bit-exact inverse, the documented place of every code and scale, refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vllm_nvfp4.kernels.layout import pack_weight, unpack_weight
from vllm_nvfp4.numerics.codes import unpack_codes
from vllm_nvfp4.numerics.formats import FORMATS, MXFP4, NVFP4, BlockFormat
from vllm_nvfp4.numerics.weight import BlockScaledWeight


def random_weight(fmt: BlockFormat, n: int, k: int, seed: int = 0) -> BlockScaledWeight:
    """Every code and every legal scale byte is as likely as any other."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    top = 0x7F if fmt.scale_type == "e4m3" else 0xFF
    shape = (n, k // fmt.block_size)
    scale = torch.randint(0, top, shape, dtype=torch.uint8, generator=generator)
    if fmt.scale_type == "e4m3":
        scale = scale.view(torch.float8_e4m3fn)
    return BlockScaledWeight(codes, scale, torch.rand(n, generator=generator), fmt)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 40, 96])
@pytest.mark.parametrize("blocks", [1, 3, 4, 11, 64])
def test_unpack_is_the_exact_inverse(fmt: BlockFormat, n: int, blocks: int) -> None:
    k = blocks * fmt.block_size
    weight = random_weight(fmt, n, k)
    packed = pack_weight(weight)
    tiles = (math.ceil(n / 16), math.ceil(k / 64))
    assert packed.codes.shape == (*tiles, 512)
    assert packed.block_scale.shape == (*tiles, 1024 // fmt.block_size)
    assert packed.codes.is_contiguous()
    assert packed.block_scale.is_contiguous()
    back = unpack_weight(packed)
    assert torch.equal(back.codes, weight.codes)
    assert back.block_scale.dtype == weight.block_scale.dtype
    assert torch.equal(back.block_scale.view(torch.uint8), weight.block_scale.view(torch.uint8))
    assert torch.equal(back.global_scale, weight.global_scale)
    assert (back.num_rows, back.num_cols, back.fmt) == (n, k, fmt)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_every_code_and_scale_is_where_fragments_cuh_says(fmt: BlockFormat) -> None:
    """Written out lane by lane, apart from the tensor operations of pack_weight."""
    n, k = 24, 160
    weight = random_weight(fmt, n, k)
    packed = pack_weight(weight)
    codes = torch.zeros(32, 192, dtype=torch.uint8)
    codes[:n, :k] = unpack_codes(weight.codes)
    scale = torch.zeros(32, 192 // fmt.block_size, dtype=torch.uint8)
    scale[:n, : k // fmt.block_size] = weight.block_scale.view(torch.uint8)
    blocks = 64 // fmt.block_size
    for tile_n in range(2):
        for tile_k in range(3):
            for lane in range(32):
                g, t = lane // 4, lane % 4
                row = 16 * tile_n + g
                for word in range(4):
                    for i in range(4):
                        column = 64 * tile_k + 16 * word + 4 * t + i
                        byte = int(packed.codes[tile_n, tile_k, 16 * lane + 4 * word + i])
                        assert byte >> 4 == codes[row, column]
                        assert byte & 0xF == codes[row + 8, column]
                for pair in range(blocks // 2):
                    at = (g * (blocks // 2) + pair) * 4
                    found = packed.block_scale[tile_n, tile_k, at : at + 4].tolist()
                    first = blocks * tile_k + 2 * pair
                    assert found[:2] == scale[row, first : first + 2].tolist()
                    assert found[2:] == scale[row + 8, first : first + 2].tolist()


def test_padding_is_zero() -> None:
    weight = random_weight(NVFP4, 3, 16)
    packed = pack_weight(weight)
    assert int((packed.codes != 0).sum()) <= 3 * 16
    assert int((packed.block_scale != 0).sum()) <= 3


@pytest.mark.parametrize(
    ("byte", "fmt"), [(0x7F, NVFP4), (0x80, NVFP4), (0xB8, NVFP4), (255, MXFP4)]
)
def test_nan_and_negative_scales_are_refused(byte: int, fmt: BlockFormat) -> None:
    weight = random_weight(fmt, 4, 64)
    weight.block_scale.view(torch.uint8)[2, 1] = byte
    with pytest.raises(ValueError, match=rf"block_scale\[2, 1\] .* 0x{byte:02X}, 1 such"):
        pack_weight(weight)


def test_shapes_that_do_not_fit_are_refused() -> None:
    good = random_weight(NVFP4, 4, 64)
    with pytest.raises(ValueError, match="K=24"):
        pack_weight(replace(good, codes=good.codes[:, :12]))
    with pytest.raises(ValueError, match=r"block_scale is \[4, 3\], needed \[4, 4\]"):
        pack_weight(replace(good, block_scale=good.block_scale[:, :3]))
    with pytest.raises(ValueError, match=r"global_scale is \[1\], needed \[4\]"):
        pack_weight(replace(good, global_scale=torch.ones(1)))
