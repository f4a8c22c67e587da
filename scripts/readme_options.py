#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the table of options in README.md from vllm_nvfp4/options.py.

With --check, write nothing and end with 1 if the table is not current.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vllm_nvfp4.options import markdown_table

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- options: written by scripts/readme_options.py from vllm_nvfp4/options.py -->\n"
END = "<!-- end of options -->\n"


def with_current_table(text: str) -> str:
    """The README with the table between its two marks replaced by the one of the code."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{README.name}: needs once each of {BEGIN.strip()} and {END.strip()}")
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + markdown_table() + END + rest.partition(END)[2]


def main() -> int:
    text = README.read_text()
    current = with_current_table(text)
    if current == text:
        return 0
    if "--check" in sys.argv[1:]:
        print("README.md: the options are not current; run scripts/readme_options.py")
        return 1
    README.write_text(current)
    return 0


if __name__ == "__main__":
    sys.exit(main())
