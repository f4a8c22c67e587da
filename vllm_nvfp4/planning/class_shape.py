# SPDX-License-Identifier: Apache-2.0
"""The shape of a model by its config.json alone: the tensors of transformers' class, on the meta
device, stand for those of the files."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_nvfp4.checkpoints.online_layers import of_class
from vllm_nvfp4.checkpoints.skeleton import write_hole
from vllm_nvfp4.planning.headers import shape_from_headers
from vllm_nvfp4.planning.shapes import EXPERTS, ROUTER, AskVllm, DecoderShape, Linear

# Of a layer's name to its format, or to {format: how many of the layers of that name}. "experts"
# is every layer of a routed expert, "" every other.
Stored = Mapping[str, str | Mapping[str, int]]


def shape_from_config(
    config: Mapping[str, Any], name: str, ask: AskVllm | None = None, stored: Stored | None = None
) -> DecoderShape:
    """The shape of the language model that config.json describes, in 16 bits.

    stored: the formats of a quantised checkpoint of it, see :data:`Stored`
    ask:    see :func:`vllm_nvfp4.planning.find.find_shape`

    Raises CheckpointError where transformers has no class for config.json, ValueError for a model
    without a token embedding.
    """
    try:
        from vllm_nvfp4.checkpoints.model_class import ModelClass
    except ImportError as error:
        raise ValueError(
            f"{name}: its sizes are those of transformers' class, and {error.name} is not "
            "installed. It comes with vLLM: pip install '.[cuda]' or '.[cpu]' in a clone."
        ) from error
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with tempfile.TemporaryDirectory(prefix="vllm-nvfp4-config-") as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps(plain))
        found = ModelClass(folder)
        sizes = {key: tuple(value.shape) for key, value in found.model.named_parameters()}
        _write_headers(folder / "model.safetensors", sizes)
        # With what the class adds to it, as the kind of each layer.
        filled = {**found.config.to_dict(), **plain}
        if "text_config" in plain:
            filled["text_config"] = {
                **found.config.get_text_config().to_dict(),
                **plain["text_config"],
            }
        shape = shape_from_headers(
            folder, filled, None, name, ask, lambda _, records: of_class(found, records)
        )
    if stored is None:
        return shape
    head = "" if shape.tie_word_embeddings else str(stored.get("lm_head", ""))
    return replace(shape, stored=tuple(_as_stored(shape.linears, stored)), head=head)


def _write_headers(path: Path, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of BF16 tensors with a hole for the data."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in sizes.items():
        start = end
        end += 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    write_hole(path, json.dumps(header).encode(), end)


def _as_stored(linears: tuple[Linear, ...], stored: Stored) -> Iterator[Linear]:
    for layer in linears:
        key = "experts" if layer.kind == EXPERTS else layer.name
        form = stored.get(key, stored.get("", "bf16"))
        if layer.kind == ROUTER or layer.is_kept:
            form = "bf16"
        counts = {form: layer.count} if isinstance(form, str) else form
        if sum(counts.values()) != layer.count:
            raise ValueError(f"{key}: formats of {dict(counts)} layers; there are {layer.count}.")
        for fmt, count in counts.items():
            yield replace(layer, stored=fmt, count=count)
