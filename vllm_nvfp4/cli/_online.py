# SPDX-License-Identifier: Apache-2.0
"""Asks vLLM, where it is installed, which layers of a 16-bit checkpoint it will quantise."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vllm_nvfp4.checkpoints.inventory import LayerRecord
from vllm_nvfp4.checkpoints.online_layers import BY_VLLM, OnlineLayers, without_vllm
from vllm_nvfp4.planning.vllm_kv import is_vllm_here
from vllm_nvfp4.serving.progress import step


def ask_online(folder: Path, records: Sequence[LayerRecord]) -> OnlineLayers:
    """As vLLM's own model decides; without it, or where it does not build the model, as
    :func:`without_vllm`, with the reason in ``source``."""
    if not is_vllm_here():
        return without_vllm(folder, records)
    from vllm_nvfp4.checking.check import check

    with step("Asking vLLM which layers it will quantise", sys.stderr):
        try:
            report = check(folder, ["--skip-tokenizer-init", "--enforce-eager"])
        except ValueError as error:
            reason = str(error)
        else:
            if report.while_loading or report.kept:
                return OnlineLayers(BY_VLLM, frozenset(report.while_loading), report.kept)
            reason = str(report.errors[0]) if report.errors else "no layers"
    found = without_vllm(folder, records)
    return replace(found, source=f"{found.source}; of vLLM: {reason}")


def remark(layers: OnlineLayers) -> str:
    """One sentence for a user."""
    return f"Which layers are quantised while they load: as told by {layers.source}."
