# SPDX-License-Identifier: Apache-2.0
"""README.md, CONTRIBUTING.md and docs/: their code blocks, and the command lines in these."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
# Why a block is not run here; its command lines are parsed all the same.
MARKS = ("gpu", "hub", "network", "long", "docker", "changes the environment")
# What a block can be. One of plain text is no command: a tree, an answer, a formula.
KINDS = ("sh", "python", "dockerfile", "text")
_BLOCK = re.compile(r"(?:^<!-- ([^\n]*?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block. marks: from the comment on the line before it, ``<!-- gpu, hub: why -->``."""

    page: Path
    line: int
    kind: str
    marks: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of each command line of a block for a shell, comments left out."""
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        marks, kind, body = match.groups()
        names = marks.partition(":")[0].split(", ") if marks else []
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(Block(page, line, kind, tuple(names), body))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = [(block, words) for block in BLOCKS if block.kind == "sh" for words in block.commands()]


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def quoted_in(page: Path) -> list[str]:
    """What stands in backquotes in running text, headings included."""
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose_of(page))]
