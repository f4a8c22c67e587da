# SPDX-License-Identifier: Apache-2.0
"""What ``vllm-nvfp4 quantize`` says: what stays in 16 bits, the memory it takes, what it wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_nvfp4.checkpoints.source import Kept, Source
    from vllm_nvfp4.checkpoints.write import WriteReport
    from vllm_nvfp4.quantize.calibration import Calibration

# The share of a model's bytes that may stay in 16 bits unasked without a warning.
_MUCH = 0.05


def kept_lines(
    source: Source, kept: Sequence[Kept], chosen: set[str], ignore: Sequence[str]
) -> list[str]:
    """A line for each kind of matrix that stays in 16 bits, with its share of the bytes, and a
    warning where much stays that nobody asked to keep, and for each pattern of ``ignore`` that is
    no layer's name. chosen: those that get a format yet."""
    from vllm_nvfp4.checkpoints.source import UNASKED, matches

    names = {name.removesuffix(".weight") for name in [*source.tensors, *(k.name for k in kept)]}
    unknown = [p for p in ignore if not any(matches(name, [p]) for name in names)]
    total = sum(info.num_bytes for info in source.tensors.values())
    kinds: dict[tuple[str, str], list[Kept]] = {}
    for tensor in kept:
        if tensor.name not in chosen:
            kinds.setdefault((tensor.kind, tensor.reason), []).append(tensor)
    lines, unasked = [], 0.0
    for (kind, reason), tensors in kinds.items():
        share = sum(t.num_bytes for t in tensors) / total
        unasked += share if kind in UNASKED else 0
        first = tensors[0].name.removesuffix(".weight")
        if len(tensors) > 1:
            first += f" and {len(tensors) - 1} more"
        lines.append(f"kept in 16 bits: {kind}, {share:.1%} of the bytes ({reason}): {first}")
    if unasked > _MUCH:
        lines.append(
            f"warning: {unasked:.0%} of the bytes stay in 16 bits though nothing asked for it"
        )
    lines += [f"warning: --ignore {pattern}: no layer has such a name" for pattern in unknown]
    return lines


def plan_memory(
    source: Source,
    quantized: set[str],
    calibration: Calibration | None,
    device: str,
    is_measured: bool,
    follows_exact: bool = False,
    limit: float | None = None,
) -> tuple[str, float]:
    """(One line on the memory that the run takes; how much of it the moments of experts may take.)

    limit: bytes that the process may take; None for what the machine has. Raises ValueError where
    that is too little.
    """
    from vllm_nvfp4.checkpoints.units import by_layer
    from vllm_nvfp4.quantize import memory, sensitivity
    from vllm_nvfp4.quantize.forward import forward_dtype

    units = by_layer(source.tensors, quantized)
    wanted = 0
    if calibration is None:
        extra = memory.data_free_bytes(source, units)
    else:
        num_tokens = calibration.num_samples * calibration.length
        itemsize = forward_dtype(device).itemsize
        extra = memory.calibrated_bytes(
            source, units, quantized, num_tokens, itemsize, follows_exact
        )
        wanted = memory.kept_bytes(source, units, quantized, follows_exact)
    if is_measured:
        num_tokens = sensitivity.num_samples(calibration is not None) * sensitivity.LENGTH
        itemsize = forward_dtype("cpu").itemsize
        measured = memory.sensitivity_bytes(source, units, quantized, num_tokens, itemsize)
        extra = max(extra, measured)
    least = memory.expected_peak(extra)
    most = memory.available_bytes() if limit is None else limit
    if limit is not None and most < least:
        raise ValueError(
            f"--memory {limit / 2**30:g}: this run needs about {least / 2**30:.2f} GiB; give more"
            + (", or fewer --samples" if calibration is not None else "")
        )
    kept = min(wanted, max(0.0, most - least))
    where = "" if device == "cpu" else f", part of it on {device}"
    line = f"memory: about {(least + kept) / 2**20:.0f} MiB at the most{where}"
    if kept < wanted:
        line += (
            f"; {kept / wanted:.0%} of the moments of a layer's experts are kept, the others "
            "computed twice: all of them would take "
            f"{(wanted - kept) / 2**20:.0f} MiB more"
        )
    return line, kept


def print_summary(report: WriteReport, target: Path, method: str, seconds: float) -> None:
    """What was written, after ``seconds``."""
    from vllm_nvfp4.quantize.memory import peak_bytes

    mebi = 2**20
    bits = report.layer_bytes_after * 8 / max(report.num_weights, 1)
    formats = "NVFP4 and FP8" if report.num_fp8 else "NVFP4"
    count = len(report.kept)
    kept = f"{count} {'matrix' if count == 1 else 'matrices'} kept in 16 bits"
    print(
        f"{target}\n"
        f"  {len(report.quantized)} layers in {formats} by {method}, {bits:.2f} bits per weight; "
        f"{kept}\n"
        f"  {report.bytes_before / mebi:.1f} MiB -> {report.bytes_after / mebi:.1f} MiB\n"
        f"  {seconds:.1f} s, peak memory {peak_bytes() / mebi:.0f} MiB"
    )
