# SPDX-License-Identifier: Apache-2.0
"""What 8-bit activations cost a served model, against the same weights with 16-bit ones.

    python benchmarks/bench_activations.py MODEL --csv benchmarks/results/activations_cpu.csv

MODEL: a checkpoint in NVFP4 or MXFP4. vLLM serves it with activation=16 and then with activation=8
in each variant of ``a8_variant``, on the same windows of the built-in text; KL and top-1 agreement
are from the 16-bit run, standard errors by block bootstrap, paired with it. Other options of the
plugin are as in force for all of them, the KV cache in 16 bits.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    from vllm_nvfp4.quality.engine import Scores

FIELDS = ("activations", "windows", "ppl", "ppl_increase_pct", "standard_error_pct", "kl", "top1")
VARIANTS = ("exact", "int8")


def serve(
    args: argparse.Namespace, windows: list[list[int]], options: dict[str, str], **files: Any
) -> Scores:
    from vllm_nvfp4.quality.engine import measure

    return measure(
        args.model,
        windows,
        {
            "quantization": "nvfp4",
            "additional_config": {"nvfp4": {"kv_cache": "keep"} | options},
            "enforce_eager": True,
        },
        progress=lambda detail: print(f"{options}: {detail}", file=sys.stderr, flush=True),
        **files,
    )


def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    from vllm_nvfp4.quality.statistics import text_rows
    from vllm_nvfp4.quality.text import read_windows

    windows = read_windows(args.model, "builtin", args.windows, args.length)
    with tempfile.TemporaryDirectory() as folder:
        base = serve(args, windows, {"activation": "16"}, save=Path(folder))
        scores = {"16": base}
        for variant in args.variants:
            options = {"activation": "8", "a8_variant": variant}
            scores[f"8, {variant}"] = serve(args, windows, options, reference=Path(folder))
    rows = []
    for name, found in scores.items():
        by_metric = {row.metric: row for row in text_rows(found, base)}
        increase = by_metric.get("perplexity, %")
        rows.append(
            {
                "activations": name,
                "windows": len(windows),
                "ppl": by_metric["perplexity"].value,
                "ppl_increase_pct": increase.difference if increase else 0.0,
                "standard_error_pct": increase.standard_error if increase else 0.0,
                "kl": by_metric["KL, mean"].value if found.kl is not None else 0.0,
                "top1": by_metric["top-1 agreement"].value if found.kl is not None else 1.0,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    notes = [*common.header(), ("text", f"builtin, {args.windows} x {args.length} tokens")]
    for name, value in notes:
        print(f"{name}: {value}")
    rows = rows_of(args)
    for row in rows:
        print(
            f"activations {row['activations']:>8} | ppl {row['ppl']:7.3f} "
            f"{row['ppl_increase_pct']:+6.2f} % +- {row['standard_error_pct']:.2f} | "
            f"kl {row['kl']:.4f} | top-1 {row['top1']:.3f}"
        )
    if args.csv:
        with args.csv.open("w", newline="") as file:
            file.writelines(f"# {name}: {value}\n" for name, value in notes)
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            for row in rows:
                writer.writerow(
                    {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
