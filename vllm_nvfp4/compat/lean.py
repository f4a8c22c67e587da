# SPDX-License-Identifier: Apache-2.0
"""Half of vLLM's import, for a process that asks about a model's layers and serves nothing.

vLLM and transformers import what they can do without where it is installed, which takes as long as
all the rest. They are told that it is not. Of the rest, half was the search for cycles among what
is imported, Inductor, and the end of a process with five thousand modules.
"""

from __future__ import annotations

import atexit
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NoReturn

from packaging.version import Version

from vllm_nvfp4.compat import cpu_metadata
from vllm_nvfp4.compat.messages import message_of

FLAG = "--lean"

# Asked for in a `try`, or by find_spec: for traces, for other executors, for assisted decoding, and
# for the encoding of a page.
_OPTIONAL = ("opentelemetry", "pandas", "pyarrow", "ray", "scipy", "sklearn", "chardet")
# Asked for by `import vllm` alone, in a `try` since this torch: how its operations are compiled.
_COMPILER, _TRIED_SINCE = "torch._inductor.lowering", Version("2.12")


def ask(
    module: str,
    arguments: Sequence[str],
    environ: Mapping[str, str],
    mark: str,
    timeout: float | None = None,
) -> tuple[str | None, subprocess.CompletedProcess[str]]:
    """(What a module says that is run in a process of its own, or None; how that process ended).

    module:    of this package; its ``main`` is :func:`answer`
    mark:      what the line of the answer begins with; the last such line counts
    Where it ends by a traceback, or what it says may be for want of an optional package, it is
    asked again with all of them. Raises subprocess.TimeoutExpired after ``timeout`` seconds of one
    process.
    """
    command = [sys.executable, "-m", module]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": timeout}
    ended = subprocess.run([*command, FLAG, *arguments], env=environ, **options)
    said = last_line(ended.stdout, mark)
    words = ended.stderr if said is None else said
    has_failed = said is None and (ended.returncode != 1 or "Traceback" in words)
    if has_failed or is_missed(words):
        ended = subprocess.run([*command, *arguments], env=environ, **options)
        said = last_line(ended.stdout, mark)
    return said, ended


def last_line(printed: str, mark: str) -> str | None:
    """The last line that begins with ``mark``."""
    return next((x for x in reversed(printed.splitlines()) if x.startswith(mark)), None)


def answer(argv: Sequence[str], find: Callable[..., str]) -> int:
    """What ``main`` of a module does: print what is found, one line, of the arguments; 1 with one
    line of error. FLAG is followed. To be called before vLLM is imported."""
    cpu_metadata.apply()
    if argv[0] == FLAG:
        leave_out()
        argv = argv[1:]
    try:
        print(find(*argv))
    except (ValueError, OSError) as error:  # a refusal: with more packages it is the same
        print(message_of(error), file=sys.stderr)
        return 1
    return 0


def leave_out() -> None:
    """Import none of the optional packages from now on, nor what compiles; what is imported stays,
    so that until :func:`look_here` no cycles are looked for."""
    gc.disable()
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    for name in _OPTIONAL:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    if Version(metadata.version("torch")) >= _TRIED_SINCE:
        sys.modules[_COMPILER] = None  # type: ignore[assignment]
        import vllm  # noqa: F401

        del sys.modules[_COMPILER]


def end(status: int) -> NoReturn:
    """Leave the process without taking it down module by module."""
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(status)


def is_missed(said: str) -> bool:
    """Whether an error may be for want of an optional package."""
    return any(name in said for name in _OPTIONAL)


def look_here() -> None:
    """Have vLLM look at a model's class in this process, not in one that imports vLLM again, as it
    does before it starts a GPU."""
    from vllm.model_executor.models import registry

    gc.freeze()
    gc.enable()
    vars(registry)["_run_in_subprocess"] = _here


def _here(function: Any) -> Any:
    return function()
