# SPDX-License-Identifier: Apache-2.0
"""Every architecture of a table, served by the plugin and by stock vLLM on the same weights.

    python benchmarks/check_models.py [NAME...] [--roads ROAD...] [--csv FILE]

For each architecture a tiny random model is made by transformers and served on a CPU: as it is,
quantised while it loads (online), and as `vllm-nvfp4 quantize` writes it, in the dialects of
ModelOpt (--method rtn) and compressed-tensors (--method mse); the most used also by --method gptq.
Log-probabilities over the whole vocabulary, in prefill and in forced decode, are compared with
stock vLLM's on the same weights dequantised; where stock vLLM refuses a model on a CPU, with
transformers'. A model that takes pictures is shown two: their largest difference is a column, and
a road fails that finds both alike. A row says the largest difference or why there is none, and
whether stock vLLM ends in the same way without the plugin; share is the part of the weights'
matrices that was quantised. One process a model; rows that FILE has already and that are not red
are kept, unless their architectures are named.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import multiprocessing
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common

from vllm_nvfp4.compat import lean
from vllm_nvfp4.testing.architecture import Architecture
from vllm_nvfp4.testing.architectures import ARCHITECTURES, features

SHOWN = "picture or sound"
FIELDS = ("architecture", "class", "online", "online_share", "modelopt", "compressed-tensors",
          "stored_share", SHOWN, "gptq", "TP 2", "LoRA", "MTP", "reference", "reason")  # fmt: skip
REFUSED = "refused by vLLM"
ROADS = ("online", "modelopt", "compressed-tensors")
METHODS = {"modelopt": "rtn", "compressed-tensors": "mse"}
COLUMNS = (SHOWN, "gptq", "TP 2", "LoRA", "MTP")
CSV = common.ROOT / "benchmarks" / "results" / "models.csv"
_TIME_LIMIT = 420
# What an engine, a model of transformers and `quantize` import.
_NOTHING = "none to quantise"
_NOT_CALIBRATED = "architecture for calibration"
_MODULES = (
    "transformers", "transformers.models.auto.modeling_auto", "vllm.entrypoints.llm",
    "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker", "vllm.v1.executor.uniproc_executor",
    "vllm.v1.engine.core", "vllm.model_executor.models.registry",
    "vllm_nvfp4.plugin", "vllm_nvfp4.cli.main", "vllm_nvfp4.testing.model_sweep",
)  # fmt: skip
_REASON_CHARS = 240


def check(
    architecture: Architecture, roads: Sequence[str], work: Path, note: Callable[..., None]
) -> None:
    """The roads of one architecture. note: takes the columns that are known so far."""
    from vllm_nvfp4.cli.main import main as command
    from vllm_nvfp4.testing.model_sweep import Sweep, one_line
    from vllm_nvfp4.testing.sweep_features import WRITERS

    sweep = Sweep(architecture, work, command)
    note(**{"class": sweep.class_name()})
    reasons: list[str] = []
    shown, failed = 0.0, {}

    def attempt(road: str, step: Callable[[str], Any]) -> Any:
        try:
            return step(road)
        except Exception as error:  # whatever ends an engine: a row says it, and the next one runs
            failed[road] = one_line(error)
            note(**{road: "FAILED"})
            traceback.print_exc()

    for road in roads:
        if road != "online":
            attempt(road, lambda road: sweep.quantise(road, "--method", METHODS[road]))
    for name in features(architecture.name):
        if name in WRITERS:
            attempt(name, lambda name: WRITERS[name](sweep))
    for road in roads:
        if road not in failed:
            sweep.ask_check(road)
    for road in roads:
        found = None if road in failed else attempt(road, sweep.measure)
        if found is None:
            continue
        is_close = found.deviation <= found.tolerance
        note(**{road: f"{found.deviation:.2g}" if is_close else f"DIFFERS {found.deviation:.2g}"})
        share = "online_share" if road == "online" else "stored_share"
        note(**{share: round(found.share, 3)}, reference=found.reference)
        if not is_close:
            limit = f"{found.tolerance:.2g}"
            reasons.append(f"{road}: differs by {found.deviation:.2g}, not at most {limit}")
        if found.shown is not None:
            shown = max(shown, found.shown)
            is_close = shown <= found.tolerance
            note(**{SHOWN: f"{shown:.2g}" if is_close else f"DIFFERS {shown:.2g}"})
    stock = sweep.stock_error() if failed.keys() & set(ROADS) else ""
    own = {road: error for road, error in failed.items() if error != stock and road in ROADS}
    note(**{road: REFUSED for road in ROADS if road in failed and road not in own})
    note(**{road: _NOTHING for road, error in own.items() if _NOTHING in error})
    reasons += [f"{road}: {error}" for road, error in own.items()]
    if stock:
        reasons.append(f"stock vLLM, in 16 bits: {stock}")
    if "modelopt" in roads and "modelopt" not in failed:
        check_features(sweep, attempt, failed, reasons, note)
    note(reason="; ".join(reasons))


def check_features(
    sweep: Any,
    attempt: Callable[..., Any],
    failed: Mapping[str, str],
    reasons: list[str],
    note: Callable[..., None],
) -> None:
    from vllm_nvfp4.testing.sweep_features import FEATURES, stock_options

    for name in features(sweep.architecture.name):
        if name not in failed and (cell := attempt(name, lambda name: FEATURES[name](sweep))):
            note(**{name: cell})
        elif _NOT_CALIBRATED in failed[name]:
            note(**{name: "refused"})
            reasons.append(f"{name}: {failed[name]}")
        elif sweep.stock_error(**stock_options(sweep, name)) == failed[name]:
            note(**{name: REFUSED})
            reasons.append(f"{name}, stock vLLM in 16 bits: {failed[name]}")
        else:
            reasons.append(f"{name}: {failed[name]}")


def run_one(name: str, roads: Sequence[str], work: Path) -> None:
    """In a process of its own: the row goes to a file as far as it is known."""
    with (work / "log.txt").open("wb") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    row: dict[str, Any] = {}

    def note(**columns: Any) -> None:
        row.update(columns)
        (work / "row.json").write_text(json.dumps(row))

    try:
        check(ARCHITECTURES[name], roads, work, note)
    except Exception as error:
        traceback.print_exc()
        note(reason=f"{type(error).__name__}: {error}"[:_REASON_CHARS])


def run(architecture: Architecture, roads: Sequence[str], work: Path) -> dict[str, Any]:
    """The row of one architecture, whatever becomes of its process."""
    work.mkdir(parents=True, exist_ok=True)
    found = work / "row.json"
    found.unlink(missing_ok=True)
    # A fork of this process has all its modules, whose import takes longer than an engine.
    process = multiprocessing.get_context("fork").Process(
        target=run_one, args=(architecture.name, roads, work)
    )
    process.start()
    process.join(_TIME_LIMIT)
    ended = f"the process ended with {process.exitcode}" if process.exitcode else ""
    if process.is_alive():
        ended = f"not done in {_TIME_LIMIT} s"
        process.kill()
        process.join()
    row = json.loads(found.read_text()) if found.exists() else {}
    row["reason"] = "; ".join(part for part in (row.get("reason", ""), ended) if part)
    return row | {"architecture": architecture.name}


def prepare() -> None:
    """Everything that the rows' processes share, before the first of them is forked."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TOKENIZERS_PARALLELISM": "false",
        # Of an eager engine vLLM compiles a few lines of the sampler, once in every process.
        "TORCHDYNAMO_DISABLE": "1",
        # A library's threads do not live on in a fork.
        "OMP_NUM_THREADS": "1",
    }
    sys.path.append(str(common.ROOT / "tests" / "support"))
    importlib.import_module("vision_classes").install()
    for name in _MODULES:
        importlib.import_module(name)
    lean.look_here()
    if (number := threading.active_count()) > 1:
        raise RuntimeError(f"{number} threads before a fork: {threading.enumerate()}")


def is_red(row: Mapping[str, Any]) -> bool:
    """Whether the plugin fails or errs where stock vLLM does not."""
    ends = [str(row.get(column) or "") for column in (*ROADS, *COLUMNS)]
    return any(e.startswith(("FAILED", "DIFFERS")) for e in ends) or not any(ends)


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        lines = [line for line in file if not line.startswith("#")]
    return {row["architecture"]: row for row in csv.DictReader(lines)}


def write_table(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """The rows, in the order of the table, as CSV and beside it as Markdown."""
    ordered = [rows[name] for name in ARCHITECTURES if name in rows]
    notes = (dict(common.header()) | {"command": "make models"}).items()
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in notes)
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(ordered)
    head = ("architecture", "class", *ROADS, *COLUMNS, "quantised online, stored", "reason")
    lines = ["# Architectures against stock vLLM on the same weights dequantised", ""]
    lines += [f"{name}: {value}  " for name, value in notes]
    lines += ["", f"|{'|'.join(head)}|", "|" + "---|" * len(head)]
    for row in ordered:
        models = ARCHITECTURES[row["architecture"]].models
        cells = [row["architecture"] + (f" ({models})" if models else "")]
        cells += [str(row.get(c) or "") for c in ("class", *ROADS, *COLUMNS)]
        shares = (str(row.get(c) or "") for c in ("online_share", "stored_share"))
        cells.append(", ".join(dict.fromkeys(filter(None, shares))))
        cells.append(re.sub(r"[|]", "/", str(row.get("reason") or "")))
        lines.append(f"|{'|'.join(cells)}|")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*ARCHITECTURES, []], metavar="NAME")
    parser.add_argument("--csv", type=Path, default=CSV, metavar="FILE")
    parser.add_argument("--work", type=Path, default=common.ROOT / ".cache" / "models")
    parser.add_argument("--roads", nargs="+", choices=ROADS, default=ROADS)
    args = parser.parse_args()
    prepare()
    rows = read_rows(args.csv)
    done = {name for name, row in rows.items() if not is_red(row)}
    for name in args.names or [n for n in ARCHITECTURES if n not in done]:
        row = run(ARCHITECTURES[name], args.roads, args.work / name)
        rows[name] = row if set(args.roads) == set(ROADS) else rows.get(name, {}) | row
        shown = ", ".join(f"{road} {rows[name].get(road, '')}" for road in ROADS)
        print(f"{name}: {shown} {rows[name]['reason']}", flush=True)
        write_table(args.csv, rows)
    return int(any(is_red(row) for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
