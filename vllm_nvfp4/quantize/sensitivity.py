# SPDX-License-Identifier: Apache-2.0
"""What each layer's format costs: KL of the final logits with that layer alone quantised."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from vllm_nvfp4.checkpoints.source import Source, by_layer
from vllm_nvfp4.numerics.quantize import nvfp4_global_scale, quantize_fp8_per_row, quantize_nvfp4
from vllm_nvfp4.quantize.forward import LayerwiseModel
from vllm_nvfp4.quantize.precision import Sensitivity

_FORMATS = ("nvfp4", "fp8")


def measure(
    source: Source,
    quantized: set[str],
    samples: torch.Tensor,
    progress: Callable[[str], None] | None = None,
) -> list[Sensitivity]:
    """KL(source || source with one fused layer quantised), mean over the samples' tokens.

    quantized: the weights to choose a format for, all of them in decoder layers
    samples:   [num_samples, length] int64
    NVFP4's codes are those of method "mse", FP8 has one scale for a row. In float32: FP8's KL is
    below what BF16 would round away. One decoder layer is in memory, and the hidden states of all
    variants of one layer. Raises CheckpointError where transformers cannot run the model.
    """
    model = LayerwiseModel(
        source.folder, source.tensors, lambda name: source.load(name, "cpu"), samples
    )
    head = model.head()
    inputs = [model.hidden]
    for i in range(model.num_layers):
        layer = model.layer(i, {})
        inputs.append([model.run(layer, i, h) for h in inputs[-1]])
    exact = [torch.log_softmax(head(h), -1) for h in inputs.pop()]
    units = {unit.prefix: unit for unit in by_layer(source.tensors, quantized)}
    found: list[Sensitivity] = []
    for i in range(model.num_layers):
        prefix = model.prefix(i)
        if prefix not in units:
            continue
        groups = [g for g in units[prefix].groups if g[0] in quantized]
        if progress is not None:
            progress(prefix.removesuffix("."))
        states = [
            [model.run(model.layer(i, _quantise(source, group, name)), i, h) for h in inputs[i]]
            for group in groups
            for name in _FORMATS
        ]
        for later in range(i + 1, model.num_layers):
            layer = model.layer(later, {})
            states = [[model.run(layer, later, h) for h in state] for state in states]
        divergences = [_divergence(exact, head, state) for state in states]
        for j, group in enumerate(groups):
            pair = divergences[2 * j : 2 * j + 2]
            size = sum(math.prod(source.tensors[name].shape) for name in group)
            kl = {**dict(zip(_FORMATS, pair, strict=True)), "bf16": 0.0}
            found.append(Sensitivity(group, size, kl))
    return found


def _quantise(source: Source, group: Sequence[str], name: str) -> dict[str, torch.Tensor]:
    weights = {n: source.load(n, "cpu").float() for n in group}
    if name == "fp8":
        pairs = {n: quantize_fp8_per_row(w) for n, w in weights.items()}
        return {n: codes.float() * scale for n, (codes, scale) in pairs.items()}
    shared = torch.stack([nvfp4_global_scale(w) for w in weights.values()]).amax()
    return {n: quantize_nvfp4(w, "mse", shared).dequantize() for n, w in weights.items()}


def _divergence(
    exact: Sequence[torch.Tensor],
    head: Callable[[torch.Tensor], torch.Tensor],
    state: Sequence[torch.Tensor],
) -> float:
    total, count = 0.0, 0
    for reference, hidden in zip(exact, state, strict=True):
        mine = torch.log_softmax(head(hidden), -1)
        total += float((reference.exp() * (reference - mine)).sum(dtype=torch.float64))
        count += reference.shape[0] * reference.shape[1]
    # Rounding can leave a sum that is 0 in truth just below it.
    return max(total / count, 0.0)


def save(path: Path, groups: Sequence[Sensitivity]) -> None:
    """Write what :func:`load` reads; the file is there whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps([asdict(group) for group in groups], indent=2) + "\n")
    part.replace(path)


def load(path: Path) -> list[Sensitivity]:
    """What :func:`save` wrote."""
    entries = json.loads(path.read_text())
    return [Sensitivity(tuple(e["names"]), e["num_weights"], e["kl"]) for e in entries]
