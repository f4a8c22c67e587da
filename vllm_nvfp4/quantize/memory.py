# SPDX-License-Identifier: Apache-2.0
"""How much memory a run of `quantize` needs: estimated from shapes, before it begins.

By the weights alone: the largest tensor, or shards of one fused layer, and its codes. With a text:
one decoder layer, the hidden states and inputs of all samples, and what GPTQ computes in for the
largest layer. Neither grows with the number of layers. Where formats are
chosen, what goes into every layer is kept beside that, for a few short samples.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_nvfp4.checkpoints.source import Source
from vllm_nvfp4.checkpoints.units import Unit
from vllm_nvfp4.quantize.routed import moment_bytes
from vllm_nvfp4.quantize.sensitivity import LENGTH

# Of a weight's size: the codes and scales that it becomes, 4.5 bits of at least 16.
_CODES = 0.3
# float32 copies: a weight while GPTQ rounds it (target, columns, values, residual and what updates
# them); its second moment with factors and inverse.
_WEIGHT_COPIES, _MOMENT_COPIES = 8, 6
# Tensors as wide as the widest module's output, and as the hidden state (two of them float32), that
# a layer's forward pass holds at a time; hidden states of the source's own layers beside them.
_WIDE, _HIDDEN, _EXACT_HIDDEN = 3, 6, 2
# The busiest expert's share of a layer's tokens, over the mean's; bytes of the mask by which
# transformers' experts find their tokens, for each token, choice and expert.
_BUSY, _MASK = 3, 8
# What 16-bit products keep of each shape that they meet (row_counts.py), libraries once they are
# first used, and the gaps between what a layer frees.
_FIRST_USE_BYTES = 64 << 20
# Where formats are chosen: transformers with a model's code; float32 copies of lm_head or the
# embedding while it is read, and while it is rounded; copies of a fused layer with its changes;
# of one sample's logits.
_LIBRARY_BYTES = 400 << 20
_READ_TABLES, _ROUNDED_TABLES = 3, 7
_CHANGED_COPIES, _LOGITS = 8, 12


def data_free_bytes(source: Source, units: Sequence[Unit]) -> int:
    """Beyond what the process has already."""
    groups = (group for unit in units for group in unit.groups)
    largest = max(sum(source.tensors[n].num_bytes for n in group) for group in groups)
    return int(largest * (1 + _CODES))


def calibrated_bytes(
    source: Source,
    units: Sequence[Unit],
    quantized: set[str],
    num_tokens: int,
    itemsize: int,
    follows_exact: bool,
) -> int:
    """The same for a method with a text. itemsize: bytes of a number in a hidden state;
    follows_exact: the method looks at the unquantised model's inputs too"""
    most = 0
    for unit in units:
        groups = [group for group in unit.groups if group[0] in quantized]
        routed = [group for group in groups if source.model_class.expert(group[0]) is not None]
        shapes = [[source.tensors[n].shape for n in g] for g in groups if g not in routed]
        # Experts are run and quantised one after another.
        one = [[source.tensors[n].shape for n in g] for g in routed[:1] + routed[-1:]]
        if not shapes + one:
            continue
        size = sum(math.prod(source.tensors[n].shape) for n in unit.names)
        # [N, K] of each fused layer
        fused = [(sum(shape[0] for shape in group), group[0][1]) for group in shapes + one]
        hidden = min(cols for _, cols in fused)
        wide = max(max(rows, cols) for rows, cols in fused)
        states = itemsize * (_WIDE * wide + _HIDDEN * hidden)
        if follows_exact:
            inputs = sum(cols for _, cols in fused[: len(shapes)])
            states += itemsize * (inputs + _EXACT_HIDDEN * hidden)
        if routed:
            experts, chosen = len(routed) // 2, source.model_class.experts_per_token
            share = min(1.0, _BUSY * chosen / max(experts, 1))
            expert = share * sum(rows + cols for rows, cols in fused[len(shapes) :])
            states += itemsize * int(2 * expert) + _MASK * chosen * (experts + 1)
        rounding = max(_WEIGHT_COPIES * n * k + _MOMENT_COPIES * k * k for n, k in fused)
        most = max(most, itemsize * size + 4 * rounding + num_tokens * states)
    return max(most + _FIRST_USE_BYTES, data_free_bytes(source, units))


def kept_bytes(
    source: Source, units: Sequence[Unit], quantized: set[str], follows_exact: bool
) -> int:
    """What the moments of all experts of a layer take beside that, of the layer with the most.
    follows_exact: the method looks at the unquantised model's inputs too"""
    most = 0
    for unit in units:
        groups = [group for group in unit.groups if group[0] in quantized]
        places = [(g, source.model_class.expert(g[0])) for g in groups]
        downs = [g[0] for g, place in places if place is not None and place.leaf == "down_proj"]
        sizes = (moment_bytes(source.tensors[n].shape[1], follows_exact) for n in downs)
        most = max(most, sum(sizes))
    return most


def sensitivity_bytes(
    source: Source, units: Sequence[Unit], chosen: set[str], num_tokens: int, itemsize: int
) -> int:
    """The same for the measurement that formats are chosen by.

    chosen: the weights that get a format; num_tokens: of all samples. Both tables of a vocabulary,
    lm_head's and the embedding's, have one size.
    """
    names = source.vocabulary(with_embedding=True)
    rows, hidden = max((source.tensors[n].shape for n in names), default=(0, 0))
    copies = _READ_TABLES if chosen.isdisjoint(names) else _ROUNDED_TABLES
    tables = 4 * rows * (copies * hidden + _LOGITS * LENGTH)
    layers = [unit for unit in units if unit.prefix]
    states = itemsize * num_tokens * hidden * (len(layers) + 1)
    most = 0
    for unit in layers:
        size = sum(math.prod(source.tensors[n].shape) for n in unit.names)
        groups = [sum(math.prod(source.tensors[n].shape) for n in g) for g in unit.groups]
        most = max(most, 4 * (size + _CHANGED_COPIES * max(groups)))
    library = 0 if "transformers.modeling_utils" in sys.modules else _LIBRARY_BYTES
    return library + states + max(tables, most)


def peak_bytes() -> int:
    """The process's largest resident set so far. Not getrusage's: that of the process which started
    this one counts in it."""
    return _status("VmHWM")


def expected_peak(extra: int) -> int:
    """The process's largest resident set with ``extra`` bytes more than it has now."""
    return max(_status("VmRSS") + extra, peak_bytes())


def available_bytes() -> int:
    """What the process has now and what the machine has left for it."""
    return _status("VmRSS") + _status("MemAvailable", "/proc/meminfo")


def _status(name: str, path: str = "/proc/self/status") -> int:
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
