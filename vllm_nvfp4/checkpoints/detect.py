# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint's configuration to its dialect."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_nvfp4.checkpoints import autoround
from vllm_nvfp4.checkpoints.compressed_tensors import CompressedTensorsDialect
from vllm_nvfp4.checkpoints.fields import as_table, as_text
from vllm_nvfp4.checkpoints.files import file_in_folder, read_table
from vllm_nvfp4.checkpoints.fp_quant import FpQuantDialect
from vllm_nvfp4.checkpoints.mlx import MlxDialect
from vllm_nvfp4.checkpoints.modelopt import ModelOptDialect
from vllm_nvfp4.checkpoints.mxfp4 import Mxfp4Dialect
from vllm_nvfp4.checkpoints.online import OnlineDialect
from vllm_nvfp4.checkpoints.quark import QuarkDialect
from vllm_nvfp4.checkpoints.spec import CheckpointError, Dialect

WHERE = "config.json (quantization_config)"
LEGACY = "hf_quant_config.json"
SUPPORTED_METHODS = ("modelopt", "compressed-tensors", "fp_quant", "mxfp4", "auto-round", "quark",
                     "mlx")  # fmt: skip

# Formats that hold FP4 in a way this project does not read, and the way out of each.
_OTHER_FP4 = {
    "gguf": "Serve the BF16 model (it is quantised while it loads), or quantise that with ModelOpt "
    "or llm-compressor.",
}
# What MLX says instead of a method, in "quantization" and again in "quantization_config".
_OF_MLX = {"bits", "group_size"}


def detect(quant_config: Mapping[str, Any] | None) -> Dialect:
    """The dialect of a checkpoint.

    quant_config: config.json's ``quantization_config``, the contents of a legacy
                  hf_quant_config.json, or None for a checkpoint without quantisation
    Raises CheckpointError, with the list of what is supported, for anything else.
    """
    if quant_config is None:
        return OnlineDialect()
    quant_config = as_table(quant_config, "config.json", "quantization_config")
    method = method_name(quant_config)
    if method.startswith("modelopt"):
        return ModelOptDialect(quant_config)
    if method == "compressed-tensors":
        return CompressedTensorsDialect(quant_config)
    if method == "fp_quant":
        return FpQuantDialect(quant_config)
    if method in ("mxfp4", "gpt_oss_mxfp4"):
        return Mxfp4Dialect(quant_config)
    if method in autoround.METHODS:
        return autoround.AutoRoundDialect(quant_config)
    if method == MlxDialect.name:
        return MlxDialect(quant_config)
    if method == QuarkDialect.name:
        return QuarkDialect(quant_config)
    raise CheckpointError(
        WHERE,
        "quant_method",
        repr(method) if method else "none",
        "one of " + ", ".join(SUPPORTED_METHODS) + ", or no quantization_config at all",
        _OTHER_FP4.get(method, "Quantise the BF16 model with ModelOpt or llm-compressor."),
    )


def method_name(quant_config: Mapping[str, Any]) -> str:
    """The normalised ``quant_method``. A legacy hf_quant_config.json carries none: ModelOpt's."""
    method = as_text(quant_config.get("quant_method"), WHERE, "quant_method")
    method = method.lower().replace("_tensors", "-tensors")
    if method:
        return method
    producer = quant_config.get("producer")
    if _is_of_mlx(quant_config):
        return MlxDialect.name
    by_modelopt = isinstance(producer, Mapping) and producer.get("name") == "modelopt"
    if by_modelopt or isinstance(quant_config.get("quantization"), Mapping):
        return "modelopt"
    return ""


def _is_of_mlx(value: object) -> bool:
    return isinstance(value, Mapping) and value.keys() >= _OF_MLX


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(config.json, its quantisation configuration or None).

    Looked for, in this order: ``quantization_config``, ``compression_config`` and MLX's
    ``quantization`` of config.json, the same of its ``text_config``, and hf_quant_config.json.
    Raises CheckpointError for a missing or unreadable file, and for one that a link places outside
    the folder.
    """
    config = _read_json(folder, "config.json", "Name a folder that holds a Hugging Face model.")
    if config is None:
        raise CheckpointError(
            str(folder / "config.json"),
            "file",
            "nothing",
            "a JSON object",
            "Name a folder that holds a Hugging Face model.",
        )
    text_config = as_table(config.get("text_config"), "config.json", "text_config")
    todo = "Restore the file from the checkpoint."
    for owner in (config, text_config):
        for key in ("quantization_config", "compression_config", "quantization"):
            if owner.get(key) and (key != "quantization" or _is_of_mlx(owner[key])):
                found = dict(as_table(owner[key], "config.json", key))
                if lacks_table(found):
                    found = _with_table(found, _read_json(folder, LEGACY, todo))
                return config, found
    return config, _read_json(folder, LEGACY, todo)


def lacks_table(quant_config: Mapping[str, Any]) -> bool:
    """Whether ModelOpt's table of layers is missing: some exports have it in LEGACY alone."""
    body = quant_config.get("quantization", quant_config)
    return (
        method_name(quant_config).startswith("modelopt")
        and isinstance(body, Mapping)
        and str(body.get("quant_algo")).upper() == "MIXED_PRECISION"
        and not body.get("quantized_layers")
    )


def _with_table(quant_config: dict[str, Any], legacy: Mapping[str, Any] | None) -> dict[str, Any]:
    body = as_table((legacy or {}).get("quantization"), LEGACY, "quantization")
    table = body.get("quantized_layers")
    if table and "quantization" not in quant_config:
        return {**quant_config, "quantized_layers": table}
    return dict(legacy) if legacy and table else quant_config


def _read_json(folder: Path, name: str, todo: str) -> dict[str, Any] | None:
    path = file_in_folder(folder, name, str(folder), todo)
    return None if path is None else read_table(path, str(path), todo)
