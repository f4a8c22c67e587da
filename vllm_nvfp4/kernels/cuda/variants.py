# SPDX-License-Identifier: Apache-2.0
"""The forms of 8-bit activations that the GEMM kernels come in."""

# Of the 8-bit kernel: "f16_partials" rounds sums of blocks to f16 (at most 5e-4 relative) and runs
# at the f16 accumulator's rate, twice the other on GeForce cards. "folded" rounds each weight times
# its block scale to e4m3 (2 to 4 % of a row) and spends half of the issue slots, which are what
# limits the exact one where FP8 MMA runs at its full rate: L40S, L4, RTX 6000 Ada. "int8" has
# activations in INT8 with a scale per token and 64 columns, which are finer, and needs no FP8
# tensor cores. "auto" is the faster one of "exact" and "int8" (dispatch.resolve_variant).
VARIANTS = ("auto", "exact", "int8", "f16_partials", "folded")


def stem_8(variant: str) -> str:
    """The source in csrc/ of a variant's kernel."""
    return "gemm_w4i8" if variant == "int8" else "gemm_w4a8"


def check_variant(variant: str) -> None:
    """Raise ValueError for a variant that there is not."""
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; needs one of {', '.join(VARIANTS)}")


def variant_of(fmt_name: str, variant: str) -> str:
    """The variant that runs a format: MXFP4's scales leave e4m3's range and are never folded.

    variant: one of ``VARIANTS``, but "auto", which depends on the GPU
        (:func:`dispatch.resolve_variant`)
    """
    check_variant(variant)
    return "exact" if (fmt_name, variant) == ("mxfp4", "folded") else variant
