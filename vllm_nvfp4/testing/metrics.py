# SPDX-License-Identifier: Apache-2.0
"""How far a result is from its float64 reference, and where."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_nvfp4.numerics.reference import reference_linear, rounded_activations
from vllm_nvfp4.numerics.weight import BlockScaledWeight

# Half a unit in the last place of a result rounded to nearest: 2^-p for p significant bits.
UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}

# The f32 accumulators of mma.sync lose at most about one unit in the last place (2^-23) of the
# running sum per MMA of 16 k; twice that leaves room for the final reduction.
_F32_MMA_LOSS = 2.0**-22
# Ada's FP8 MMA aligns the 16 products of a block to the largest, keeps 13 fractional bits and
# truncates: each of them loses less than 2^-13 of the largest, together less than 2^-9 of the
# block's absolute sum. (On random data it is about 1e-5.) Source: MMA-Sim's bit-exact model.
_FP8_MMA_LOSS = 2.0**-9
_FOLDED_CHAIN = 128  # products of one chain: the longest K step of the variant "folded"


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    """||y - reference|| / ||reference||, Frobenius, in float64; 0 where both are empty or zero."""
    difference = (y.double() - reference.double()).norm()
    norm = reference.double().norm()
    return float(difference / norm) if norm > 0 else float(difference)


def linear_tolerance(
    a: torch.Tensor,
    weight: BlockScaledWeight,
    reference: torch.Tensor,
    activation_bits: int = 16,
    variant: str = "exact",
) -> torch.Tensor:
    """tolerance[m, n] = u_out * |reference| + loss * sum_k |a[m, k]| |w[n, k]|

    u_out is the unit roundoff of a's dtype, and ``loss`` what the accumulator of the MMA can lose:
    K/16 f32 additions for 16-bit activations; for 8 bits one FP8 accumulator of 16 products and
    then f32 additions; the variant "f16_partials" rounds each of those sums to f16 besides, and may
    add up to four in f16 before they go on in f32; "folded" chains the accumulator over 128
    products; "int8" has exact sums of blocks, and rounds four times in a group of 64 columns and
    twice for each group. Subnormal outputs add half of the smallest step.
    """
    if activation_bits == 8:
        a_abs = rounded_activations(a, variant).abs()
        loss = 0.0 if variant == "int8" else _FP8_MMA_LOSS
        if variant == "f16_partials":
            loss += 5 * UNIT_ROUNDOFF[torch.float16]
        if variant == "folded":
            loss *= _FOLDED_CHAIN // 16
    else:
        a_abs, loss = a.double().abs(), 0.0
    if variant == "int8":
        # And a multiplier or two at the end, and warps or splits that are added.
        loss += (a.shape[1] // 64 + 24) * UNIT_ROUNDOFF[torch.float32]
    else:
        loss += max(a.shape[1] // 16, 1) * _F32_MMA_LOSS
    # Folding rounds a weight by at most 1/16: within the room that its loss leaves.
    absolute_sum = a_abs @ weight.dequantize(torch.float64).abs().T
    smallest = torch.finfo(a.dtype).smallest_normal * UNIT_ROUNDOFF[a.dtype]
    return UNIT_ROUNDOFF[a.dtype] * reference.abs() + loss * absolute_sum + smallest


@dataclass(frozen=True)
class Comparison:
    """The outcome of :func:`compare`.

    relative_error: Frobenius, of the whole
    worst:          largest |error| / tolerance; the comparison passes at 1 or less
    num_wrong:      elements outside their tolerance, NaN and infinity among them
    report:         text: the figures and the first mismatches with their indices
    """

    relative_error: float
    worst: float
    num_wrong: int
    report: str

    @property
    def is_match(self) -> bool:
        return self.num_wrong == 0


def compare(
    y: torch.Tensor, reference: torch.Tensor, tolerance: torch.Tensor, num_shown: int = 8
) -> Comparison:
    """Compare element by element. y, reference, tolerance: one shape; any dtype and device.

    A reference beyond y's range, where rounding gives infinity, must come out as the infinity of
    its sign.
    """
    if y.shape != reference.shape:
        raise ValueError(f"compare: y is {list(y.shape)}, the reference {list(reference.shape)}")
    # Half a step beyond the largest finite number is where rounding turns to infinity.
    limit = torch.finfo(y.dtype).max * (1 + UNIT_ROUNDOFF[y.dtype] / 2)
    y64 = y.detach().double()
    expected = reference.double()
    overflows = expected.abs() + tolerance >= limit
    error = torch.where(overflows & (y64 == expected.sign() * torch.inf), 0.0, y64 - expected)
    ratio = (error.abs() / tolerance).nan_to_num(nan=torch.inf, posinf=torch.inf)
    wrong = ~(ratio <= 1)
    num_wrong = int(wrong.sum())
    worst = float(ratio.max()) if ratio.numel() else 0.0
    total = relative_error(y64, expected)
    lines = [f"relative error {total:.3e}, worst {worst:.3g} x tolerance, {num_wrong} wrong"]
    for index in wrong.nonzero()[:num_shown].tolist():
        at = tuple(index)
        lines.append(
            f"  {index}: got {float(y64[at]):.6g}, expected {float(expected[at]):.6g} "
            f"+- {float(tolerance[at]):.2g}"
        )
    return Comparison(total, worst, num_wrong, "\n".join(lines))


def compare_linear(
    y: torch.Tensor,
    a: torch.Tensor,
    weight: BlockScaledWeight,
    bias: torch.Tensor | None = None,
    activation_bits: int = 16,
    variant: str = "exact",
) -> Comparison:
    """Compare a linear layer's output with the float64 product of its (quantised) activations.

    y: [M, N]; a: [M, K]; bias: [N] or None; activation_bits: 16 or 8; variant: of the 8-bit kernel
    """
    reference = reference_linear(a, weight, bias, activation_bits, variant)
    tolerance = linear_tolerance(a, weight, reference, activation_bits, variant)
    return compare(y, reference, tolerance)
