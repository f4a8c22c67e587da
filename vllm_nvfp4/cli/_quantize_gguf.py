# SPDX-License-Identifier: Apache-2.0
"""``vllm-nvfp4 quantize`` of a GGUF file whose weights are in NVFP4 or MXFP4 already."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

# What chooses how a weight is rounded, which nothing does here. The defaults are not in force.
_OF_ROUNDING = ("method", "format", "calibration", "target_bits", "max_kl", "ignore", "towers")


def take_over(path: Path, args: argparse.Namespace, target: Path) -> None:
    """Make the folder ``target``: codes and scales as they are, all else in BF16. Raises ValueError
    for a flag that wants weights to be rounded, CheckpointError for what cannot be taken over."""
    from vllm_nvfp4.checkpoints.gguf import write_fp4
    from vllm_nvfp4.cli._quantize_check import check_written
    from vllm_nvfp4.serving.progress import step

    given = [name for name in _OF_ROUNDING if getattr(args, name)]
    given += ["kv_cache"] * (args.kv_cache != "keep") + ["activation"] * (args.activation != "16")
    if given:
        raise ValueError(
            f"--{given[0].replace('_', '-')}: the weights of {path.name} are in 4 bits already, "
            "and are taken over as they are; drop the flag"
        )
    with step(f"Reading {path.name}, all of it in memory", sys.stderr) as current:
        finish = None if args.no_check else lambda folder: check_written(folder, current.say)
        found = write_fp4(path, target, finish)
    counts = Counter(found.algos.values())
    layers = ", ".join(f"{count} layers in {algo}" for algo, count in sorted(counts.items()))
    print(f"{target}\n  {layers}, codes and scales as {path.name} has them; all else in BF16")
