# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a BF16 Hugging Face folder, through transformers and its reader of GGUF."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path

from vllm_nvfp4.checkpoints.spec import CheckpointError


def gguf_to_folder(gguf: Path, target: Path) -> None:
    """Write config, tokenizer and BF16 safetensors to ``target``. The whole model is in memory.

    The values are those of the GGUF file, rounded to BF16. Raises CheckpointError where the file,
    or its architecture, is not one that transformers reads.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise CheckpointError(
                str(gguf),
                "package",
                f"no {package}",
                "gguf and accelerate, to read GGUF",
                f"pip install {package}",
            )
    # transformers' progress bars and its advice on packed GGUF weights go to stderr.
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            _convert(gguf, target)
        except (ValueError, KeyError, OSError, NotImplementedError) as error:
            raise CheckpointError(
                str(gguf),
                "GGUF",
                str(error).split("\n")[0],
                "a whole GGUF file of an architecture that transformers reads",
                "Start from the model's BF16 safetensors.",
            ) from error


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(gguf.parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.bfloat16)
    # transformers leaves marks of the GGUF quantization on the model, and save_pretrained would
    # ask the quantizer to write what is BF16 by now.
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, attribute):
            setattr(model, attribute, False if attribute == "is_quantized" else None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
