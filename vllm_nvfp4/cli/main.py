# SPDX-License-Identifier: Apache-2.0
"""The ``vllm-nvfp4`` command. Every module beside this one is a subcommand of its name.

A command module has ``add_parser(subparsers)``, which adds its parser, and ``run(args) -> int``,
which returns the exit status; ``args.after_dashes`` is what follows "--" on the command line, if
the module says ``TAKES_AFTER_DASHES = True``. It imports torch and vLLM inside ``run`` only, if at
all, so that ``--help`` and ``inspect`` answer at once. Modules whose name begins with "_" are
helpers.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

import vllm_nvfp4
from vllm_nvfp4 import cli


class _Parser(argparse.ArgumentParser):
    """A wrong command line is answered in one line, as every other error is."""

    def error(self, message: str) -> NoReturn:
        more = f"`{self.prog} --help` lists what there is."
        self.exit(2, f"{self.prog}: {message}; {more}\n")


def command_names() -> list[str]:
    modules = pkgutil.iter_modules(cli.__path__)
    return sorted(m.name for m in modules if m.name != "main" and not m.name.startswith("_"))


def build_parser(
    names: Sequence[str],
) -> tuple[argparse.ArgumentParser, dict[str, ModuleType]]:
    """The parser with the subcommands ``names``, and the module of each."""
    parser = _Parser(
        prog="vllm-nvfp4", description="Serve NVFP4 and MXFP4 language models with vLLM."
    )
    parser.add_argument("--version", action="version", version=vllm_nvfp4.__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    modules = {name: importlib.import_module(f"vllm_nvfp4.cli.{name}") for name in names}
    for module in modules.values():
        module.add_parser(subparsers)
    return parser, modules


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    names = command_names()
    if argv and argv[0] in names:
        names = [argv[0]]
    parser, modules = build_parser(names)
    after_dashes: list[str] = []
    if "--" in argv and getattr(modules.get(argv[0]), "TAKES_AFTER_DASHES", False):
        split = argv.index("--")
        argv, after_dashes = argv[:split], argv[split + 1 :]
    args = parser.parse_args(argv, argparse.Namespace(after_dashes=after_dashes))
    try:
        status = modules[args.command].run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing is left to say, not even at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"vllm-nvfp4 {args.command}: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        todo = "`vllm-nvfp4 doctor` says what is missing"
        print(f"vllm-nvfp4 {args.command}: {error}; {todo}", file=sys.stderr)
        return 1
    except MemoryError:
        print(f"vllm-nvfp4 {args.command}: out of memory", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
