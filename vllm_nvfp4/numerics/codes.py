# SPDX-License-Identifier: Apache-2.0
"""E2M1 codes: encode, decode, pack two to a byte. Bit-exact and on any device."""

from __future__ import annotations

import torch

from vllm_nvfp4.numerics.formats import E2M1_VALUES

# Midpoints between neighbouring magnitudes. Round-to-nearest-even sends a tie to the code whose
# mantissa bit is 0, so a tie at .25, 1.25, 2.5, 5 goes down and one at .75, 1.75, 3.5 goes up.
_TIES_DOWN = (0.25, 1.25, 2.5, 5.0)
_TIES_UP = (0.75, 1.75, 3.5)


def encode_e2m1(x: torch.Tensor) -> torch.Tensor:
    """code = the E2M1 value nearest to x, ties to even, saturating at 6.

    x: any shape, floating point. Returns uint8 of the same shape, one code (0..15) per element;
    bit 3 is the sign and is kept for zero. NaN encodes as the largest magnitude.
    """
    x = x.float()
    magnitude = x.abs()
    code = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for bound in _TIES_DOWN:
        code += magnitude > bound
    for bound in _TIES_UP:
        code += magnitude >= bound
    code = torch.where(magnitude.isnan(), 7, code).to(torch.uint8)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


# Adding and subtracting 1.5 * 2^23 * step rounds a float32 to a multiple of step, ties to even.
_ROUND_TO_INTEGER = 1.5 * 2.0**23


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """decode(encode(x)) without the codes: the E2M1 value nearest to x, ties to even.

    x: any shape, float32, finite. The spacing is half the power of two below |x|, at least 0.5 and
    at most 2; at each spacing the even multiples are the values with mantissa bit 0.
    """
    power_of_two = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    bias = power_of_two.mul_(_ROUND_TO_INTEGER / 2)
    bias.clamp_(_ROUND_TO_INTEGER / 2, _ROUND_TO_INTEGER * 2)
    return x.clamp(-6.0, 6.0).add_(bias).sub_(bias).copysign_(x)


def round_e2m1_(x: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """:func:`round_e2m1` in place, for steps so small that new memory is most of their cost; a zero
    loses its sign. scratch: like x, overwritten. Returns x."""
    torch.bitwise_and(x.view(torch.int32), 0x7F800000, out=scratch.view(torch.int32))
    bias = scratch.mul_(_ROUND_TO_INTEGER / 2)
    bias.clamp_(_ROUND_TO_INTEGER / 2, _ROUND_TO_INTEGER * 2)
    return x.clamp_(-6.0, 6.0).add_(bias).sub_(bias)


def decode_e2m1(codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """value = E2M1(code). codes: uint8 (0..15), any shape; exact in every floating type."""
    magnitudes = torch.tensor(E2M1_VALUES, dtype=dtype, device=codes.device)
    table = torch.cat([magnitudes, -magnitudes])
    return table[codes.long()]


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """byte[n, j] = code[n, 2j] | code[n, 2j+1] << 4. codes: [..., K] uint8 -> [..., K/2] uint8."""
    if codes.shape[-1] % 2:
        raise ValueError(f"pack_codes: the last dimension is {codes.shape[-1]}, needs to be even")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`pack_codes`: [..., K/2] uint8 -> [..., K] uint8."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
