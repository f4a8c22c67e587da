# SPDX-License-Identifier: Apache-2.0
"""From what a user calls a model to the folder that holds it. Nothing is downloaded."""

from __future__ import annotations

import difflib
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
        todo = "Name that."
        if path.suffix == ".gguf":
            todo = f"Make a checkpoint of it: vllm-nvfp4 quantize {model} -o OUT"
        raise CheckpointError(model, "path", "a file", "a folder with config.json", todo)
    _refuse_way_out(revision, "revision")
    repository = hub_cache() / ("models--" + model.strip("/").replace("/", "--"))
    reference = repository / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    _refuse_way_out(commit, f"{reference}: commit")
    snapshot = repository / "snapshots" / commit
    if model.count("/") <= 1 and snapshot.is_dir():
        return snapshot
    needed = "a folder with config.json and safetensors files"
    if is_path(model):
        near = _near(path)
        hint = f"Did you mean {near}?" if near else "Check the path."
        raise CheckpointError(model, "path", "no such folder", needed, hint)
    raise CheckpointError(
        model,
        "model",
        f"no such folder, and no such model in the Hugging Face cache {_cache_and_variable()}",
        f"{needed}, or the name of a downloaded model",
        f"Check the path, or download the model first: hf download {model}",
    )


def is_path(model: str) -> bool:
    """Whether ``model`` can only be a path: a hub name is "name" or "owner/name"."""
    looks = model.startswith(("/", ".", "~")) or model.endswith("/") or model.count("/") > 1
    return looks or Path(model).exists()


def _near(path: Path) -> Path | None:
    """A folder beside ``path`` whose name is much like its own."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, names, 1, 0.7)
    return path.parent / near[0] if near else None


def _cache_and_variable() -> str:
    variable = next((name for name in ("HF_HUB_CACHE", "HF_HOME") if os.environ.get(name)), "")
    return f"{hub_cache()} ({variable})" if variable else str(hub_cache())


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
