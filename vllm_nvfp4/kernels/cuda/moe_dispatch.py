# SPDX-License-Identifier: Apache-2.0
"""Which grouped kernel runs routed experts: a pure function of the GPU, the shape and the options.

The tile is not chosen here but on the GPU, for each expert by its own number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_nvfp4.gpus import Gpu
from vllm_nvfp4.kernels.cuda import dispatch
from vllm_nvfp4.kernels.cuda.moe_configs import DECODE_TOKENS, MOE_CONFIGS, MoeConfig


@dataclass(frozen=True)
class MoeShape:
    """One layer of experts, as the checkpoint has it.

    num_experts: of all ranks; num_choices: top-k
    """

    num_experts: int
    num_choices: int
    hidden_size: int
    intermediate_size: int
    is_gated: bool = True


def choose_moe(
    gpu: Gpu, num_tokens: int, shape: MoeShape, fmt_name: str, dtype: str,
    activation: str = "auto", variant: str = "exact",
) -> MoeConfig:  # fmt: skip
    """The kernel for both products of a layer.

    dtype:      "bf16" or "fp16"
    activation: "auto", "16" or "8"
    variant:    one of ``variants.VARIANTS``: "int8", or else exact FP8
    Raises ValueError for another activation, or for FP8 on a GPU without it.
    """
    variant = moe_variant(gpu, variant)
    bits = choose_moe_bits(gpu, num_tokens, shape, fmt_name, activation, variant)
    family = "decode" if bits == 16 and num_tokens <= DECODE_TOKENS else "prefill"
    stem = "moe_w4i8" if bits == 8 and variant == "int8" else f"moe_w4a{bits}"
    wanted = (stem, family, fmt_name, dtype)
    found = [c for c in MOE_CONFIGS if (c.stem, c.family, c.fmt_name, c.dtype) == wanted]
    if not found:
        raise ValueError(f"experts in {fmt_name} with activations of {dtype}: there is no kernel")
    return found[0]


def choose_moe_bits(
    gpu: Gpu, num_tokens: int, shape: MoeShape, fmt_name: str, activation: str = "auto",
    variant: str = "exact",
) -> int:  # fmt: skip
    """16 or 8: 8 where an expert has as many tokens, on average, as the switch of a dense product
    of all experts' rows."""
    rows = shape.intermediate_size * (2 if shape.is_gated else 1)
    per_expert = num_tokens * shape.num_choices / shape.num_experts
    # Rows of hidden_size that are quantised for each token of an expert: the tokens, which their
    # choices share, and what stands between the products; over both products' weights.
    quantized = 1 / shape.num_choices + shape.intermediate_size / shape.hidden_size
    quantized *= shape.num_experts * rows / (rows + shape.intermediate_size)
    return dispatch.choose_activation_bits(
        gpu, per_expert, rows * shape.num_experts, shape.hidden_size, fmt_name, activation,
        moe_variant(gpu, variant), quantized,
    )  # fmt: skip


def moe_variant(gpu: Gpu, variant: str) -> str:
    """ "int8" or "exact": experts know no other variant of 8 bits."""
    return "int8" if dispatch.resolve_variant(gpu, variant) == "int8" else "exact"
