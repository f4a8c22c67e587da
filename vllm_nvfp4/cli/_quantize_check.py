# SPDX-License-Identifier: Apache-2.0
"""Whether vLLM, and transformers, have a place for every tensor of a folder just written."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from vllm_nvfp4.checkpoints.online_layers import PLAIN_TABLES, layer_key
from vllm_nvfp4.checkpoints.source import Kept, Source
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.compat.messages import message_of


def check_written(folder: Path, say: Callable[[str], None], shown: Path | None = None) -> None:
    """Have vLLM's class of the model load the folder without its data.

    say: prints a line; shown: stands for the folder in what is said. Where vLLM is not installed,
    one line says that nothing was checked. Raises CheckpointError where a tensor has no place, or a
    parameter no tensor.
    """
    if importlib.util.find_spec("vllm") is None:
        say("not checked against vLLM, which is not installed here: `vllm-nvfp4 check` where it is")
        return
    from vllm_nvfp4.checking.check import check

    try:
        report = check(folder)
    except ValueError as error:
        what, found = "vLLM's model", str(error)
    else:
        for note in report.notes:
            say(f"warning: {note.replace(str(folder), str(shown or folder))}")
        if report.is_right:
            say(f"checked: {report.architecture} of vLLM has a place for every tensor")
            return
        first, *others = [*report.errors, *report.dropped]
        more = f", and {len(others)} more" if others else ""
        what, found = first.what, f"{first.message.removeprefix('found ').rstrip('.')}{more}"
    raise CheckpointError(
        str(shown or folder),
        what.replace(str(folder), "vLLM's model"),
        found,
        "a place in vLLM's model for every tensor",
        "The same command with --no-check writes it all the same. Please report the model.",
    )


def without_plain(
    source: Source, vocabulary: Sequence[str], kept: Sequence[Kept], say: Callable[[str], None]
) -> tuple[list[str], list[Kept]]:
    """(Those of lm_head's and the embedding's weights that a format can be chosen for; ``kept``,
    with the reason of the others): what vLLM's class of the model builds without quantisation is
    served in 16 bits however it is stored, and stock vLLM does not load it.

    say: prints a line where vLLM cannot be asked; then they all can
    """
    try:
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("it is not installed here")
        from vllm_nvfp4.checking.check import check

        report = check(source.folder)
        if report.errors:
            raise ValueError(str(report.errors[0]))
    except ValueError as error:
        listed = " and ".join(sorted(vocabulary))
        say(f"vLLM is not asked whether its class of the model quantises {listed}: {error}")
        return [*vocabulary], [*kept]
    plain = {n for n in vocabulary if report.kept.get(layer_key(n)) == PLAIN_TABLES}
    reason = f"vLLM's {report.architecture} builds them without quantisation"
    told = [replace(k, reason=reason) if k.name in plain else k for k in kept]
    return [n for n in vocabulary if n not in plain], told


def transformers_line(folder: Path) -> str:
    """One line on what transformers makes of a compressed-tensors folder."""
    import transformers

    from vllm_nvfp4.checking.by_transformers import misreading

    version = f"transformers {transformers.__version__}"
    try:
        found = misreading(folder)
    except Exception as error:  # of any model's code
        return f"not checked against {version}: {message_of(error)}"
    if not found:
        return f"checked: {version} reads it"
    return f"warning: {version} reads it wrongly: {found}; vLLM reads it right"
