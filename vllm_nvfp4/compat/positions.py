# SPDX-License-Identifier: Apache-2.0
"""What vLLM asks of an XLM-RoBERTa's config.json."""

from __future__ import annotations

import functools
from typing import Any


def install() -> None:
    """Take an XLM-RoBERTa whose config.json does not say what its positions are.

    transformers 5 writes no position_embedding_type, since it has absolute ones alone, and vLLM
    asks for it without a default (its own class of the model has one).
    """
    from vllm.model_executor.models import config as of_models

    rules: Any = getattr(of_models, "JinaRobertaModelConfig", None)
    verify = getattr(rules, "verify_and_update_model_config", None)
    if verify is None or hasattr(verify, "__wrapped__"):
        return

    @functools.wraps(verify)
    def verify_with_default(model_config: Any) -> None:
        if not hasattr(model_config.hf_config, "position_embedding_type"):
            model_config.hf_config.position_embedding_type = "absolute"
        verify(model_config)

    rules.verify_and_update_model_config = staticmethod(verify_with_default)
