# SPDX-License-Identifier: Apache-2.0
"""``vllm-nvfp4 quality MODEL --reference BF16``: what quantisation costs, through vLLM."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vllm_nvfp4.cli._arguments import number, whole
from vllm_nvfp4.cli._files import check_text
from vllm_nvfp4.compat.quiet import shows_everything

if TYPE_CHECKING:
    from vllm_nvfp4.quality.statistics import Row
    from vllm_nvfp4.quality.tasks import Tasks

TAKES_AFTER_DASHES = True


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "quality",
        help="perplexity, KL and tasks of a model, as vLLM serves it",
        description="Measure a model through vLLM with this plugin, and against a reference. "
        "Flags of `vllm serve` after -- go to MODEL's engine; the reference is served as stored.",
        usage="vllm-nvfp4 quality MODEL [--reference MODEL] [options] [-- vLLM flags]",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, or a downloaded hub name")
    parser.add_argument(
        "--reference", metavar="MODEL", help="the model to compare with: the 16-bit original"
    )
    parser.add_argument(
        "--text",
        metavar="FILE|builtin",
        default="builtin",
        help="text to measure on (default: builtin)",
    )
    parser.add_argument(
        "--windows",
        type=whole(),
        default=16,
        metavar="N",
        help="measure at most so many parts of the text (default: 16)",
    )
    parser.add_argument(
        "--window-length",
        type=whole(8),
        default=1024,
        metavar="N",
        help="tokens of each part (default: 1024)",
    )
    parser.add_argument(
        "--tasks", metavar="NAME,...", help="tasks of lm-eval, such as mmlu,hellaswag,gsm8k"
    )
    parser.add_argument(
        "--task-path", type=Path, metavar="DIR", help="folder with task files of your own"
    )
    parser.add_argument(
        "--limit", type=whole(), metavar="N", help="questions of each task (default: all)"
    )
    parser.add_argument(
        "--run-unsafe-code", action="store_true", help="for tasks that run what the model writes"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--max-ppl-increase",
        type=number(-100.0, what="percent"),
        metavar="PERCENT",
        help="end with status 1 if the perplexity is more than this above the reference's",
    )


def run(args: argparse.Namespace) -> int:
    if args.max_ppl_increase is not None and not args.reference:
        raise ValueError("--max-ppl-increase needs --reference, the model it is an increase over")
    check_text("--text", args.text)
    for name in ("task_path", "limit", "run_unsafe_code"):
        if getattr(args, name) and not args.tasks:
            raise ValueError(f"--{name.replace('_', '-')} is about --tasks; name tasks, or drop it")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    from vllm_nvfp4.serving.engine_log import engine_log

    with engine_log("quality") as log:
        try:
            rows, about = _measure(args, log.out)
        except RuntimeError as error:  # the engine's: memory, kernels, workers
            if shows_everything():
                raise
            raise ValueError(f"the engine ended: {error}{log.keep()}") from error
    from vllm_nvfp4.quality.report import as_json, table

    if args.json:
        print(json.dumps(as_json(rows, about), indent=2))
    else:
        print(table(rows))
    return _verdict(rows, args.max_ppl_increase)


def _verdict(rows: list[Row], limit: float | None) -> int:
    if limit is None:
        return 0
    increase = next(r.difference for r in rows if r.metric == "perplexity, %")
    # A perplexity that is not a number is no pass.
    if increase is not None and increase <= limit:
        return 0
    print(
        f"vllm-nvfp4 quality: perplexity is {increase:+.2f} % from the reference's, "
        f"--max-ppl-increase {limit:g} allows no more",
        file=sys.stderr,
    )
    return 1


def _measure(args: argparse.Namespace, out: TextIO) -> tuple[list[Row], dict[str, Any]]:
    from vllm_nvfp4.checkpoints import read_config
    from vllm_nvfp4.checkpoints.locate import find_folder
    from vllm_nvfp4.checkpoints.validate import validate
    from vllm_nvfp4.compat import cpu_metadata
    from vllm_nvfp4.options import METHOD_NAME, METHOD_NAMES

    folder = find_folder(args.model)
    reference = find_folder(args.reference) if args.reference else None
    cpu_metadata.apply()
    from vllm_nvfp4.quality.engine import engine_options

    options = {"quantization": METHOD_NAME} | engine_options(args.after_dashes)
    if options["quantization"] in METHOD_NAMES:
        validate(folder, *read_config(folder))
    tasks = _tasks(args)
    manager = tasks.manager() if tasks else None
    rows, about = _text_rows(args, out, folder, reference, options)
    if tasks:
        rows += _task_rows(tasks, manager, out, folder, reference, options)
    return rows, _about(args, folder, reference) | about


def _tasks(args: argparse.Namespace) -> Tasks | None:
    from vllm_nvfp4.quality.tasks import Tasks

    if not args.tasks:
        return None
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    return Tasks(names, args.task_path, args.limit, args.run_unsafe_code)


def _task_rows(
    tasks: Tasks,
    manager: Any,
    out: TextIO,
    folder: Path,
    reference: Path | None,
    options: dict[str, Any],
) -> list[Row]:
    from vllm_nvfp4.quality.tasks import evaluate, task_rows
    from vllm_nvfp4.serving.progress import step

    results: dict[Path, Any] = {}
    for model in dict.fromkeys(m for m in (reference, folder) if m is not None):
        own = options if model == folder else _plain_options(model, options)
        with step(f"{model.name}: {', '.join(tasks.names)}", out):
            results[model] = evaluate(model, tasks, manager, own)
    return task_rows(results[folder], results[reference] if reference is not None else None)


def _plain_options(reference: Path, options: dict[str, Any]) -> dict[str, Any]:
    """How the reference is served: as it is stored."""
    from vllm_nvfp4.quality.engine import method_of

    shared = ("enforce_eager", "dtype", "kv_cache_memory_bytes", "tensor_parallel_size")
    kept = {name: options[name] for name in shared if name in options}
    return {"quantization": method_of(reference), **kept}


def _text_rows(
    args: argparse.Namespace,
    out: TextIO,
    folder: Path,
    reference: Path | None,
    options: dict[str, Any],
) -> tuple[list[Row], dict[str, Any]]:
    from vllm_nvfp4.quality.engine import check_room
    from vllm_nvfp4.quality.statistics import text_rows
    from vllm_nvfp4.quality.text import check_same_tokens, read_windows

    windows = read_windows(folder, args.text, args.windows, args.window_length)
    base = None
    with tempfile.TemporaryDirectory(prefix="vllm-nvfp4-quality-") as temporary:
        logits = Path(temporary) if reference is not None else None
        if reference is not None:
            check_same_tokens(folder, reference, args.text, windows)
            check_room(reference, Path(temporary), windows)
            plain = _plain_options(reference, options)
            base = _with_progress(out, reference, windows, plain, save=logits)
        scores = _with_progress(out, folder, windows, options, reference=logits)
    about = {
        "text": args.text,
        "windows": len(windows),
        "window_length": len(windows[0]),
        "tokens": int(scores.nll.size),
    }
    return text_rows(scores, base), about


def _with_progress(
    out: TextIO, folder: Path, windows: list[list[int]], options: dict[str, Any], **files: Any
) -> Any:
    from vllm_nvfp4.quality.engine import measure
    from vllm_nvfp4.serving.progress import step

    with step(f"{folder.name}: {len(windows)} windows of {len(windows[0])}", out) as current:

        def progress(detail: str) -> None:
            current.detail = detail
            if found := re.fullmatch(r"window (\d+) of (\d+)", detail):
                current.fraction = (int(found[1]) - 1) / int(found[2])

        return measure(folder, windows, options, progress=progress, **files)


def _about(args: argparse.Namespace, folder: Path, reference: Path | None) -> dict[str, Any]:
    from importlib import metadata

    import torch

    import vllm_nvfp4

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "model": str(folder),
        "reference": str(reference) if reference is not None else None,
        "vllm_flags": args.after_dashes,
        "device": device,
        "versions": {
            "vllm": metadata.version("vllm"),
            "torch": torch.__version__,
            "vllm-nvfp4": vllm_nvfp4.__version__,
        },
    }
