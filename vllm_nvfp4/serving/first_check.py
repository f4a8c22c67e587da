# SPDX-License-Identifier: Apache-2.0
"""Before a server starts: will the model load? Answered in a copy of the process that is thrown
away, so that the server's own has built no model and made no parallel group."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from vllm_nvfp4.checking.check import examine
from vllm_nvfp4.checking.report import Report, from_json
from vllm_nvfp4.compat.quiet import shows_everything

# Errors that only a model without data has.
_NOT_THE_MODELS = ("NotImplementedError", "meta tensor", "meta device")


def run(args: argparse.Namespace) -> None:
    """Raise ValueError with one line if the model that vLLM's parsed ``args`` name will not load.

    A check that cannot be made stops no server; it says so in one line.
    """
    report = in_a_copy(lambda: _report(args))
    if isinstance(report, str) or any(_is_not_the_models(error) for error in report.errors):
        why = report if isinstance(report, str) else str(report.errors[0])
        print(f"vllm-nvfp4: the model was not checked: {why}", file=sys.stderr)
        return
    for finding in report.dropped:
        print(f"vllm-nvfp4: {finding}", file=sys.stderr)
    if report.errors:
        more = len(report.errors) - 1
        others = f" And {more} more: vllm-nvfp4 check {report.model}" if more else ""
        raise ValueError(f"{report.errors[0]}{others}")


def _is_not_the_models(error: Any) -> bool:
    return any(mark in error.message for mark in _NOT_THE_MODELS)


def _report(args: argparse.Namespace) -> Report:
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = copy.copy(args)
    if getattr(args, "model_tag", None) is not None:
        args.model = args.model_tag
    return examine(AsyncEngineArgs.from_cli_args(args))


def in_a_copy(make: Callable[[], Report]) -> Report | str:
    """The report that ``make`` gives in a fork of this process, or why there is none.

    This process must have no threads that matter to ``make``, and no engine.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            os.close(reader)
            _be_silent()
            with os.fdopen(writer, "w") as stream:
                json.dump(make().to_json(), stream)
            status = 0
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    try:
        return from_json(json.loads(text))
    except ValueError:
        return f"the process that did ended with status {os.waitstatus_to_exitcode(status)}"


def _be_silent() -> None:
    """What vLLM logs here, the server logs again."""
    if not shows_everything():
        logging.getLogger("vllm").setLevel(logging.CRITICAL)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
