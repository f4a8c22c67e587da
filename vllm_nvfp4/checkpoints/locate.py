# SPDX-License-Identifier: Apache-2.0
"""From what a user calls a model to the folder that holds it. Nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path

from vllm_nvfp4.checkpoints.spec import CheckpointError


def find_folder(model: str, revision: str = "main") -> Path:
    """The model's folder: ``model`` itself, or its snapshot in the local Hugging Face cache.

    model: a folder, or a hub name "owner/name". Raises CheckpointError if there is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(model, "path", "a file", "the folder that holds it", "Name that.")
    _refuse_way_out(revision, "revision")
    repository = hub_cache() / ("models--" + model.strip("/").replace("/", "--"))
    reference = repository / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    _refuse_way_out(commit, f"{reference}: commit")
    snapshot = repository / "snapshots" / commit
    if model.count("/") <= 1 and snapshot.is_dir():
        return snapshot
    raise CheckpointError(
        model,
        "path",
        "no such folder, and no such model in the Hugging Face cache",
        "a folder with config.json and safetensors files",
        f"Check the path, or download the model first: hf download {model}",
    )


def _refuse_way_out(name: str, what: str) -> None:
    """Raise CheckpointError for a revision or commit that is a path out of the cache."""
    if not name or ".." in name.split("/") or name.startswith("/") or not name.isprintable():
        raise CheckpointError(
            "Hugging Face cache",
            what,
            repr(name),
            "a branch, a tag or a commit",
            "Download the model again, or name its folder.",
        )


def hub_cache() -> Path:
    """Where huggingface_hub keeps models: HF_HUB_CACHE, HF_HOME/hub or ~/.cache/huggingface/hub."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Path(home).expanduser() / "hub"
