#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Walk the road of a GPU on a machine without one: vLLM for CUDA as the locks pin it, for real.

    python scripts/rehearse.py [--lock requirements/lock-cuda.txt] [--table FILE]

For each lock an environment of its own in .cache/rehearse is brought to what the lock says, with
uv and no local wheels in reach, and checked. Then rehearsal/walk.py runs in it for each card of
rehearsal/stubs.py, with stand-ins of the driver's libraries before it: the plugin registers, vLLM
is configured, models are built, loaded and packed, and whatever comes goes on to where it asks for
a device. A table of the steps is printed, and written to FILE, where the rows stay of releases and
cards that were walked before and are not in this run. Exit status 1 if a step of it failed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bootstrap import pin_of
from installer import Installer, SetupError, unmet
from rehearsal import stubs

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "rehearse"
NVML = ROOT / "tests" / "support" / "stub_nvml.c"
STAMP = "vllm-nvfp4.stamp"


@dataclass(frozen=True)
class Row:
    """One step: of the release of vLLM, on the card, with what became of it, and when: of which
    commit."""

    release: str
    card: str
    step: str
    outcome: str
    seconds: float
    detail: str
    commit: str = ""

    @property
    def walk(self) -> tuple[str, str]:
        return self.release, self.card


# A line of the table, as :func:`table` writes it.
_LINE = re.compile(
    r"(?P<release>\S{1,8}) +(?P<card>\d+\.\d)? +(?P<commit>[0-9a-f]{7})? +"
    r"(?P<outcome>ok|failed|needs a device) +(?P<seconds>[\d.]+)"
    r"  (?P<step>.+?)(  (?P<detail>.+))?"
)


def rows_of(text: str) -> list[Row]:
    """The rows of a table that was written before."""
    rows = []
    for line in text.splitlines():
        if found := _LINE.fullmatch(line):
            values: dict[str, Any] = {n: value or "" for n, value in found.groupdict().items()}
            rows.append(Row(**values | {"seconds": float(values["seconds"])}))
    return rows


def merged(rows: list[Row], earlier: list[Row]) -> list[Row]:
    """The rows of this run, and those of walks that it did not make; newest release first, cards as
    they are walked."""
    now = {row.walk for row in rows}
    cards = ["", *(card.arch for card in stubs.CARDS)]
    both = rows + [row for row in earlier if row.walk not in now]
    return sorted(
        both, key=lambda row: ([-int(n) for n in row.release.split(".")], cards.index(row.card))
    )


def release_of(lock: Path) -> str:
    """The version of vLLM that a lock pins."""
    if not (release := pin_of(lock, "vllm")):
        raise SystemExit(f"rehearse: {lock} pins no vllm==...: give it a lock for CUDA")
    return release


def install(lock: Path, folder: Path) -> list[Row]:
    """The lock's environment, made at the first call, and what the check of it says."""
    release, python = release_of(lock), folder / "bin" / "python"
    rows: list[Row] = []

    @contextlib.contextmanager
    def step(name: str) -> Iterator[None]:
        start, outcome, detail = time.perf_counter(), "ok", ""
        try:
            yield
        except (SetupError, subprocess.CalledProcessError) as error:
            outcome, detail = "failed", " ".join(str(error).split())
        rows.append(Row(release, "", name, outcome, round(time.perf_counter() - start, 1), detail))

    def is_whole() -> bool:
        return all(row.outcome == "ok" for row in rows)

    # A folder of wheels of this machine must not decide what is installed.
    os.environ.pop("PIP_FIND_LINKS", None)
    os.environ["UV_FIND_LINKS"] = ""
    stamp, digest = folder / STAMP, hashlib.sha256(lock.read_bytes()).hexdigest()
    is_made = stamp.is_file() and stamp.read_text() == digest
    if not is_made:
        with step("make the environment"):
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if not is_whole():
        return rows
    with step("get uv"):
        installer = Installer(python, CACHE, CACHE / "install.log")
        if obstacle := installer.use_uv(pin_of(lock, "uv")):
            raise SetupError(obstacle)
    if not is_whole():
        return rows
    if not is_made:
        with step("install the lock"):
            installer.install(f"Installing vLLM {release}", "--no-deps", "-r", str(lock))
            stamp.write_text(digest)
    if is_whole():
        # From this tree, so that its entry point and its files are what is walked.
        editable = ("--no-deps", "--no-build-isolation", "--editable", str(ROOT))
        with step("install vllm-nvfp4"):
            installer.install("Installing vllm-nvfp4", *editable)
        with step("uv pip check"):
            if missing := unmet(python, installer.uv):
                raise SetupError("; ".join(missing))
    installer.finish()
    return rows


def walk(release: str, folder: Path, card: stubs.Card, is_short: bool) -> list[Row]:
    """Run rehearsal/walk.py in the environment, with a card before it."""
    site = next(folder.glob("lib/python3*/site-packages"))
    with tempfile.TemporaryDirectory() as temporary:
        stand_ins, out = Path(temporary), Path(temporary) / "rows.jsonl"
        stubs.build_driver(site, stand_ins)
        stubs.build_nvml(NVML, stand_ins)
        runtime = stubs.build_runtime(stand_ins)
        environment = os.environ | stubs.card_variables(card)
        environment |= {
            "LD_LIBRARY_PATH": str(stand_ins),
            "LD_PRELOAD": str(runtime),
            "PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}",
            "HF_HUB_OFFLINE": "1",
            "VLLM_DISABLE_COMPILE_CACHE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_DISABLE_SHARED_EXPERTS_STREAM": "1",  # a stream needs a device
        }
        command = [str(folder / "bin" / "python"), "-m", "rehearsal.walk", str(out)]
        start = time.perf_counter()
        log = CACHE / f"{release}-{card.arch}.log"
        with log.open("w") as output:
            done = subprocess.run(
                [*command, *(["--short"] if is_short else [])],
                env=environment, cwd=temporary, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        lines = out.read_text().splitlines() if out.is_file() else []
        rows = [Row(release, card.arch, **json.loads(line)) for line in lines]
        if done.returncode and all(row.outcome != "failed" for row in rows):
            seconds = round(time.perf_counter() - start, 1)
            text = f"the walk ended with status {done.returncode}; see {log}"
            rows.append(Row(release, card.arch, "the walk", "failed", seconds, text))
    return rows


def table(rows: list[Row]) -> str:
    """The header of a result, then one line for each step."""
    lines = [
        "# command: make rehearse",
        f"# cpu: {_cpu()}, {os.cpu_count()} cores, no GPU",
        f"# python: {platform.python_version()}",
        f"# date: {datetime.date.today()}",
        "# vLLM  card  commit  outcome  seconds  step  detail",
    ]
    lines += [
        f"{row.release:8}{row.card:5}{row.commit:9}{row.outcome:14}{row.seconds:7.1f}  "
        f"{row.step}  {row.detail}".rstrip()
        for row in rows
    ]
    failed = sum(row.outcome == "failed" for row in rows)
    waits = sum(row.outcome == "needs a device" for row in rows)
    total = sum(row.seconds for row in rows)
    lines.append(f"{len(rows)} steps, {failed} failed, {waits} need a device, {total:.0f} s")
    return "\n".join(lines) + "\n"


def _commit() -> str:
    command = ["git", "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _cpu() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lock", type=Path, action="append", help="default: all of requirements/lock-cuda*.txt"
    )
    parser.add_argument("--card", action="append", help="compute capability; default: all known")
    parser.add_argument("--table", type=Path, help="write the table there as well")
    args = parser.parse_args()
    missing = [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]
    if missing:
        print(f"rehearse: not on PATH: {', '.join(missing)}. As root: apt-get install gcc binutils")
        return 1
    locks = args.lock or sorted((ROOT / "requirements").glob("lock-cuda*.txt"), reverse=True)
    cards = [card for card in stubs.CARDS if not args.card or card.arch in args.card]
    CACHE.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    earlier = rows_of(args.table.read_text()) if args.table and args.table.is_file() else []
    commit = _commit() or "0000000"

    def add(found: list[Row]) -> None:
        rows.extend(replace(row, commit=commit) for row in found)
        if args.table:  # as far as it goes
            args.table.write_text(table(merged(rows, earlier)))

    for lock in locks:
        release = release_of(lock)
        folder = CACHE / release
        add(install(lock, folder))
        if rows[-1].outcome == "failed":
            continue
        for card in cards:
            # What does not depend on the card is walked on the first, the one this is made for.
            add(walk(release, folder, card, is_short=card is not stubs.CARDS[0]))
    print(table(rows), end="")
    return int(any(row.outcome == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
