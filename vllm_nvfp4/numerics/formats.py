# SPDX-License-Identifier: Apache-2.0
"""The microscaling formats: names, block sizes, scale types and the constants that define them."""

from __future__ import annotations

from dataclasses import dataclass

# E2M1: sign, two exponent bits, one mantissa bit. Code 0b0eem -> value; bit 3 is the sign.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN_SUBNORMAL = 2.0**-9
E8M0_BIAS = 127

# Activations in INT8: symmetric, and so many columns of a row share a scale. 64 columns are a
# packed tile of the CUDA kernels.
INT8_MAX = 127.0
INT8_GROUP = 64


@dataclass(frozen=True)
class BlockFormat:
    """A microscaling weight format.

    name:        "nvfp4" or "mxfp4"
    block_size:  elements of one row that share a block scale
    scale_type:  "e4m3" (a float8_e4m3fn) or "e8m0" (a biased power of two in a uint8)
    """

    name: str
    block_size: int
    scale_type: str

    @property
    def bits_per_weight(self) -> float:
        """4-bit codes plus one 8-bit scale per block."""
        return 4 + 8 / self.block_size


NVFP4 = BlockFormat("nvfp4", 16, "e4m3")
MXFP4 = BlockFormat("mxfp4", 32, "e8m0")
FORMATS = {f.name: f for f in (NVFP4, MXFP4)}
