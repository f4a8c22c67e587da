# SPDX-License-Identifier: Apache-2.0
"""The draft model of speculative decoding, as vLLM would build it beside the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_nvfp4.checkpoints.census import Census
from vllm_nvfp4.checkpoints.model_census import take_census_of
from vllm_nvfp4.checkpoints.online import OnlineDialect


@dataclass(frozen=True)
class Draft:
    """A draft model that is not built yet.

    config:       vLLM's, that it is built with
    model_config: vLLM's, of the draft
    census:       of its files; None for a head in the target's own files
    """

    config: Any
    model_config: Any
    census: Census | None


def draft_of(config: Any) -> Draft | None:
    """The draft of a vLLM config; None where it speculates without a model, or not at all.

    Raises ValueError where the draft's headers are out of reach.
    """
    from vllm.config import VllmConfig
    from vllm.config.utils import replace

    speculative = config.speculative_config
    model_config = getattr(speculative, "draft_model_config", None)
    if model_config is None or speculative.method in ("ngram", "ngram_gpu", "suffix"):
        return None
    if speculative.method == "draft_model":
        # A model of its own with a quantization config of its own.
        config = replace(
            config,
            quant_config=None,
            parallel_config=speculative.draft_parallel_config,
            model_config=model_config,
        )
        quant_config = config.quant_config
    else:
        quant_config = VllmConfig.get_quantization_config(model_config, config.load_config)
    census = None
    if model_config.model != speculative.target_model_config.model:
        census = found_census(
            getattr(quant_config, "census", None)
            or take_census_of(model_config.model, model_config.revision, None, OnlineDialect()),
            model_config,
        )
    return Draft(config, model_config, census)


def found_census(census: Any, model_config: Any) -> Any:
    """The census. Raises ValueError where there is none."""
    if census is None:
        raise ValueError(
            f"{model_config.model}: the headers of its files are out of reach; needed: a folder, "
            "or a hub that answers. Download it first: hf download"
        )
    return census
