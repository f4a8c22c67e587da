# SPDX-License-Identifier: Apache-2.0
"""The two definitions of namespace ptx: what a GPU executes and what the emulator does."""

from __future__ import annotations

import re

from vllm_nvfp4.testing.host_kernel import csrc_dir


def functions(text: str) -> set[str]:
    text = re.sub(r"namespace detail \{.*?\}  // namespace detail", "", text, flags=re.DOTALL)
    text = re.sub(r"//.*|^#define .*(?:\\\n.*)*", "", text, flags=re.MULTILINE)
    names = re.findall(r"(?:__forceinline__|^inline) [\w:]+\*? (\w+)\(", text, re.MULTILINE)
    return set(names) | set(re.findall(r"^VNVFP4_(?:MMA|LDMATRIX)\((\w+),", text, re.MULTILINE))


def test_the_emulator_defines_exactly_the_functions_of_ptx_cuh() -> None:
    device = functions((csrc_dir() / "ptx.cuh").read_text())
    host = functions((csrc_dir() / "host/ptx_host.h").read_text())
    assert len(device) > 50
    assert device == host


def test_the_guide_lists_every_function_of_ptx_cuh() -> None:
    """By its name, or by the end of it in the row of one that begins alike: ..._v4, `_v2`."""
    guide = (csrc_dir() / "host/README.md").read_text()
    rows = [line for line in guide.splitlines() if line.startswith("| `")]

    def is_listed(name: str) -> bool:
        stem, _, end = name.removesuffix("_trans").rpartition("_")
        return any(
            re.search(rf"\b{name}\b", row) or (f"{stem}_" in row and re.search(rf"_{end}\b", row))
            for row in rows
        )

    device = functions((csrc_dir() / "ptx.cuh").read_text())
    assert [name for name in sorted(device) if not is_listed(name)] == []
    assert not is_listed("cvt_f16x2_to_e5m2x2")


def test_asm_stands_in_ptx_cuh_alone() -> None:
    for path in csrc_dir().glob("*.cuh"):
        has_asm = re.search(r"\basm\b\s*(volatile)?\s*\(", path.read_text())
        assert bool(has_asm) == (path.name == "ptx.cuh"), path.name
