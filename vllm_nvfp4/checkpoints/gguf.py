# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a BF16 Hugging Face folder, through transformers and its reader of GGUF."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

from vllm_nvfp4.checkpoints.gguf_header import check_gguf
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
    check_gguf(gguf)
    # transformers' progress bars and its advice on packed GGUF weights go to stderr.
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            _convert(gguf, target)
        except CheckpointError:
            raise
        except Exception as error:  # the readers raise whatever a damaged value leads them to
            lines = str(error).splitlines() or [""]
            raise CheckpointError(
                str(gguf),
                "GGUF",
                f"{type(error).__name__}: {lines[0]}",
                "a whole GGUF file of an architecture that transformers reads",
                "Start from the model's BF16 safetensors.",
            ) from error


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(gguf.parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf.name, dtype=torch.bfloat16, output_loading_info=True
    )
    model, report = loaded
    is_tied = model.config.tie_word_embeddings
    missing = [n for n in report["missing_keys"] if not (is_tied and n == "lm_head.weight")]
    if missing:  # transformers gives them random values
        raise CheckpointError(
            str(gguf), "GGUF", f"no tensor for {missing[0]} and {len(missing) - 1} others",
            "one for each of the model's", "Download the file again.",
        )  # fmt: skip
    # transformers leaves marks of the GGUF quantization on the model, and save_pretrained would
    # ask the quantizer to write what is BF16 by now.
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, attribute):
            setattr(model, attribute, False if attribute == "is_quantized" else None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
