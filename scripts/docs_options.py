#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the table of options in docs/options.md from vllm_nvfp4/options.py.

With --check, write nothing and end with 1 if the table is not current.
"""

from __future__ import annotations

import sys

import docs_table

from vllm_nvfp4.options import markdown_table

PAGE = "docs/options.md"
BEGIN = "<!-- options: written by scripts/docs_options.py from vllm_nvfp4/options.py -->\n"
END = "<!-- end of options -->\n"


if __name__ == "__main__":
    sys.exit(docs_table.main(__file__, PAGE, BEGIN, END, markdown_table))
