# SPDX-License-Identifier: Apache-2.0
"""The census of a model as the engine names it: a folder, or a hub name.

A hub name's headers come from the local cache if it is there, else from the hub (skeleton.py),
before the download that vLLM is about to make.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_nvfp4.checkpoints.census import Census
from vllm_nvfp4.checkpoints.detect import detect, lacks_table, read_config
from vllm_nvfp4.checkpoints.skeleton import folder_or_skeleton
from vllm_nvfp4.checkpoints.spec import CheckpointError, Dialect
from vllm_nvfp4.checkpoints.validate import take_census, validate

logger = logging.getLogger(f"vllm.{__name__}")


def take_census_of(
    model: str,
    revision: str | None,
    quant_config: Mapping[str, Any] | None,
    dialect: Dialect,
) -> Census | None:
    """The census of a model; None, with one log line, where its headers are out of reach.

    It is checked whole (see :func:`validate`). Raises CheckpointError for what is wrong with it.
    """
    with contextlib.ExitStack() as stack:
        try:
            found_here = folder_or_skeleton(model, revision or "main", while_loading=True)
            folder = stack.enter_context(found_here)
        except CheckpointError as error:
            if Path(model).is_dir():
                raise
            logger.warning(
                "nvfp4: the headers of %s are out of reach: its configuration decides which layer "
                "is stored how. %s",
                model,
                error,
            )
            return None
        config, found = read_config(folder)
        if quant_config is not None and lacks_table(quant_config) and found is not None:
            dialect = detect(found)
        census = take_census(folder, dialect)
        validate(folder, config, quant_config, census=census)
        return census
