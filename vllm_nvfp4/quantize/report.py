# SPDX-License-Identifier: Apache-2.0
"""The sensitivity of each layer and the format chosen for it, as a table and as a plot."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from vllm_nvfp4.compat.packages import install_hint
from vllm_nvfp4.quantize.precision import Sensitivity, average_bits

SUFFIXES = (".png", ".svg")
_COLOURS = {"nvfp4": "tab:green", "fp8": "tab:orange", "bf16": "tab:red"}


# What a format costs is shown for these.
_EACH = ("nvfp4", "fp8")


def check_plot(path: Path) -> None:
    """Raise ValueError where :func:`plot` could not write, before the work is done."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--report {path}: needs a file name that ends in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"--report {path}: there is no folder {path.parent}; make it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"--report {path}: needs matplotlib: {install_hint('pictures')}")


def label(group: Sensitivity) -> str:
    """One name for the shards of a fused layer, "model.layers.0.self_attn.q_proj+k_proj+v_proj", or
    for the experts of a layer, "model.layers.0.mlp.experts"."""
    layers = [name.removesuffix(".weight") for name in group.names]
    if "fp8" not in group.kl:
        return f"{layers[0].partition('.experts.')[0]}.experts"
    return layers[0] + "".join("+" + name.rpartition(".")[2] for name in layers[1:])


def table(groups: Sequence[Sensitivity], formats: Sequence[str]) -> str:
    """A line for each fused layer: weights, KL in NVFP4 and in FP8, the choice; and the sum."""
    width = max(len(label(g)) for g in groups)
    lines = [f"{'layer':<{width}}  {'weights':>11}  {'KL nvfp4':>9}  {'KL fp8':>9}  chosen"]
    for group, chosen in zip(groups, formats, strict=True):
        kl = "  ".join(f"{group.kl[f]:9.2e}" if f in group.kl else f"{'-':>9}" for f in _EACH)
        lines.append(f"{label(group):<{width}}  {group.num_weights:>11,}  {kl}  {chosen}")
    lines.append(summary(groups, formats))
    return "\n".join(lines)


def summary(groups: Sequence[Sensitivity], formats: Sequence[str]) -> str:
    """Bits per weight, and the sum of KL, of one line."""
    total = sum(g.kl[f] for g, f in zip(groups, formats, strict=True))
    counts = ", ".join(f"{formats.count(name)} {name}" for name in _COLOURS)
    return (
        f"{average_bits(groups, formats):.3f} bits per weight ({counts}); "
        f"the layers' KL adds up to {total:.4f}"
    )


def plot(groups: Sequence[Sensitivity], formats: Sequence[str], path: Path) -> None:
    """A bar of NVFP4's KL for each fused layer, in the colour of the format chosen; PNG or SVG."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(max(6.0, 0.14 * len(groups)), 4.5), layout="constrained")
    axes = figure.subplots()
    positions = range(len(groups))
    axes.bar(positions, [g.kl["nvfp4"] for g in groups], color=[_COLOURS[f] for f in formats])
    axes.plot(positions, [g.kl.get("fp8", math.nan) for g in groups], "k_", markersize=4)
    positive = [kl for g in groups for kl in g.kl.values() if kl > 0]
    axes.set_yscale("symlog", linthresh=min(positive, default=1e-6), linscale=0.2)
    axes.set_xlabel("fused layer, in the order of the model")
    axes.set_ylabel("KL of the logits, this layer alone in NVFP4")
    handles = [Patch(color=colour, label=name) for name, colour in _COLOURS.items()]
    # Beside the bars: there is one wherever a legend within the axes could stand.
    figure.legend(handles=handles, title="chosen\n(dash: KL in FP8)", loc="outside right upper")
    axes.set_title(summary(groups, formats), fontsize=9)
    # No date in the file: the same run gives the same bytes.
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
