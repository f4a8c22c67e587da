# SPDX-License-Identifier: Apache-2.0
"""What a command asks vLLM of a model, asked of a process forked off one that has imported it.

`check`, `inspect`, `plan` and `quantize` ask in an interpreter of its own (lean.ask), which takes
nine seconds to import vLLM and one to answer. Tests marked own_process have it so.
"""

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import forked_ranks

from vllm_nvfp4.compat import lean


def _answer(module, arguments, environ, folder):
    os.environ.clear()
    os.environ.update(environ)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    sys.exit(importlib.import_module(module).main(arguments))


def ask(module, arguments, environ, mark, timeout=None):
    """As lean.ask."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("out", "err"):
            (folder / file).touch()
        process = forked_ranks.context().Process(
            target=_answer, args=(module, list(arguments), dict(environ), folder)
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(module, timeout)
        printed, errors = ((folder / file).read_text() for file in ("out", "err"))
    ended = subprocess.CompletedProcess(module, process.exitcode, printed, errors)
    return lean.last_line(printed, mark), ended
