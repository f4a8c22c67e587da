# SPDX-License-Identifier: Apache-2.0
"""The one in-memory form of a microscaled weight, whatever dialect it came from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_nvfp4.numerics.codes import decode_e2m1, unpack_codes
from vllm_nvfp4.numerics.formats import E4M3_MAX, E8M0_BIAS, BlockFormat


def decode_block_scale(
    block_scale: torch.Tensor, fmt: BlockFormat, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Block scales as numbers. E4M3 is taken as it is; E8M0 byte e means 2^(e-127), 255 is NaN.

    block_scale: float8_e4m3fn or its uint8 bits (e4m3), or uint8 (e8m0); any shape.
    """
    if fmt.scale_type == "e4m3":
        return block_scale.view(torch.float8_e4m3fn).to(dtype)
    exponent = block_scale.view(torch.uint8).to(torch.int32) - E8M0_BIAS
    value = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)
    return torch.where(exponent == 255 - E8M0_BIAS, torch.nan, value).to(dtype)


@dataclass(frozen=True)
class BlockScaledWeight:
    """w[n, k] = E2M1(code[n, k]) * block_scale[n, k // block_size] * global_scale[n]

    codes:        [N, K/2] uint8, row-major; the low nibble holds even k
    block_scale:  [N, K/block_size] float8_e4m3fn (NVFP4) or uint8 E8M0 (MXFP4); multiplies
    global_scale: [N] float32; multiplies. One per output row, so that the shards of a fused layer
                  (q/k/v, gate/up) each keep their own multiplier exactly.
    """

    codes: torch.Tensor
    block_scale: torch.Tensor
    global_scale: torch.Tensor
    fmt: BlockFormat

    @property
    def num_rows(self) -> int:
        return self.codes.shape[0]

    @property
    def num_cols(self) -> int:
        return self.codes.shape[1] * 2

    def rows(self, index: torch.Tensor) -> BlockScaledWeight:
        """The chosen rows, in that order. index: [R] int64"""
        scale = self.block_scale
        return BlockScaledWeight(
            self.codes[index],
            scale.view(torch.uint8)[index].view(scale.dtype),  # FP8 has no indexing of its own
            self.global_scale[index],
            self.fmt,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as numbers, [N, K]. Products are formed in float64 and rounded once."""
        value = decode_e2m1(unpack_codes(self.codes), torch.float64)
        scale = decode_block_scale(self.block_scale, self.fmt, torch.float64)
        value = value.view(self.num_rows, -1, self.fmt.block_size) * scale[..., None]
        return (value.flatten(1) * self.global_scale.double()[:, None]).to(dtype)


def raise_block_scales(weight: BlockScaledWeight) -> BlockScaledWeight:
    """The same NVFP4 weight with the block scales of each row as large as E4M3 allows:

    block_scale[n, b] * 2^r[n] and global_scale[n] / 2^r[n],
    r[n] = floor(log2(448 / max over b of block_scale[n, b]))

    Nothing is rounded: scaling up by a power of two only moves exponents, out of the subnormal
    numbers where it meets them. A row of zeros stays as it is.
    """
    scale = weight.block_scale.view(torch.float8_e4m3fn).float()
    largest = scale.amax(1)
    # frexp: x = mantissa * 2^exponent with mantissa in [0.5, 1): floor(log2(x)) = exponent - 1.
    _, exponent = torch.frexp(torch.full_like(largest, E4M3_MAX) / largest)
    power = torch.where(largest > 0, exponent - 1, 0)
    factor = torch.ldexp(torch.ones_like(largest), power)
    return BlockScaledWeight(
        weight.codes,
        (scale * factor[:, None]).to(torch.float8_e4m3fn),
        weight.global_scale / factor,
        weight.fmt,
    )
