# SPDX-License-Identifier: Apache-2.0
"""The shape of a model by its name: a folder, a hub name, or one of models.json."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from vllm_nvfp4.checkpoints.detect import detect, read_config
from vllm_nvfp4.checkpoints.online_layers import AskOnline, without_vllm
from vllm_nvfp4.checkpoints.skeleton import folder_or_skeleton
from vllm_nvfp4.planning.families import FAMILIES, as_stored, shape_of
from vllm_nvfp4.planning.shapes import AskVllm, DecoderShape


@cache
def models() -> dict[str, dict[str, Any]]:
    """models.json: {name: {"hub", "nvfp4", "source", "config", the published size where known}}.

    "stored": the formats of the checkpoint that "nvfp4" names, see class_shape.Stored
    """
    return json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))


@cache
def built_in() -> dict[str, dict[str, Any]]:
    """Those of :func:`models` whose shape is built here; transformers' class tells the others'."""
    return {
        name: entry for name, entry in models().items() if entry["config"]["model_type"] in FAMILIES
    }


def find_shape(
    model: str, ask: AskVllm | None = None, ask_online: AskOnline = without_vllm
) -> DecoderShape:
    """The shape of a folder, of a model in the hub cache, or of a built-in name.

    ask: tells what each layer keeps, by config.json, of a family that is not known here; it is
         empty where nothing is known
    ask_online: tells which layers of such a model in 16 bits are quantised while it loads

    Raises ValueError, or CheckpointError, for what is none of these, and for a config.json that
    lacks a key or describes another kind of model.
    """
    for name, entry in models().items():
        if model.lower() in (name.lower(), entry["hub"].lower()):
            return _known_shape(name, entry, ask)
    accepted = f"a folder with config.json, or one of {', '.join(models())}"
    if model.lower().endswith(".gguf"):
        raise ValueError(f"{model}: a GGUF file, whose metadata is not read; needs {accepted}.")
    if "/" not in model and not Path(model).exists():
        near = difflib.get_close_matches(model.lower(), [n.lower() for n in models()], 1)
        named = [n for n in models() if n.lower() in near]
        hint = f"did you mean {named[0]}? Needs" if named else "needs"
        raise ValueError(f"{model}: no such model; {hint} {accepted}, or a hub name owner/model.")
    with folder_or_skeleton(model) as folder:
        config, quantization = read_config(folder)
        text = config.get("text_config") or config
        if text.get("model_type") not in FAMILIES:
            from vllm_nvfp4.planning.class_shape import shape_from_config
            from vllm_nvfp4.planning.headers import shape_from_headers

            if not any(folder.glob("*.safetensors")):
                shape = shape_from_config(config, model, ask)
                note = "No *.safetensors file: sizes are those of transformers' class, in 16 bits."
                return replace(shape, notes=(*shape.notes, note))
            return shape_from_headers(folder, config, quantization, model, ask, ask_online)
    shape = shape_of(config, model)
    if quantization is None:
        return shape
    return as_stored(shape, detect(quantization))


def _known_shape(name: str, entry: Mapping[str, Any], ask: AskVllm | None) -> DecoderShape:
    """Of one of :func:`models`."""
    config = entry["config"]
    if name in built_in():
        shape = shape_of(config, name)
        if stored := config.get("quantization_config"):
            shape = as_stored(shape, detect(stored))
    else:
        from vllm_nvfp4.planning.class_shape import shape_from_config

        shape = shape_from_config(config, name, ask, entry.get("stored"))
    return replace(
        shape,
        hub=entry["hub"],
        nvfp4=entry.get("nvfp4", ""),
        has_vision=entry.get("has_vision", False),
    )
