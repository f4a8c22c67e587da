# SPDX-License-Identifier: Apache-2.0
"""The two definitions of namespace ptx: what a GPU executes and what the emulator does."""

from __future__ import annotations

import re

from vllm_nvfp4.testing.host_kernel import csrc_dir

DEVICE = ("ptx.cuh", "ptx_math.cuh")


def functions(text: str) -> set[str]:
    text = re.sub(r"namespace detail \{.*?\}  // namespace detail", "", text, flags=re.DOTALL)
    text = re.sub(r"//.*|^#define .*(?:\\\n.*)*", "", text, flags=re.MULTILINE)
    names = re.findall(r"(?:__forceinline__|^inline) [\w:]+\*? (\w+)\(", text, re.MULTILINE)
    return set(names) | set(re.findall(r"^VNVFP4_(?:MMA|LDMATRIX)\((\w+),", text, re.MULTILINE))


def test_the_emulator_defines_exactly_the_functions_of_ptx() -> None:
    device = functions("".join((csrc_dir() / name).read_text() for name in DEVICE))
    host = functions((csrc_dir() / "host/ptx_host.h").read_text())
    assert len(device) > 50
    assert device == host


def test_asm_stands_there_alone() -> None:
    for path in csrc_dir().glob("*.cuh"):
        has_asm = re.search(r"\basm\b\s*(volatile)?\s*\(", path.read_text())
        assert bool(has_asm) == (path.name in DEVICE), path.name
