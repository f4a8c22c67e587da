#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run the tests that depend on the CPU's instructions as a lesser CPU would run them.

    python scripts/on_cpu.py avx2 [pytest's arguments]

The level is one of tests/support/lesser_cpu_site/lesser_cpu.py, the tests are those marked
``cpu_path``. On a CPU of that level the ordinary run has been the same: then one line says so and
nothing runs. Exit status: pytest's, or 1 on a CPU below the level.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/support/lesser_cpu_site"))
import lesser_cpu

ROOT = Path(__file__).resolve().parent.parent
MARKER = "cpu_path"


def marked_files() -> list[str]:
    """The test files that have the marker; to collect all of them would take as long as to run."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if f"mark.{MARKER}" in f.read_text()]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("level", choices=lesser_cpu.LEVELS)
    args, pytest_args = parser.parse_known_args()
    own = lesser_cpu.machine_level()
    order = list(lesser_cpu.MACHINES)
    if own == args.level:
        print(f"on_cpu: not run: this CPU is {own} itself, and `make test` has tested that")
        return 0
    if own is None or order.index(own) > order.index(args.level):
        print(f"on_cpu: this CPU is {own or 'below avx2'}, less than {args.level}", file=sys.stderr)
        return 1
    print(f"Tests marked {MARKER}, on this {own} CPU as on one of {args.level}:", flush=True)
    command = [sys.executable, "-m", "pytest", "-m", f"{MARKER} and not gpu and not trust"]
    command += [*pytest_args, *marked_files()]
    environment = os.environ | {lesser_cpu.VARIABLE: args.level}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
