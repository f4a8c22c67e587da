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
