# SPDX-License-Identifier: Apache-2.0
"""``vllm-nvfp4 serve MODEL [any vLLM flag]``: vLLM's own server with this project's defaults."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from vllm_nvfp4.serving import arguments
from vllm_nvfp4.serving.host import command_line

_USAGE = """usage: vllm-nvfp4 serve MODEL [any flag of `vllm serve`]

vLLM's own OpenAI-compatible server, with these defaults where nothing else is given:
  --quantization nvfp4
  on a CPU:
    --kv-cache-memory-bytes  a quarter of the available memory
    --enforce-eager          where no C++ compiler can serve torch.compile
    VLLM_USE_AOT_COMPILE=0   so that later starts reuse what the first one compiled

`vllm-nvfp4 serve --help=all` lists vLLM's flags.
"""


def add_parser(subparsers: Any) -> None:
    # No argument begins with NUL, so argparse takes all of them, flags included, as they are.
    parser = subparsers.add_parser(
        "serve",
        help="vLLM's server with this project's defaults",
        add_help=False,
        prefix_chars="\0",
    )
    parser.add_argument("vllm_args", nargs="*")


def run(args: argparse.Namespace) -> int:
    is_question = any(arg.startswith("--help") for arg in args.vllm_args)
    if not args.vllm_args or args.vllm_args[0] in ("-h", "--help"):
        print(_USAGE, end="")
    elif is_question:
        replace_this_process(args.vllm_args)
    else:
        arguments.check(args.vllm_args)
        replace_this_process(args.vllm_args)
    return 0 if args.vllm_args else 2


def replace_this_process(vllm_args: Sequence[str]) -> NoReturn:
    """Become vLLM's server: signals reach it as if it had been started directly."""
    command, environ, notes = command_line(vllm_args)
    for note in notes:
        print(f"vllm-nvfp4: {note}", file=sys.stderr)
    sys.stderr.flush()
    os.execve(command[0], command, environ)
