# SPDX-License-Identifier: Apache-2.0
"""Few different numbers of rows in 16-bit products on a CPU.

oneDNN compiles kernels for each that it meets and keeps them for good, whatever the capacity of its
cache: 0.3 MiB for each product of BF16. A routed expert's number of tokens comes once, so that a
run would grow with the number of layers and experts. Rows do not know of each other, and zeros
change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Steps per octave: at most an eighth of the rows is added.
_STEPS = 8
_LEAST_STEP = 16
_PRODUCTS = {
    torch.nn.functional.linear,
    torch.matmul,
    torch.mm,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
}


def row_count(rows: int) -> int:
    """The number of rows that a product of ``rows`` is computed with."""
    step = max(_LEAST_STEP, (1 << rows.bit_length()) // (2 * _STEPS))
    return -(-rows // step) * step


def with_zero_rows(x: torch.Tensor) -> torch.Tensor:
    """[rows, K] with zeros up to :func:`row_count`, on a CPU in 16 bits; others as they are."""
    extra = row_count(len(x)) - len(x)
    if not extra or x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return x
    return torch.nn.functional.pad(x, (0, 0, 0, extra))


class FewRowCounts(TorchFunctionMode):
    """Within it, products whose left factor is a matrix are computed so."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        if func not in _PRODUCTS or len(args) < 2 or args[0].dim() != 2:
            return func(*args, **options)
        return func(with_zero_rows(args[0]), *args[1:], **options)[: len(args[0])]
