# SPDX-License-Identifier: Apache-2.0
"""The table and the JSON of `vllm-nvfp4 quality`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vllm_nvfp4.quality.statistics import Row

# Of the object that --json prints: docs/json.md.
SCHEMA = 1
_HEADER = ("", "reference", "this", "difference", "standard error")


def table(rows: Sequence[Row]) -> str:
    """Aligned columns; "-" where there is nothing to say."""
    cells = [_HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADER))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in cells
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.metric,
        _number(row.reference),
        _number(row.value),
        _number(row.difference, sign="+"),
        _number(row.standard_error),
    )


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def as_json(rows: Sequence[Row], about: dict[str, Any]) -> dict[str, Any]:
    """``about`` and the rows; NaN and infinity become null, which JSON can say."""
    return {"schema": SCHEMA} | about | {"rows": [_finite(dataclasses.asdict(row)) for row in rows]}


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    infinite = (float("inf"), float("-inf"))
    return {
        k: None if isinstance(v, float) and (v != v or v in infinite) else v for k, v in row.items()
    }
