# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights of the architectures that vLLM serves, in the hub's layout.

``tiny_models`` has the few that the tests share; this is the table of `make models`, one entry for
each model class: ``decoders`` has those of text alone, ``multimodal`` the others. A configuration
of transformers makes the model, so the files have the names and stacks that the hub's have.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vllm_nvfp4.testing.architecture import Architecture
from vllm_nvfp4.testing.checkpoints import edit_json, edit_tensors
from vllm_nvfp4.testing.decoders import DECODERS
from vllm_nvfp4.testing.drafts import add_layer_past_the_end, add_mtp, add_nemotron_mtp
from vllm_nvfp4.testing.multimodal import MULTIMODAL
from vllm_nvfp4.testing.tiny_models import build_tokenizer

# In the order of how much users talk of them; all others follow by name.
RANKED = (
    "qwen3.5", "qwen3.5-moe", "gemma4-moe", "gemma4", "nemotron-h-moe", "gpt-oss", "qwen3-moe",
    "qwen3", "glm4-moe-lite", "mistral3", "llama", "qwen3-vl", "qwen2.5-vl", "qwen3-vl-moe",
    "granite4-moe", "falcon-h1", "lfm2-moe", "hunyuan-moe", "llama4", "deepseek-v2",
    "deepseek-v3", "gemma3n", "jamba", "minimax-m2", "kimi-linear", "qwen2-vl",
    "internvl", "glm4v", "glm4v-moe", "smolvlm", "llava",
)  # fmt: skip

_ROWS = {a.name: a for a in DECODERS + MULTIMODAL}
ARCHITECTURES = {name: _ROWS[name] for name in (*RANKED, *sorted(_ROWS.keys() - set(RANKED)))}


@dataclass(frozen=True)
class Draft:
    """How a model gets a head for multi-token prediction.

    settings: edits config.json; add: adds the tensors; method: of vLLM's speculative_config
    """

    settings: Callable[[dict[str, Any]], Any]
    add: Callable[[dict[str, Any]], Any]
    method: str = "mtp"


def _has_mtp(config: dict[str, Any]) -> None:
    config.get("text_config", config)["mtp_num_hidden_layers"] = 1


def _has_layer_past_the_end(config: dict[str, Any]) -> None:
    config["num_nextn_predict_layers"] = 1


def _has_nemotron_head(config: dict[str, Any]) -> None:
    _has_layer_past_the_end(config)
    # vLLM gives the head's first projection this type, whatever the engine's is.
    config["dtype"] = "float32"


_AFTER_LAYER_1 = Draft(_has_layer_past_the_end, partial(add_layer_past_the_end, last=1))
DRAFTS = {
    "qwen3.5": Draft(_has_mtp, partial(add_mtp, layer="model.language_model.layers.3.")),
    "qwen3.5-moe": Draft(_has_mtp, partial(add_mtp, layer="model.language_model.layers.3.")),
    "qwen3-next": Draft(_has_mtp, partial(add_mtp, layer="model.layers.3.")),
    "glm4-moe": _AFTER_LAYER_1,
    "deepseek-v3": _AFTER_LAYER_1,
    "nemotron-h-moe": Draft(
        _has_nemotron_head,
        partial(add_nemotron_mtp, attention="backbone.layers.2.", experts="backbone.layers.3."),
    ),
}
# One of each kind.
_FEATURED: dict[str, tuple[str, ...]] = {
    "qwen3": ("TP 2", "LoRA"),
    "qwen3-moe": ("TP 2", "LoRA"),
    "deepseek-v2": ("TP 2", "LoRA"),
    "nemotron-h-moe": ("TP 2", "LoRA", "MTP"),
    "granite4-moe": ("TP 2", "LoRA"),
    "qwen3-next": ("TP 2", "LoRA", "MTP"),
    "qwen3.5": ("TP 2", "LoRA", "MTP"),
    "qwen3.5-moe": ("MTP",),
    "zamba2": ("TP 2",),
    "glm4-moe": ("MTP",),
    "deepseek-v3": ("MTP",),
}


def features(name: str) -> tuple[str, ...]:
    """What else is tried with an architecture: of sweep_features.FEATURES."""
    return (*(("gptq",) if name in RANKED else ()), *_FEATURED.get(name, ()))


def write_architecture(
    folder: Path, architecture: Architecture, seed: int = 0, is_own: bool = False
) -> Path:
    """Write the model, BF16, as transformers saves it; returns the folder. is_own: with the names
    and stacks of transformers' class"""
    import torch
    import transformers

    config = getattr(transformers, architecture.config)(**architecture.keys)
    torch.manual_seed(seed)
    model = getattr(transformers, architecture.auto).from_config(config)
    _draw(model, torch.Generator().manual_seed(seed))
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder, save_original_format=not is_own)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if architecture.kind == "encoder":
        build_tokenizer().save_pretrained(folder)
    if architecture.written:
        written = [architecture.written]
        edit_json(folder / "config.json", lambda config: config.update(architectures=written))
    if not is_own and (architecture.rename or architecture.turned):
        edit_tensors(folder, lambda tensors: _to_hub(tensors, architecture))
    return folder


def _to_hub(tensors: dict[str, Any], architecture: Architecture) -> None:
    pattern, replacement = architecture.rename or ("$^", "")
    for name in list(tensors):
        tensor = tensors.pop(name)
        if architecture.turned and re.search(architecture.turned, name):
            tensor = tensor.mT
        tensors[re.sub(pattern, replacement, name)] = tensor


def _draw(model: Any, generator: Any) -> None:
    """Random weights that keep activations of order one; what is no matrix stays near its own."""
    import torch

    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            is_matrix = parameter.dim() >= 2 and "conv1d" not in name and "A_log" not in name
            if is_matrix and parameter.numel() > parameter.shape[0]:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            elif name.endswith("bias") or "bias" in name.rpartition(".")[2]:
                parameter.copy_(0.05 * noise)
            elif "norm" in name:
                parameter.add_(0.05 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.copy_(0.05 * torch.randn(buffer.shape, generator=generator))
