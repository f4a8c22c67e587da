# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's tensors mean, read by the safetensors library and computed with numpy alone.

It knows a layer by the names of its tensors and nothing of the configuration or of the loader, so
that the two can disagree.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def stored_tensors(folder: Path, files: set[str]) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(files):
        with safe_open(folder / file, "pt") as stream:
            tensors |= {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    return tensors


def quantized_weights(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray | None]:
    """module -> its weight in float64, for every module whose weight has fewer than 16 bits; None
    where its tensors are no complete layer."""
    modules: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        modules[module][leaf] = tensor
    found: dict[str, np.ndarray | None] = {}
    for module, leaves in modules.items():
        for leaf in [leaf for leaf in leaves if leaf.endswith("_proj_blocks")]:
            found[f"{module}.{leaf.removesuffix('_blocks')}"] = _stacked(leaf, leaves)
        codes = next(
            (leaves[k] for k in ("weight_packed", "qweight", "weight") if k in leaves), None
        )
        if codes is None or codes.dtype not in (torch.uint8, torch.float8_e4m3fn, torch.uint32):
            continue
        try:
            if codes.dtype == torch.uint32:
                module = module.replace(".switch_mlp.", ".experts.")
                found[module] = _of_mlx(codes, leaves)
                continue
            found[module] = _weight(codes, leaves)
        except (KeyError, ValueError):
            found[module] = None
    return found


def _weight(codes: torch.Tensor, leaves: dict[str, torch.Tensor]) -> np.ndarray:
    names = [name for name in ("scales", "weight_scale", "weight_scale_inv") if name in leaves]
    scale = leaves[names[0]] if names else leaves["weight_scale"]
    if codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.uint8:
        blocks = np.ldexp(1.0, scale.numpy().astype(np.int64) - 127)
        return codes.double().numpy() * np.repeat(blocks, 32, -1)
    if codes.dtype == torch.float8_e4m3fn and (tile := _tile(codes, scale)):
        tiles = scale.double().numpy().astype(np.float32).astype(np.float64)
        rows, cols = codes.shape
        full = np.repeat(np.repeat(tiles, tile, 0)[:rows], tile, 1)[:, :cols]
        return (codes.double().numpy() * full).astype(np.float32).astype(np.float64)
    if codes.dtype == torch.float8_e4m3fn:
        per_row = scale.double().numpy().reshape(-1, 1).astype(np.float32).astype(np.float64)
        return codes.double().numpy() * per_row
    bits = codes.numpy()
    values = np.stack([_E2M1[bits & 15], _E2M1[bits >> 4]], -1).reshape(*bits.shape[:-1], -1)
    raw = scale.view(torch.uint8).numpy()
    # FP-Quant stores E4M3 scales as bytes; beside a global scale they are E4M3 in every dialect.
    divisor = leaves.get("weight_global_scale")
    is_mx = scale.dtype == torch.uint8 and (
        "scales" not in leaves or values.shape[-1] == 32 * raw.shape[-1]
    )
    if is_mx:
        blocks = np.ldexp(1.0, raw.astype(np.int64) - 127)
    else:
        blocks = torch.from_numpy(raw.copy()).view(torch.float8_e4m3fn).double().numpy()
    width = values.shape[-1] // blocks.shape[-1]
    value = values * np.repeat(blocks, width, -1)
    if (factor := leaves.get("weight_scale_2")) is not None:
        return value * np.float64(np.float32(factor.float().item()))
    if divisor is not None:
        return value * np.float64(np.float32(1 / np.float64(divisor.float().item())))
    return value


def _of_mlx(codes: torch.Tensor, leaves: dict[str, torch.Tensor]) -> np.ndarray:
    """By the sizes of MLX's tensors alone; of its integers, those of 8 bits."""
    scale, raw = leaves["scales"], codes.contiguous().view(torch.uint8)
    num_bytes = raw.shape[-1] // scale.shape[-1]  # of a group
    if scale.dtype != torch.uint8:
        groups = raw.numpy().reshape(*scale.shape, -1).astype(np.float32)
        scale, offset = (leaves[n].float().numpy()[..., None] for n in ("scales", "biases"))
        return (groups * scale + offset).reshape(raw.shape).astype(np.float64)
    if num_bytes == 32:
        return _weight(raw.view(torch.float8_e4m3fn), {"weight_scale": scale})
    if num_bytes == 8:
        scale = scale.view(torch.float8_e4m3fn)
    return _weight(raw, {"weight_scale": scale})


def _tile(codes: torch.Tensor, scale: torch.Tensor) -> int:
    """The side of the squares that share one of the scales, 0 where they are no squares."""
    if codes.dim() != 2 or scale.dim() != 2 or scale.numel() in (1, len(codes)):
        return 0
    sides = (128, 64, 32, 16, 256, 512)
    fits = [b for b in sides if tuple(-(-s // b) for s in codes.shape) == tuple(scale.shape)]
    return fits[0] if fits else 0


def _stacked(leaf: str, leaves: dict[str, torch.Tensor]) -> np.ndarray | None:
    """gpt-oss's experts, [E, N, K]: the codes are in blocks of 32 already."""
    scale = leaves.get(f"{leaf.removesuffix('_blocks')}_scales")
    if scale is None or tuple(scale.shape) != tuple(leaves[leaf].shape[:-1]):
        return None
    bits = leaves[leaf].numpy()
    values = np.stack([_E2M1[bits & 15], _E2M1[bits >> 4]], -1).reshape(*bits.shape[:-1], -1)
    value = values * np.ldexp(1.0, scale.numpy().astype(np.int64) - 127)[..., None]
    return value.reshape(*value.shape[:-2], -1)


def difference(found: torch.Tensor, expected: np.ndarray) -> str:
    """A text for the first element that differs, or an empty one. -0 equals 0."""
    if tuple(found.shape) != expected.shape:
        return f"shape {tuple(found.shape)} instead of {expected.shape}"
    wrong = np.argwhere(found.numpy() != expected)
    if not len(wrong):
        return ""
    at: Any = tuple(int(i) for i in wrong[0])
    return f"{len(wrong)} values differ, first {found[at].item()} for {expected[at]} at {list(at)}"
