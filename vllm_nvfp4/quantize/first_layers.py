# SPDX-License-Identifier: Apache-2.0
"""The first layers of a decoder, built for real of one on the meta device: what no checkpoint holds
is there, rotary tables and the like."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch


def first_layers(decoder: Any) -> Any:
    """The decoder with its first layer alone, in float32, and with the second where layers have
    what no checkpoint holds. Parameters hold nothing yet."""
    config = copy.deepcopy(decoder.config)
    are_compared = any(unstored(layer) for layer in decoder.layers)
    config.num_hidden_layers = min(1 + are_compared, len(decoder.layers))
    kind = "sdpa" if decoder._supports_sdpa else "eager"
    built = type(decoder)._from_config(config, attn_implementation=kind, dtype=torch.float32)
    whole = {n: p for n, p in decoder.named_parameters() if not n.startswith("layers.")}
    for name, parameter in built.named_parameters():
        # A table with a part for each layer, as Gemma has for inputs of its layers.
        if name in whole and parameter.shape != whole[name].shape:
            parameter.data = parameter.data.new_empty(whole[name].shape)
    return built


def common_tables(layers: Iterable[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """What no checkpoint holds of a layer, by its name there, and is alike in all of these."""
    first, *others = map(unstored, layers)
    return {
        name: table
        for name, table in first.items()
        if all(name in other and torch.equal(other[name], table) for other in others)
    }


def unstored(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a checkpoint does not hold."""
    stored = module.state_dict()
    return {name: buffer for name, buffer in module.named_buffers() if name not in stored}
