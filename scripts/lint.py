#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run every check of style and types, all of them, and end with 1 if any found something.

With --fix, the tools that can put right what they find do so.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Not resolved: the tools lie beside the environment's python, not beside the one it links to.
BIN = Path(sys.executable).parent


def commands(fix: bool) -> dict[str, list[str]]:
    """Name -> command line of each check."""
    kernels = sorted(
        str(path.relative_to(ROOT))
        for suffix in ("cu", "cuh", "h", "cpp")
        for path in (ROOT / "csrc").rglob(f"*.{suffix}")
    )
    checks = {
        "ruff check": ["ruff", "check", *(["--fix"] if fix else []), "."],
        "ruff format": ["ruff", "format", *([] if fix else ["--check"]), "."],
        "mypy": ["mypy"],
        "imports": ["lint-imports", "--no-cache"],
        "typos": ["typos", *(["--write-changes"] if fix else [])],
    }
    if kernels:
        mode = ["-i"] if fix else ["--dry-run", "-Werror"]
        checks["clang-format"] = ["clang-format", *mode, *kernels]
    return checks


def main() -> int:
    failed = []
    for name, (tool, *arguments) in commands("--fix" in sys.argv[1:]).items():
        result = subprocess.run(
            [str(BIN / tool), *arguments],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        print(f"{name:14} {'ok' if result.returncode == 0 else 'FAILED'}", flush=True)
        if result.returncode:
            failed.append(name)
            print(result.stdout, flush=True)
    if failed:
        print(f"lint: {', '.join(failed)} failed; `make format` puts right what tools can")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
