# SPDX-License-Identifier: Apache-2.0
"""Drafts that share the target's embedding and lm_head, where a table is quantised.

vLLM asks both for ``weight`` to see whether a draft's own table is the target's, of a draft without
one too. A quantised table has none, and the engine would end with an AttributeError. So while vLLM
asks, each such table has a stand-in: as wide, and equal where the tables are.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

_ASKING = ("_maybe_share_embeddings", "_maybe_share_lm_head")
_PROPOSERS = (
    ("vllm.v1.spec_decode.llm_base_proposer", "SpecDecodeBaseProposer"),
    ("vllm.v1.spec_decode.eagle", "EagleProposer"),
)
_SHARE = "vllm.v1.worker.gpu.spec_decode.eagle.utils"


def install() -> None:
    """Have vLLM's questions about tables answered, by either of its model runners."""
    for module, name in _PROPOSERS:
        with contextlib.suppress(ImportError, AttributeError):
            _wrap_proposer(getattr(importlib.import_module(module), name))
    with contextlib.suppress(ImportError, AttributeError):
        share = importlib.import_module(_SHARE)
        asks: Any = share._should_share
        if not hasattr(asks, "nvfp4_answers"):
            _put_in_place(asks, _answered(asks))


def _wrap_proposer(proposer: Any) -> None:
    for name in _ASKING:
        asks = vars(proposer).get(name)
        if asks is not None and not hasattr(asks, "nvfp4_answers"):
            setattr(proposer, name, _answered(asks))


def _answered(asks: Any) -> Any:
    @functools.wraps(asks)
    def with_stand_ins(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        with _stand_ins([*given, *(getattr(g, "model", None) for g in given)]):
            return asks(*args, **kwargs)

    with_stand_ins.nvfp4_answers = True  # type: ignore[attr-defined]
    return with_stand_ins


def _put_in_place(asks: Any, answered: Any) -> None:
    """Other modules have the function under its name too."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.v1.") and vars(module).get("_should_share") is asks:
            module._should_share = answered  # type: ignore[attr-defined]


@contextlib.contextmanager
def _stand_ins(given: Iterable[Any]) -> Iterator[None]:
    """Stand-ins in all tables of the models among what a function was given."""
    import torch

    tables: dict[int, Any] = {}
    for model in given:
        if isinstance(model, torch.nn.Module):
            tables |= {id(m): m for m in model.modules() if _makes_stand_ins(m)}
    try:
        for table in tables.values():
            # Beside the parameters, so that none is hidden from torch's walks or replaced.
            table.__dict__["weight"] = table.quant_method.stand_in(table)
        yield
    finally:
        for table in tables.values():
            del table.__dict__["weight"]


def _makes_stand_ins(module: Any) -> bool:
    return hasattr(getattr(module, "quant_method", None), "stand_in")
