# SPDX-License-Identifier: Apache-2.0
"""The 16-bit folder that ``quantize`` reads."""

from __future__ import annotations

import shutil
from pathlib import Path


def gguf_file(model: str) -> Path | None:
    """The .gguf file that ``model`` is the path of."""
    path = Path(model).expanduser()
    return path if path.suffix == ".gguf" and path.is_file() else None


def gguf_folder(target: Path) -> Path:
    """Where a .gguf file's 16-bit form is kept."""
    return target.parent / f".{target.name}.gguf-as-bf16"


def source_folder(model: str, target: Path) -> Path:
    """Of a name, a path or a .gguf file."""
    from vllm_nvfp4.checkpoints.gguf import gguf_to_folder
    from vllm_nvfp4.checkpoints.locate import find_folder

    path = gguf_file(model)
    if path is None:
        return find_folder(model)
    folder = gguf_folder(target)
    # Beside the folder, whose companions all go along to the checkpoint.
    origin = folder.with_suffix(".txt")
    stat = path.stat()
    identity = f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}\n"
    if folder.is_dir() and origin.is_file() and origin.read_text() == identity:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    print(f"reading {path.name} (the whole model is in memory for this step)", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        gguf_to_folder(path, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    origin.write_text(identity)
    return folder
