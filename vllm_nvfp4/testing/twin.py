# SPDX-License-Identifier: Apache-2.0
"""A model's folder with the weights that an engine holds in fewer bits, dequantised."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

_SAME_ROW = 0.97  # cosine; NVFP4 leaves about 0.995, unrelated rows of 32 are below 0.9
_SAME_LENGTH = 0.15


def write_twin(folder: Path, matrices: Iterable[torch.Tensor], target: Path) -> int:
    """The folder's model with each row that was quantised replaced by what became of it, float32.

    matrices: [N, K], dequantised. Returns how many rows of them are nowhere in the file.
    """
    from safetensors.torch import load_file, save_file

    by_width: dict[int, list[torch.Tensor]] = defaultdict(list)
    for matrix in matrices:
        by_width[matrix.shape[1]].append(matrix.float())
    rows = {width: torch.cat(parts) for width, parts in by_width.items()}
    used = {width: torch.zeros(len(r), dtype=torch.bool) for width, r in rows.items()}
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        value = tensor.float() if tensor.is_floating_point() else tensor
        if tensor.is_floating_point() and tensor.dim() >= 2:
            # Some models store a matrix, or a stack of them, turned.
            value = _replace(value, rows, used)
            value = _replace(value.mT.contiguous(), rows, used).mT
        state[name] = value.contiguous()
    target.mkdir(parents=True, exist_ok=True)
    save_file(state, str(target / "model.safetensors"), metadata={"format": "pt"})
    for path in folder.glob("*.json"):
        shutil.copy(path, target / path.name)
    config = json.loads((target / "config.json").read_text())
    _declare_float32(config)
    (target / "config.json").write_text(json.dumps(config))
    return sum(int((~u).sum()) for u in used.values())


def _declare_float32(config: Any) -> None:
    if isinstance(config, dict):
        for key, value in config.items():
            if key in ("dtype", "torch_dtype"):
                config[key] = "float32"
            _declare_float32(value)


def _replace(
    value: torch.Tensor, rows: Mapping[int, torch.Tensor], used: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    width = value.shape[-1]
    if width not in rows:
        return value
    flat, found = value.reshape(-1, width).clone(), rows[width]
    norms, found_norms = flat.norm(dim=1), found.norm(dim=1)
    similar = flat @ found.T / (norms[:, None] * found_norms).clamp(min=1e-12)
    best, index = similar.max(1)
    length = (found_norms[index] / norms.clamp(min=1e-12) - 1).abs()
    is_same = (best > _SAME_ROW) & (length < _SAME_LENGTH)
    flat[is_same] = found[index[is_same]]
    used[width][index[is_same]] = True
    return flat.view_as(value)
