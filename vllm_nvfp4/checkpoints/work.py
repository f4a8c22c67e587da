# SPDX-License-Identifier: Apache-2.0
"""Where a run that may be killed keeps what it has finished, so that the next one goes on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def work_folder(target: Path) -> Path:
    """Where a resumable run keeps what it has finished, beside its target."""
    return target.parent / f".{target.name}.quantize"


@contextlib.contextmanager
def work_in(target: Path, arguments: Mapping[str, Any]) -> Iterator[Path]:
    """The work folder of ``target``, held by this process alone, for these arguments alone."""
    import fcntl

    work = work_folder(target)
    work.mkdir(parents=True, exist_ok=True)
    found = work / "arguments.json"
    text = json.dumps(arguments, sort_keys=True, default=str)
    mark = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "arguments": json.loads(text)}
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"{work}: another run is writing {target}; wait for it") from None
        if found.is_file():
            earlier = json.loads(found.read_text())
            if earlier["sha256"] != mark["sha256"]:
                raise FileExistsError(
                    f"{work} holds a run that was not finished, with other arguments or another "
                    f"source (differing: {_differing(earlier['arguments'], mark['arguments'])}); "
                    "repeat that run's arguments to go on, or remove the folder"
                )
        else:
            _replace(found, json.dumps(mark, indent=2) + "\n")
        yield work


def _differing(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = sorted({*earlier, *now})
    return ", ".join(n for n in names if earlier.get(n) != now.get(n))


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
