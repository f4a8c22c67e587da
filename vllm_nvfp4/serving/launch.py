# SPDX-License-Identifier: Apache-2.0
"""vLLM's server with this project's manners: ``python -m vllm_nvfp4.serving.launch serve ARGS``.

Runs vLLM's own command in this process. A wrong flag is answered by one line, not by pages of
usage, and an error that ends the server by its message, not by a traceback through vLLM;
VLLM_LOGGING_LEVEL=DEBUG shows that too. A model that would not load is refused before the engine
starts (first_check.py). ``--check`` in front stops after the flags were read:

    python -m vllm_nvfp4.serving.launch --check [["MODEL", "--flag"], ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from vllm_nvfp4.compat.flags import FlagError, check_names, keep_flags, raise_flag_errors
from vllm_nvfp4.compat.messages import message_of
from vllm_nvfp4.compat.quiet import shows_everything
from vllm_nvfp4.options import METHOD_NAMES
from vllm_nvfp4.serving import arguments, first_check

PREFIX = "vllm-nvfp4 serve: "
MODULE = "vllm_nvfp4.serving.launch"
_CHECK = "--check"
# argparse's own, for a command line that it cannot read.
USAGE_STATUS = 2


def main(argv: Sequence[str]) -> int:
    """Run vLLM's command; its exit status."""
    try:
        raise_flag_errors()
        if argv[:1] == [_CHECK]:
            for args in json.loads(argv[1]):
                read(args)
            return 0
        return _serve(argv)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if shows_everything():
            raise
        print(f"{PREFIX}{message_of(error)}", file=sys.stderr)
        return USAGE_STATUS if isinstance(error, FlagError) else 1


def read(args: Sequence[str]) -> Any:
    """vLLM's own reading of what follows `vllm serve`; raises FlagError where that is wrong."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    command = ServeSubcommand()
    keep_flags(command.subparser_init(parser.add_subparsers(dest="subparser")))
    parsed = parser.parse_args(["serve", *args])
    command.validate(parsed)
    return parsed


def _serve(argv: Sequence[str]) -> int:
    from vllm.entrypoints.cli import main as vllm_main
    from vllm.entrypoints.cli.serve import ServeSubcommand

    validate, make_parser = ServeSubcommand.validate, ServeSubcommand.subparser_init
    flags = arguments.read_flags(argv[1:])

    def check_too(self: Any, args: Any) -> None:
        validate(self, args)
        # A model behind flags, which only vLLM's parser can tell from their values.
        if arguments.model_of(argv[1:], flags) is None:
            arguments.check_model(
                args.model_tag or args.model,
                args.revision or "main",
                args.quantization in METHOD_NAMES,
            )
        if args.quantization in METHOD_NAMES and not args.headless:
            first_check.run(args)

    def keep_too(self: Any, subparsers: Any) -> Any:
        parser = make_parser(self, subparsers)
        keep_flags(parser)
        return parser

    ServeSubcommand.subparser_init = keep_too  # type: ignore[method-assign]
    ServeSubcommand.validate = check_too  # type: ignore[method-assign]
    sys.argv = ["vllm", *argv]
    vllm_main.main()
    return 0


def check_flags(commands: Sequence[Sequence[str]], environ: dict[str, str]) -> None:
    """Have vLLM's parser read command lines of `vllm serve`, in a process of its own.

    Raises ValueError with its one line for the first that is wrong. Takes vLLM's import, unless
    a name that :func:`check_names` knows is wrong.
    """
    for args in commands:
        check_names(args)
    command = [sys.executable, "-m", MODULE, _CHECK, json.dumps([list(c) for c in commands])]
    result = subprocess.run(command, capture_output=True, text=True, env=environ)
    if result.returncode:
        lines = result.stderr.splitlines() or [f"vLLM ended with status {result.returncode}"]
        said = [line.removeprefix(PREFIX) for line in lines if line.startswith(PREFIX)]
        raise ValueError(said[-1] if said else lines[-1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
