# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a Hugging Face folder, through transformers and its reader of GGUF: in BF16, or
with the weights in FP4 that it has. Of a file in parts, the first is named."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_nvfp4.checkpoints.gguf_fp4 import FP4_TYPES, SCALES, Converted, write_fp4_folder
from vllm_nvfp4.checkpoints.gguf_header import Head
from vllm_nvfp4.checkpoints.gguf_parts import as_one_file, check_gguf, tensor_types
from vllm_nvfp4.checkpoints.gguf_rope import add_rope_scaling
from vllm_nvfp4.checkpoints.spec import CheckpointError

if TYPE_CHECKING:
    from gguf import GGUFReader


def gguf_to_folder(gguf: Path, target: Path) -> None:
    """Write config, tokenizer and BF16 safetensors to ``target``. The whole model is in memory.

    The values are those of the GGUF file, rounded to BF16. Raises CheckpointError where the file,
    or its architecture, is not one that transformers reads, and for weights with a scale beside
    them, which transformers leaves out.
    """
    heads = _checked(gguf)
    types = tensor_types(heads)
    scaled = (n for n in types if n.endswith(SCALES[0]) and _weight_of(n) in types)
    if scale := next(scaled, None):
        raise CheckpointError(
            str(gguf), scale, f"a scale of {_weight_of(scale)}", "weights without",
            "Start from the safetensors that the file was made from.",
        )  # fmt: skip
    with _readers(gguf), as_one_file(heads, target.parent) as file:
        _convert(gguf, file, target)
        add_rope_scaling(gguf, _reader_of(file), target)


def holds_fp4(gguf: Path) -> bool:
    """Whether weights are in NVFP4 or MXFP4. Raises CheckpointError for a damaged file."""
    return not FP4_TYPES.keys().isdisjoint(tensor_types(_checked(gguf)).values())


def write_fp4(gguf: Path, target: Path, finish: Callable[[Path], None] | None) -> Converted:
    """As :func:`write_fp4_folder`; ``target`` appears whole, or not at all.

    finish: called with the finished folder before it appears
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        with _readers(gguf), as_one_file(check_gguf(gguf), Path(temporary)) as file:
            reader = _reader_of(file)
            found = write_fp4_folder(gguf, file, reader, folder)
            add_rope_scaling(gguf, reader, folder)
        if finish is not None:
            finish(folder)
        folder.rename(target)
    return found


def _reader_of(file: Path) -> GGUFReader:
    from gguf import GGUFReader

    return GGUFReader(file)


def _weight_of(scale: str) -> str:
    return scale.removesuffix(SCALES[0]) + ".weight"


def _checked(gguf: Path) -> list[Head]:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise CheckpointError(
                str(gguf),
                "package",
                f"no {package}",
                "gguf and accelerate, to read GGUF",
                f"pip install {package}",
            )
    return check_gguf(gguf)


@contextlib.contextmanager
def _readers(gguf: Path) -> Iterator[None]:
    """Around what calls transformers' and gguf's readers: one error for all of theirs."""
    # transformers' progress bars and its advice on packed GGUF weights go to stderr.
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            yield
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


def _convert(gguf: Path, file: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(file.parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, dtype=torch.bfloat16, output_loading_info=True
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
