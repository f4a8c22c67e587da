# SPDX-License-Identifier: Apache-2.0
"""``vllm-nvfp4 bench MODEL``: speed, latency, memory and energy of a served model.

A server is started as ``vllm-nvfp4 serve`` would; vLLM's own ``vllm bench serve`` measures it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_nvfp4.cli._arguments import any_whole, listed, number, whole
from vllm_nvfp4.cli._files import check_can_write
from vllm_nvfp4.compat import cpu_metadata
from vllm_nvfp4.compat.packages import install_hint

if TYPE_CHECKING:
    from vllm_nvfp4.bench.run import Bench

TAKES_AFTER_DASHES = True
_OBJECTIVES = ("ttft", "tpot", "e2el")
_RATE = number(above=True, what="requests per second")
_LIMIT = number(above=True, what="milliseconds")

_EPILOG = """--against NAME[=MODEL] [FLAGS], in quotes where flags follow; NAME is one of
{kinds}
With --against the plugin leaves the KV cache as vLLM has it, so that weights are compared; set
VLLM_NVFP4_KV_CACHE or --kv-cache-dtype to decide otherwise.

What follows "--" goes to every `vllm serve`. Written to --out: bench.json after every measurement,
report.html, and the logs. Ctrl-C ends the run; what was measured until then is kept and shown.
"""


def add_parser(subparsers: Any) -> None:
    from vllm_nvfp4.bench.variants import KINDS

    parser = subparsers.add_parser(
        "bench",
        help="measure a served model: speed, latency, memory, energy, against others too",
        description="Serve MODEL and measure it with vLLM's own benchmark, over HTTP.",
        epilog=_EPILOG.format(kinds="\n".join(f"  {k:6} {v}" for k, v in KINDS.items())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, or a model in the Hugging Face cache")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the results (default: bench-<model>-<time>)",
    )
    add("--batches", type=listed(whole()), default="1,2,4,8,16,32,64", metavar="N,N,...",
        help="requests at once in the batch table (default: %(default)s)")  # fmt: skip
    add(
        "--tokens",
        type=whole(),
        default=128,
        metavar="N",
        help="tokens of each answer in the batch table (default: 128)",
    )
    add(
        "--prompt",
        type=whole(),
        default=32,
        metavar="N",
        help="tokens of each prompt in the batch table (default: 32)",
    )
    add("--rates", type=listed(_RATE), default=None, metavar="R,R,...",
        help="requests per second under load (default: all at once, then 25, 50 and 75 %% of "
        "the rate that this reaches)",
        )  # fmt: skip
    add("--load-requests", type=whole(0), default=48, metavar="N",
        help="requests at each rate (default: 48; 0: no load)")  # fmt: skip
    add(
        "--load-prompt",
        type=whole(),
        default=256,
        metavar="N",
        help="tokens of each prompt under load (default: 256)",
    )
    add(
        "--load-tokens",
        type=whole(),
        default=128,
        metavar="N",
        help="tokens of each answer under load (default: 128)",
    )
    add("--goodput", type=listed(_objective), default="ttft:2000,tpot:100", metavar="NAME:MS,...",
        help="milliseconds within which a request counts as good; NAME is "
        f"{', '.join(_OBJECTIVES)} (default: %(default)s)")  # fmt: skip
    add("--against", action="append", default=[], metavar="NAME[=MODEL]",
        help="measure this too, in turns with MODEL; may be repeated; see below")  # fmt: skip
    add(
        "--turns",
        type=whole(),
        default=3,
        metavar="N",
        help="how often each server is started and measured (default: 3)",
    )
    add(
        "--seed",
        type=any_whole,
        default=0,
        metavar="N",
        help="seed of the prompts and of the times at which they arrive (default: 0)",
    )


def _objective(text: str) -> str:
    name, _, limit = text.partition(":")
    if name not in _OBJECTIVES:
        names = ", ".join(_OBJECTIVES)
        raise argparse.ArgumentTypeError(f"found {text!r}; needs NAME:MS with NAME of {names}")
    _LIMIT(limit or "0")
    return text


def run(args: argparse.Namespace) -> int:
    """0; 1 where a variant of --against could not be measured; 130 after Ctrl-C."""
    from vllm_nvfp4.bench import page
    from vllm_nvfp4.bench.results import FILE_NAME
    from vllm_nvfp4.bench.summary import first_sentence, reproduce_line

    bench = prepare(args)
    print(f"{bench.results.title}: {bench.num_planned} measurements, into {bench.out}", flush=True)
    is_interrupted = False
    with _sigterm_as_ctrl_c():
        try:
            bench.run(lambda line: print(line, flush=True))
        except KeyboardInterrupt:
            is_interrupted = True
    done = len(bench.results.measurements)
    if is_interrupted:
        kept = f"{done} of {bench.num_planned} measurements are kept in {bench.out / FILE_NAME}"
        print(f"\ninterrupted: {kept if done else 'nothing was measured yet'}", file=sys.stderr)
    if done:
        # The page first: a reader of the tables (head, less) may be gone before their end.
        written = page.write({bench.out.name: bench.results}, bench.out / page.PAGE_NAME)
        first = first_sentence({bench.out.name: bench.results})
        page.print_tables(page.run_tables(bench.results), first)
        print(f"again: {reproduce_line(bench.results)}")
        print(f"page: {written}")
    if is_interrupted:
        return 130
    return 1 if any(record.failed for record in bench.results.variants) else 0


def prepare(args: argparse.Namespace) -> Bench:
    """Everything that can be wrong is found here, before a server takes its time to start.

    Raises ValueError, or CheckpointError, which is one.
    """
    from vllm_nvfp4.bench import variants
    from vllm_nvfp4.bench.meters import find_meter
    from vllm_nvfp4.bench.run import Bench, Settings

    _require_pictures()
    own = variants.own(args.model)
    served = [own, *(variants.against(text, own.folder) for text in args.against)]
    names = [variant.name for variant in served]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"--against {repeated}: measured already; name each variant once")
    from vllm_nvfp4.serving import arguments

    arguments.check([str(own.folder), *args.after_dashes], with_port=False)
    settings = Settings(
        str(own.folder), args.batches, args.prompt, args.tokens, args.rates or (),
        args.load_requests, args.load_prompt, args.load_tokens, args.goodput, args.turns,
        args.seed, tuple(args.after_dashes),
    )  # fmt: skip
    when = time.strftime("%Y%m%d-%H%M%S")
    out = args.out or Path(f"bench-{own.folder.resolve().name}-{when}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists already; needs a new or an empty folder")
    check_can_write("--out", out, is_folder=True)
    _check_flags([[str(v.folder), *args.after_dashes, *v.flags] for v in served])
    bench = Bench(settings, served, find_meter(cpu_metadata.is_cpu_build()), out)
    bench.check_memory()
    return bench


def _check_flags(commands: list[list[str]]) -> None:
    """Have vLLM read the flags of every server, not only of the first that is started."""
    from vllm_nvfp4.serving.launch import check_flags

    if any(len(command) > 1 for command in commands):
        environ = dict(os.environ)
        cpu_metadata.apply(environ)
        check_flags(commands, environ)


def _require_pictures() -> None:
    from importlib.util import find_spec

    if missing := [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]:
        raise ValueError(f"the report needs {' and '.join(missing)}: {install_hint('pictures')}")


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
