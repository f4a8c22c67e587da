# SPDX-License-Identifier: Apache-2.0
"""The census of a model as the engine names it: a folder, or a hub name.

A hub name's headers come from the local cache if it is there, else by range requests of a few
kilobytes for each file, before the download that vLLM is about to make.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_nvfp4.checkpoints.census import Census
from vllm_nvfp4.checkpoints.detect import detect, lacks_table, read_config
from vllm_nvfp4.checkpoints.headers import TensorHeader
from vllm_nvfp4.checkpoints.locate import find_folder
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

    A folder is checked whole (see :func:`validate`). Raises CheckpointError for what is wrong with
    it.
    """
    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = find_folder(model, revision or "main")
        except CheckpointError:
            return _remote_census(model, revision, dialect)
        if not any(folder.glob("*.safetensors")):  # vLLM has fetched the configuration alone
            return _remote_census(model, revision, dialect)
    config, found = read_config(folder)
    if quant_config is not None and lacks_table(quant_config) and found is not None:
        dialect = detect(found)
    census = take_census(folder, dialect)
    validate(folder, config, quant_config, census=census)
    return census


def _remote_census(model: str, revision: str | None, dialect: Dialect) -> Census | None:
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.constants import HF_HUB_OFFLINE

    reason = "HF_HUB_OFFLINE is set"
    if not HF_HUB_OFFLINE:
        try:
            metadata = get_safetensors_metadata(model, revision=revision)
        except Exception as error:  # of many libraries below; none of them ends the engine
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            headers = {
                name: TensorHeader(file, t.dtype, tuple(t.shape), *t.data_offsets)
                for file, part in metadata.files_metadata.items()
                for name, t in part.tensors.items()
            }
            return Census(headers, dialect)
    logger.warning(
        "nvfp4: the headers of %s cannot be read (%s): its configuration decides how each layer is "
        "stored",
        model,
        reason,
    )
    return None
