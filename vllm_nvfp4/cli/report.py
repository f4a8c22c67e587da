# SPDX-License-Identifier: Apache-2.0
"""``vllm-nvfp4 report DIR...``: results of ``vllm-nvfp4 bench`` side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_nvfp4.bench import results
from vllm_nvfp4.cli._files import check_can_write


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "report",
        help="results of `bench` side by side, in the terminal and as one page",
        description="Show results of `vllm-nvfp4 bench`, of several cards, versions or models.",
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="a folder that `bench` wrote"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page to write (default: report.html)",
    )


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for a folder without results."""
    from vllm_nvfp4.bench import page
    from vllm_nvfp4.bench.summary import first_sentence

    check_can_write("--out", args.out)
    runs = {
        name: results.load(folder)
        for name, folder in zip(_names(args.folders), args.folders, strict=True)
    }
    only = next(iter(runs.values())) if len(runs) == 1 else None
    # The page first: a reader of the tables (head, less) may be gone before their end.
    written = page.write(runs, args.out)
    tables = page.run_tables(only) if only else page.side_by_side(runs)
    page.print_tables(tables, first_sentence(runs))
    print(f"page: {written}")
    return 0


def _names(folders: Sequence[Path]) -> list[str]:
    """Each folder's last parts, as many as tell them apart; all of the path if none do."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError("the same folder twice; needs each folder once")
