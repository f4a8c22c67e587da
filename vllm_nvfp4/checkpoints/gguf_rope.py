# SPDX-License-Identifier: Apache-2.0
"""The scaling of rotary positions in a GGUF file, which transformers leaves out as it reads one.

Llama 3's is the tensor rope_freqs.weight, float32 [d/2], that divides the frequencies of a head's
d elements; others stand in ``rope.scaling.type``. Source: llama.cpp's conversion/llama.py;
transformers' modeling_rope_utils (llama3).
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


def add_rope_scaling(gguf: Path, reader: GGUFReader, folder: Path) -> None:
    """Write Llama 3's scaling to the folder's config.json where the GGUF file has it. Raises
    CheckpointError for another, with which every position would be wrong."""
    import numpy as np

    architecture = reader.fields["general.architecture"].contents()
    kind = reader.fields.get(f"{architecture}.rope.scaling.type")
    name = "none" if kind is None else kind.contents()
    if name != "none":
        raise _refusal(gguf, f"{architecture}.rope.scaling.type", name)
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
    needed = "none, or Llama 3's: transformers reads no scaling of rotary positions from GGUF"
    return CheckpointError(str(gguf), what, found, needed, "Start from the model's safetensors.")
