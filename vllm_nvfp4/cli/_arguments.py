# SPDX-License-Identifier: Apache-2.0
"""What the values of flags have to be: converters for argparse, each with a message of its own."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def whole(least: int = 1) -> Callable[[str], int]:
    """A whole number from ``least`` on."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"found {text!r}; needs a whole number, {least} or more"
            )
        return value

    return convert


def tokens(text: str) -> int:
    """A number of tokens, 1 or more; ``16k`` is 16 * 1024."""
    digits = text.lower().removesuffix("k")
    if not digits.isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(
            f"found {text!r}; needs a number of tokens, such as 16384 or 16k"
        )
    return int(digits) * (1024 if len(digits) < len(text) else 1)


def number(
    least: float = 0.0, above: bool = False, what: str = "a number"
) -> Callable[[str], float]:
    """A finite number from ``least`` on, or ``above`` it; ``what`` is what it counts."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (value > least if above else value >= least)):
            limit = f"above {least:g}" if above else f"{least:g} or more"
            raise argparse.ArgumentTypeError(f"found {text!r}; needs {what}, {limit}")
        return value

    return convert


def any_whole(text: str) -> int:
    """A whole number of either sign, such as a seed."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}; needs a whole number") from None


def listed(convert: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Values of ``convert`` between commas."""

    def split(text: str) -> tuple[T, ...]:
        return tuple(convert(item.strip()) for item in text.split(","))

    return split
