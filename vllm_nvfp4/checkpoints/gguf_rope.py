# SPDX-License-Identifier: Apache-2.0
"""The scaling of rotary positions in a GGUF file, which transformers leaves out as it reads one.

Llama 3's is the tensor rope_freqs.weight, float32 [d/2], that divides the frequencies of a head's
d elements; others stand in ``rope.scaling.type`` and beside it. Source: llama.cpp's
conversion/llama.py; transformers' modeling_rope_utils (llama3).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_nvfp4.checkpoints.spec import CheckpointError

if TYPE_CHECKING:
    from gguf import GGUFReader

_FACTORS = "rope_freqs.weight"
# Of every Llama from 3.1 on; the factor is the tensor's largest value.
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# The numbers of a scaling: a file's key -> transformers'.
_NUMBERS = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_attn_factor": "attention_factor",
}


def add_rope_scaling(gguf: Path, reader: GGUFReader, folder: Path) -> None:
    """Write the scaling of a GGUF file to the folder's config.json: Llama 3's, or of the type that
    the model's family has by default (gpt-oss). Raises CheckpointError for another, with which
    every position would be wrong."""
    import numpy as np

    architecture = reader.fields["general.architecture"].contents()
    begin = f"{architecture}.rope.scaling."
    stated = {
        key.removeprefix(begin): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(begin)
    }
    kind = stated.pop("type", "none")
    if kind != "none":
        _add_of_family(gguf, begin, kind, stated, folder / "config.json")
        return
    factors = next((t.data for t in reader.tensors if t.name == _FACTORS), None)
    if factors is None or (factors == 1).all():
        return
    path = folder / "config.json"
    config = json.loads(path.read_text())
    old = config.get("rope_parameters") or {}
    theta = old.get("rope_theta") or config.get("rope_theta") or 10000.0
    scaling = {**_LLAMA3, "factor": float(factors.max()), "rope_theta": theta}
    if not np.allclose(factors.reshape(-1), llama3_factors(scaling, 2 * factors.size), rtol=1e-4):
        raise _refusal(gguf, _FACTORS, "other factors than Llama 3's")
    config["rope_parameters" if old else "rope_scaling"] = scaling
    path.write_text(json.dumps(config, indent=2) + "\n")


def _add_of_family(gguf: Path, begin: str, kind: str, stated: dict[str, Any], path: Path) -> None:
    """What a file does not state, as whether YaRN's bounds are whole numbers, is the family's."""
    from transformers import CONFIG_MAPPING

    config = json.loads(path.read_text())
    usual = getattr(CONFIG_MAPPING[config["model_type"]](), "rope_parameters", None) or {}
    if usual.get("rope_type") != kind:
        raise _refusal(gguf, f"{begin}type", kind)
    stated.pop("finetuned", None)
    if unknown := stated.keys() - _NUMBERS.keys():
        raise _refusal(gguf, begin + min(unknown), stated[min(unknown)])
    own = config.get("rope_parameters") or {}
    own = {"rope_theta": own["rope_theta"]} if "rope_theta" in own else {}
    numbers = {_NUMBERS[key]: value for key, value in stated.items()}
    config["rope_parameters"] = {**usual, **own, **numbers}
    path.write_text(json.dumps(config, indent=2) + "\n")


def llama3_factors(scaling: dict[str, Any], head_size: int) -> list[float]:
    """1 for short waves, ``factor`` for long ones, and in between what makes the frequency go over
    from the one to the other in a straight line."""
    factor, length = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    found = []
    for i in range(0, head_size, 2):
        turns = length / (2 * math.pi * scaling["rope_theta"] ** (i / head_size))
        share = min(max((turns - low) / (high - low), 0), 1)
        found.append(1 / ((1 - share) / factor + share))
    return found


def _refusal(gguf: Path, what: str, found: str) -> CheckpointError:
    needed = (
        "none, Llama 3's or the family's own: transformers leaves scalings of rotary positions out"
    )
    return CheckpointError(str(gguf), what, found, needed, "Start from the model's safetensors.")
