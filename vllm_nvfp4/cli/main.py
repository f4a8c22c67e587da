# SPDX-License-Identifier: Apache-2.0
"""The ``vllm-nvfp4`` command. Every module beside this one is a subcommand of its name.

A command module has ``add_parser(subparsers)``, which adds its parser, and ``run(args) -> int``,
which returns the exit status. It imports torch and vLLM inside ``run`` only, if at all, so that
``--help`` and ``inspect`` answer at once. Modules whose name begins with "_" are helpers.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence

import vllm_nvfp4
from vllm_nvfp4 import cli


def command_names() -> list[str]:
    modules = pkgutil.iter_modules(cli.__path__)
    return sorted(m.name for m in modules if m.name != "main" and not m.name.startswith("_"))


def build_parser(names: Sequence[str]) -> tuple[argparse.ArgumentParser, dict]:
    """The parser with the subcommands ``names``, and each one's ``run``."""
    parser = argparse.ArgumentParser(
        prog="vllm-nvfp4", description="Serve NVFP4 and MXFP4 language models with vLLM."
    )
    parser.add_argument("--version", action="version", version=vllm_nvfp4.__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    runs = {}
    for name in names:
        module = importlib.import_module(f"vllm_nvfp4.cli.{name}")
        module.add_parser(subparsers)
        runs[name] = module.run
    return parser, runs


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    names = command_names()
    if argv and argv[0] in names:
        names = [argv[0]]
    parser, runs = build_parser(names)
    args = parser.parse_args(argv)
    try:
        return runs[args.command](args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing is left to say, not even at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"vllm-nvfp4 {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
