# SPDX-License-Identifier: Apache-2.0
"""Every architecture of a table, served by the plugin and by stock vLLM on the same weights.

    python benchmarks/check_models.py [NAME...] [--roads ROAD...] [--csv FILE]

For each architecture a tiny random model is made by transformers and served on a CPU: as it is,
quantised while it loads (online), and as `vllm-nvfp4 quantize --method rtn` writes it, in the
dialects of ModelOpt and compressed-tensors. Log-probabilities over the whole vocabulary, in prefill
and in forced decode, are compared with stock vLLM's on the same weights dequantised; where stock
vLLM refuses a model on a CPU, with transformers'. A row says the largest difference or why there is
none; share is the part of the weights' matrices that was quantised. One process a model; rows that
FILE has already are kept, unless their architectures are named.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common

from vllm_nvfp4.testing.architectures import ARCHITECTURES, Architecture

FIELDS = ("architecture", "class", "kind", "models", "online", "online_share", "modelopt",
          "compressed-tensors", "stored_share", "reference", "dtype", "worst", "reason",
          "seconds")  # fmt: skip
ROADS = ("online", "modelopt", "compressed-tensors")
CSV = common.ROOT / "benchmarks" / "results" / "models.csv"
_TIME_LIMIT = 420
_REASON_CHARS = 240


def check(
    architecture: Architecture, roads: Sequence[str], work: Path, note: Callable[..., None]
) -> None:
    """The roads of one architecture. note: takes the columns that are known so far."""
    from vllm_nvfp4.cli.main import main as command
    from vllm_nvfp4.testing.model_sweep import Sweep, one_line

    sweep = Sweep(architecture, work, command)
    note(**{"class": sweep.class_name()})
    reasons, worst = [], 0.0
    for road in roads:
        try:
            found = sweep.measure(road)
        except Exception as error:  # whatever ends an engine: a row says it, and the next one runs
            note(**{road: "FAILED"})
            reasons.append(f"{road}: {one_line(error)}")
            traceback.print_exc()
        else:
            worst = max(worst, found.deviation)
            is_close = found.deviation <= found.tolerance
            note(
                **{road: f"{found.deviation:.2g}" if is_close else f"DIFFERS {found.deviation:.2g}"}
            )
            share = "online_share" if road == "online" else "stored_share"
            note(**{share: round(found.share, 3)}, reference=found.reference, worst=f"{worst:.2g}")
            if not is_close:
                limit = f"{found.tolerance:.2g}"
                reasons.append(f"{road}: differs by {found.deviation:.2g}, not at most {limit}")
        note(reason="; ".join(reasons))


def run_one(name: str, roads: Sequence[str], work: Path) -> int:
    """In a process of its own: the row goes to a file as far as it is known."""
    row: dict[str, Any] = {}
    path = work / "row.json"
    path.unlink(missing_ok=True)

    def note(**columns: Any) -> None:
        row.update(columns)
        path.write_text(json.dumps(row))

    try:
        check(ARCHITECTURES[name], roads, work, note)
    except Exception as error:
        traceback.print_exc()
        note(reason=f"{type(error).__name__}: {error}"[:_REASON_CHARS])
    return 0


def run(architecture: Architecture, roads: Sequence[str], work: Path) -> dict[str, Any]:
    """The row of one architecture, whatever becomes of its process."""
    work.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    command = [sys.executable, __file__, "--one", architecture.name]
    command += ["--work", str(work), "--roads", *roads]
    ended = ""
    with (work / "log.txt").open("wb") as log:
        try:
            result = subprocess.run(
                command,
                stdout=log,
                stderr=log,
                timeout=_TIME_LIMIT,
                env=_environment(),
            )
            ended = f"the process ended with {result.returncode}" if result.returncode else ""
        except subprocess.TimeoutExpired:
            ended = f"not done in {_TIME_LIMIT} s"
    found = work / "row.json"
    row = json.loads(found.read_text()) if found.exists() else {}
    row["reason"] = "; ".join(part for part in (row.get("reason", ""), ended) if part)
    return row | {
        "architecture": architecture.name,
        "kind": architecture.kind,
        "models": architecture.models,
        "dtype": architecture.dtype,
        "seconds": round(time.monotonic() - begin),
    }


def _environment() -> dict[str, str]:
    import importlib.util

    paths = [str(common.ROOT), os.environ.get("PYTHONPATH", "")]
    if importlib.util.find_spec("torchvision") is None:
        paths.append(str(common.ROOT / "tests" / "support" / "stubs"))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TOKENIZERS_PARALLELISM": "false",
    }


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        lines = [line for line in file if not line.startswith("#")]
    return {row["architecture"]: row for row in csv.DictReader(lines)}


def write_table(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """The rows, in the order of the table, as CSV and beside it as Markdown."""
    ordered = [rows[name] for name in ARCHITECTURES if name in rows]
    notes = [*common.header(), ("command", "make models")]
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in notes)
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(ordered)
    head = ("architecture", "class", *ROADS, "quantised online", "stored", "reason")
    lines = ["# Architectures against stock vLLM on the same weights dequantised", ""]
    lines += [f"{name}: {value}  " for name, value in notes]
    lines += ["", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in ordered:
        cells = [row["architecture"] + (f" ({row['models']})" if row.get("models") else "")]
        cells += [str(row.get(c) or "") for c in ("class", *ROADS, "online_share", "stored_share")]
        cells.append(re.sub(r"[|]", "/", str(row.get("reason") or "")))
        lines.append(f"| {' | '.join(cells)} |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*ARCHITECTURES, []], metavar="NAME")
    parser.add_argument("--csv", type=Path, default=CSV, metavar="FILE")
    parser.add_argument("--work", type=Path, default=common.ROOT / ".cache" / "models")
    parser.add_argument("--roads", nargs="+", choices=ROADS, default=ROADS)
    parser.add_argument("--one", choices=ARCHITECTURES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run_one(args.one, args.roads, args.work)
    rows = read_rows(args.csv)
    for name in args.names or [n for n in ARCHITECTURES if n not in rows]:
        rows[name] = run(ARCHITECTURES[name], args.roads, args.work / name)
        shown = ", ".join(f"{road} {rows[name].get(road, '')}" for road in ROADS)
        print(f"{name}: {shown} {rows[name]['reason']}", flush=True)
        write_table(args.csv, rows)
    return int(any(row["reason"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
