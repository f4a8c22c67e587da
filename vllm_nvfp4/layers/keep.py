# SPDX-License-Identifier: Apache-2.0
"""Which layers of a 16-bit model stay as they are, when it is quantised while it loads.

Decided by what vLLM builds a layer as, by where it stands and by its sizes, not by its name:
routers, heads and projections are small against the rest and spoil more than they save.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from operator import attrgetter
from typing import Any

from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

from vllm_nvfp4.compat import versions
from vllm_nvfp4.layers.linear import NvFp4OnlineLinearMethod

# Gates of shared experts, scores of classes, coefficients of a few streams.
_FEW_OUTPUTS = 16


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
    if versions.is_router(layer):
        return "routers"
    if isinstance(layer, ReplicatedLinear) and layer.output_size in _num_experts(model_config):
        return "routers"
    if layer.output_size < _FEW_OUTPUTS:
        return "gates and scores"
    if not any(part.isdecimal() for part in prefix.split(".")):
        return "outside of the stacks"
    per_layer = getattr(_text_config(model_config), "hidden_size_per_layer_input", None)
    if per_layer and per_layer in (layer.input_size, layer.output_size):
        return "per-layer inputs"
    return None


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
                method.give_back(layer, UnquantizedLinearMethod())
                kept.note_quantized(-num_weights, -1)
                kept.note_kept("in encoders and connectors", num_weights)
