# SPDX-License-Identifier: Apache-2.0
"""Which parts of a model vLLM marks as towers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


def install() -> None:
    """Say to the config of a model which of its parts vLLM marks as encoders and connectors.

    The mark is a context around their construction, and its only trace is on the model, which a
    config does not see.
    """
    from vllm.model_executor.models.interfaces import SupportsMultiModal

    mark: Any = getattr(SupportsMultiModal, "_mark_tower_model", None)
    if mark is None or getattr(mark, "nvfp4_tells", False):
        return

    @contextlib.contextmanager
    def mark_and_tell(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        with mark(self, vllm_config, *args, **kwargs):
            yield
        if (tell := getattr(vllm_config.quant_config, "towers_are_marked", None)) is not None:
            tell(self)

    mark_and_tell.nvfp4_tells = True  # type: ignore[attr-defined]
    SupportsMultiModal._mark_tower_model = mark_and_tell  # type: ignore[method-assign]
