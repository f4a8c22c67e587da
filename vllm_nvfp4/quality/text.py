# SPDX-License-Identifier: Apache-2.0
"""The text that a model is measured on, as windows of equal length."""

from __future__ import annotations

import lzma
from importlib import resources
from pathlib import Path
from typing import Any

from vllm_nvfp4.checkpoints import read_config
from vllm_nvfp4.checkpoints.spec import CheckpointError

BUILTIN = "builtin"


def read_text(name: str) -> str:
    """``builtin``, or the contents of a UTF-8 file. Raises OSError, or CheckpointError where it is
    not UTF-8."""
    if name == BUILTIN:
        packed = resources.files(__package__).joinpath("text.txt.xz").read_bytes()
        return lzma.decompress(packed).decode()
    try:
        return Path(name).expanduser().read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            name, "text", str(error), "plain UTF-8 text", "Convert the file."
        ) from error


def read_windows(folder: Path, name: str, num_windows: int, length: int) -> list[list[int]]:
    """At most ``num_windows`` consecutive windows of ``length`` tokens each.

    folder: where the tokenizer is. A window begins with the special tokens that the tokenizer puts
            before a text (a BOS token), if any: they count towards its length and are not scored.
    name:   see :func:`read_text`

    Raises CheckpointError where the text is shorter than one window, or a window is longer than
    the model's context.
    """
    context = context_length(folder)
    # One token is generated after the window.
    if context is not None and length >= context:
        raise CheckpointError(
            str(folder),
            "context",
            f"{context} tokens",
            f"more than the window of {length} tokens",
            f"Use --window-length {context - 1} or less.",
        )
    tokenizer = load_tokenizer(folder)
    prefix = prefix_tokens(tokenizer)
    tokens = tokenizer(read_text(name), add_special_tokens=False, verbose=False).input_ids
    step = length - len(prefix)
    available = len(tokens) // step
    if available < 1:
        raise CheckpointError(
            name,
            "text",
            f"{len(tokens)} tokens",
            f"at least one window, {step} tokens",
            "Give a longer text, or a smaller --window-length.",
        )
    starts = range(0, min(available, num_windows) * step, step)
    return [prefix + tokens[start : start + step] for start in starts]


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises CheckpointError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            str(folder),
            "tokenizer",
            str(error).split("\n")[0],
            "the files of a tokenizer that transformers reads",
            "Copy tokenizer.json and tokenizer_config.json from the original model.",
        ) from error


def prefix_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    return full[: full.index(plain[0])] if plain and plain[0] in full else []


def context_length(folder: Path) -> int | None:
    """The longest sequence that config.json allows, or None where it does not say."""
    config, _ = read_config(folder)
    return (config.get("text_config") or config).get("max_position_embeddings")


def check_same_tokens(folder: Path, reference: Path, name: str, windows: list[list[int]]) -> None:
    """Raise CheckpointError unless the reference has the same vocabulary and the same tokens."""
    sizes = [vocabulary_size(f) for f in (folder, reference)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            str(reference),
            "reference's vocabulary",
            f"{sizes[1]} tokens",
            f"{sizes[0]}, as {folder} has",
            "Give the model that this one was made from.",
        )
    theirs = read_windows(reference, name, len(windows), len(windows[0]))
    if theirs != windows:
        raise CheckpointError(
            str(reference),
            "reference's tokenizer",
            "other tokens for the same text",
            f"the tokenizer of {folder}",
            "Give the model that this one was made from.",
        )


def vocabulary_size(folder: Path) -> int:
    """Rows of the lm_head by config.json."""
    config, _ = read_config(folder)
    size = (config.get("text_config") or config).get("vocab_size")
    if not isinstance(size, int):
        raise CheckpointError(
            str(folder / "config.json"),
            "vocab_size",
            repr(size),
            "the number of tokens",
            "Restore the file from the checkpoint.",
        )
    return size
