# SPDX-License-Identifier: Apache-2.0
"""What an engine in this process prints, apart from what the command says."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from vllm_nvfp4.compat.quiet import shows_everything

# The plugin's own lines: which path is taken, and why.
_OURS = re.compile(r"\bnvfp4: .*")


class EngineLog:
    """out: standard error as it was; path: of the file that has everything else."""

    def __init__(self, out: TextIO, path: Path | None) -> None:
        self.out, self.path = out, path
        self.is_kept = False

    def keep(self) -> str:
        """Leave the file, for someone who has to find out what went wrong; says where it is."""
        self.is_kept = True
        return f" (log: {self.path})" if self.path else ""

    def our_lines(self) -> list[str]:
        """The plugin's lines so far, each once."""
        text = self.path.read_text(errors="replace") if self.path else ""
        return list(dict.fromkeys(_OURS.findall(text)))


@contextlib.contextmanager
def engine_log(name: str) -> Iterator[EngineLog]:
    """Standard output and error of this process, of its libraries and its children, go to a file.

    vLLM, torch and others print there as they like. At the end the plugin's lines are shown, and
    the file is removed unless it was kept. With VLLM_LOGGING_LEVEL=DEBUG everything is shown, on
    standard error.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    path = None
    stream = sys.stderr
    if shows_everything():
        os.dup2(2, 1)
    else:
        handle, text = tempfile.mkstemp(prefix=f"vllm-nvfp4-{name}-", suffix=".log")
        path = Path(text)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        stream = os.fdopen(handle, "w", buffering=1, errors="replace")
    with os.fdopen(os.dup(kept[1]), "w", buffering=1) as out:
        log = EngineLog(out, path)
        try:
            with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
                yield log
        finally:
            sys.stdout.flush()
            for descriptor, original in zip((1, 2), kept, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
            if path:
                stream.close()
                for line in log.our_lines():
                    print(line, file=out)
                if not log.is_kept:
                    path.unlink(missing_ok=True)
