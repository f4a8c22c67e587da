# SPDX-License-Identifier: Apache-2.0
"""The first product to try on a new GPU: FP8 operands below e4m3's normal numbers.

The W4A8 kernels hand E2M1 codes to FP8 MMA times 2^-6, so that 0.5 arrives as 2^-7, a subnormal;
an activation may be one as well. PTX does not say what an MMA makes of subnormals. If a GPU took
them for zeros, every other check of these kernels would fail in ways that are hard to read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_nvfp4.numerics.codes import pack_codes
from vllm_nvfp4.numerics.formats import BlockFormat
from vllm_nvfp4.numerics.weight import BlockScaledWeight

_ROWS, _COLS = 16, 64
_CODE_OF_HALF = 1
# e4m3's least normal number is 2^-6, its least number 2^-9.
_EXPONENTS = tuple(range(-9, 1))


@dataclass(frozen=True)
class SubnormalCase:
    """y = a @ w^T with w = 0.5 and a = 2^e, one token for each e from -9 to 0.

    weight:   [16, 64], code 0.5 everywhere, all scales 1
    a:        [10, 64] float8_e4m3fn
    a_scale:  [10] float32, ones
    expected: [10, 16] float64, 64 * 0.5 * 2^e: exact in every step of every variant that multiplies
              codes (not of "folded", whose weights are no subnormals here)
    """

    weight: BlockScaledWeight
    a: torch.Tensor
    a_scale: torch.Tensor
    expected: torch.Tensor

    def problems(self, y: torch.Tensor) -> list[str]:
        """What a GPU's [10, 16] result says about it; empty where subnormals keep their value."""
        y = y.detach().cpu().double()
        if torch.equal(y, self.expected):
            return []
        is_normal = torch.tensor([e >= -6 for e in _EXPONENTS])
        if not y.any():
            return ["FP8 MMA takes subnormal weights for zeros: W4A8 loses the code 0.5"]
        if torch.equal(y[is_normal], self.expected[is_normal]) and not y[~is_normal].any():
            return ["FP8 MMA takes subnormal activations for zeros: those below 2^-6 are lost"]
        wrong = (y != self.expected).any(dim=1).nonzero().flatten().tolist()
        return [
            f"a = 2^{_EXPONENTS[i]}, w = 0.5: y = {y[i].tolist()}, not {self.expected[i, 0]}"
            for i in wrong
        ]


def subnormal_case(fmt: BlockFormat) -> SubnormalCase:
    """The case in one of the two formats, on the CPU."""
    codes = torch.full((_ROWS, _COLS), _CODE_OF_HALF, dtype=torch.uint8)
    blocks = _ROWS, _COLS // fmt.block_size
    if fmt.scale_type == "e4m3":
        scale = torch.ones(blocks).to(torch.float8_e4m3fn)
    else:
        scale = torch.full(blocks, 127, dtype=torch.uint8)
    values = 2.0 ** torch.tensor(_EXPONENTS, dtype=torch.float64)
    return SubnormalCase(
        BlockScaledWeight(pack_codes(codes), scale, torch.ones(_ROWS), fmt),
        values.float()[:, None].expand(-1, _COLS).to(torch.float8_e4m3fn),
        torch.ones(len(_EXPONENTS)),
        (_COLS * 0.5 * values)[:, None].expand(-1, _ROWS),
    )
