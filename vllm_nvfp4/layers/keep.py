# SPDX-License-Identifier: Apache-2.0
"""Which layers of a 16-bit model stay as they are, when it is quantised while it loads.

The rule is checkpoints/online.py's; what it asks is answered here by what vLLM builds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from operator import attrgetter
from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    ReplicatedLinear,
    UnquantizedLinearMethod,
)

from vllm_nvfp4.checkpoints.online import TOWERS, is_in_stack, why_in_16_bits
from vllm_nvfp4.compat import versions
from vllm_nvfp4.layers.linear import NvFp4OnlineLinearMethod
from vllm_nvfp4.numerics.formats import BlockFormat

logger = init_logger(f"vllm.{__name__}")


@dataclass
class Kept:
    """What a model's layers became: for the one line about them.

    kept:      why -> layers in 16 bits
    weights:   elements of the linear layers, quantised and kept
    """

    num_quantized: int = 0
    quantized_weights: int = 0
    kept_weights: int = 0
    kept: Counter[str] = field(default_factory=Counter)

    def note_quantized(self, num_weights: int, num_layers: int = 1) -> None:
        self.num_quantized += num_layers
        self.quantized_weights += num_weights

    def note_kept(self, why: str, num_weights: int) -> None:
        self.kept[why] += 1
        self.kept_weights += num_weights

    def line(self, fmt: str) -> str:
        """The summary. Shares are of the weights of linear layers."""
        total = max(self.quantized_weights + self.kept_weights, 1)
        why = ", ".join(f"{count} {reason}" for reason, count in self.kept.most_common())
        return (
            f"{self.num_quantized} linear layers are quantised to {fmt} while they load, "
            f"{sum(self.kept.values())} stay in 16 bits ({100 * self.kept_weights / total:.1f} % "
            f"of their weights{': ' + why if why else ''})"
        )


def why_kept(layer: Any, prefix: str, model_config: Any) -> str | None:
    """Why a linear layer stays in 16 bits, in a word or two, or None where it is quantised.

    layer:        vLLM's, without its weight yet
    model_config: vLLM's, of the model that is built; None where it is not known

    Towers are not known yet when their layers are built: see :func:`keep_towers`.
    """
    is_router = versions.is_router(layer) or (
        isinstance(layer, ReplicatedLinear) and layer.output_size in _num_experts(model_config)
    )
    return why_in_16_bits(
        layer.output_size,
        layer.input_size,
        getattr(_text_config(model_config), "hidden_size_per_layer_input", None) or 0,
        is_router=is_router,
        is_in_stack=is_in_stack(prefix),
    )


def has_odd_size(fmt: BlockFormat, prefix: str, input_sizes: Sequence[int]) -> bool:
    """Whether the blocks of a format cannot cut a layer's inputs, which is said."""
    odd = [size for size in input_sizes if size % fmt.block_size]
    if odd:
        logger.warning(
            "nvfp4: %s stays in 16 bits: its input size %d is no multiple of %s's block of %d",
            *(prefix, odd[0], fmt.name, fmt.block_size),
        )
    return bool(odd)


def plain_method(why: str) -> LinearMethodBase:
    """vLLM's own method for a layer that stays in 16 bits, with the reason for whoever asks."""
    method: Any = UnquantizedLinearMethod()
    method.nvfp4_why_kept = why
    return method


def _text_config(model_config: Any) -> Any:
    return getattr(model_config, "hf_text_config", None)


def _num_experts(model_config: Any) -> set[int]:
    """Outputs that a router has: one for each expert, those without weights too."""
    number = getattr(model_config, "get_num_experts", int)()
    zero = getattr(_text_config(model_config), "zero_expert_num", None)
    return {number, number + (zero if isinstance(zero, int) else 0)} - {0}


def keep_towers(model: Any, kept: Kept) -> None:
    """Take back the quantising of every layer in the encoders and connectors that vLLM has marked
    in the model."""
    for name in getattr(model, "_tower_model_names", ()):
        for layer in attrgetter(name)(model).modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, NvFp4OnlineLinearMethod):
                num_weights = prod(layer.weight.shape)
                method.give_back(layer, plain_method(TOWERS))
                kept.note_quantized(-num_weights, -1)
                kept.note_kept(TOWERS, num_weights)
