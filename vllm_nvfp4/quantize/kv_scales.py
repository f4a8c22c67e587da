# SPDX-License-Identifier: Apache-2.0
"""Scales of an FP8 KV cache: what a finished checkpoint's own layers write on a text.

    k_scale = 2^ceil(log2(HEADROOM * amax(|K|) / 448)), one for each layer; v_scale likewise

with K after the rotary embedding, as a cache holds it. A power of two, since E4M3 is as exact at
any scale until it runs out of exponents, and a power of two itself rounds nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_nvfp4.checkpoints.detect import detect, read_config
from vllm_nvfp4.checkpoints.headers import read_headers
from vllm_nvfp4.checkpoints.modules import group_by_module
from vllm_nvfp4.checkpoints.safetensors_file import SafetensorsWriter
from vllm_nvfp4.checkpoints.source import TensorInfo
from vllm_nvfp4.checkpoints.spec import CheckpointError, LayerKind
from vllm_nvfp4.numerics.formats import E4M3_MAX
from vllm_nvfp4.quantize.calibration import Calibration
from vllm_nvfp4.quantize.forward import LayerwiseModel

# Another text may go further than the one that is looked at.
HEADROOM = 2.0
FILE_NAME = "model-kv-scales.safetensors"
_INDEX = "model.safetensors.index.json"
_REMEDY = "Leave --kv-cache out: the cache is then served with scales of 1."

# dialect -> (tensor names after the layer's prefix, their shape, config.json's kv_cache_scheme)
_MODELOPT_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}
_DIALECTS: dict[str, tuple[tuple[str, str], tuple[int, ...], dict[str, Any]]] = {
    "modelopt": (
        ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
        (),
        _MODELOPT_SCHEME,
    ),
    "compressed-tensors": (
        ("self_attn.k_scale", "self_attn.v_scale"),
        (1,),
        _MODELOPT_SCHEME | {"strategy": "tensor", "symmetric": True},
    ),
}


class KvRange:
    """Stands in for a KV cache: notes the largest |K| and |V| and keeps nothing."""

    def __init__(self) -> None:
        self.k, self.v = 0.0, 0.0

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.k = max(self.k, key.abs().amax().item())
        self.v = max(self.v, value.abs().amax().item())
        return key, value


def scale_for(amax: float) -> float:
    """See the module's equation; 1 where nothing but zeros was seen."""
    return 2.0 ** math.ceil(math.log2(HEADROOM * amax / E4M3_MAX)) if amax > 0 else 1.0


def measure_kv_scales(
    folder: Path,
    calibration: Calibration,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda layer: None,
) -> dict[str, tuple[float, float]]:
    """(k_scale, v_scale) by the prefix of the decoder layer, e.g. "model.layers.0.".

    folder:   a finished checkpoint; one layer of it is in memory at a time
    progress: called with the prefix of each layer

    Raises CheckpointError where transformers cannot run the model layer by layer, or it has no
    plain KV cache.
    """
    names, load = _dequantized(folder)
    samples = calibration.samples(folder)
    model = LayerwiseModel(folder, names, load, samples, device, remedy=_REMEDY)
    hidden = model.hidden
    scales = {}
    for index in range(model.num_layers):
        prefix = model.prefix(index)
        progress(prefix)
        seen = KvRange()
        layer = model.layer(index, {})
        hidden = [model.run(layer, index, h, seen) for h in hidden]
        if not (seen.k > 0 and seen.v > 0) or not math.isfinite(seen.k + seen.v):
            raise CheckpointError(
                str(folder),
                f"keys and values of {prefix}",
                f"largest |K| {seen.k:g}, largest |V| {seen.v:g}",
                "an attention that puts finite keys and values into a KV cache",
                _REMEDY,
            )
        scales[prefix] = (scale_for(seen.k), scale_for(seen.v))
    return scales


def add_kv_scales(
    folder: Path,
    stored: str,
    calibration: Calibration,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda layer: None,
) -> None:
    """Write the scales into a finished checkpoint: a file of their own, the index, config.json.

    stored: "modelopt" or "compressed-tensors", the checkpoint's dialect
    """
    path = folder / FILE_NAME
    path.unlink(missing_ok=True)
    weight_map = {name: header.file for name, header in read_headers(folder).items()}
    leaves, shape, scheme = _DIALECTS[stored]
    values = {
        prefix + leaf: torch.full(shape, value)
        for prefix, pair in measure_kv_scales(folder, calibration, device, progress).items()
        for leaf, value in zip(leaves, pair, strict=True)
    }
    with SafetensorsWriter(path, dict.fromkeys(values, TensorInfo("F32", shape))) as writer:
        for name, value in values.items():
            writer.write(name, value)
    index = folder / _INDEX
    content = json.loads(index.read_text()) if index.is_file() else {"metadata": {}}
    content["weight_map"] = dict(sorted((weight_map | dict.fromkeys(values, FILE_NAME)).items()))
    index.write_text(json.dumps(content, indent=2) + "\n")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _dequantized(folder: Path) -> tuple[list[str], Callable[[str], torch.Tensor]]:
    """(names of the plain model's tensors, how to read one)."""
    from safetensors import safe_open

    from vllm_nvfp4.checkpoints.convert import dequantize_layer

    _, quant_config = read_config(folder)
    headers = read_headers(folder)
    dialect = detect(quant_config)
    dialect.settle({name: header.shape for name, header in headers.items()})
    modules = group_by_module(headers)

    def is_quantized(module: str) -> bool:
        kind = dialect.layer_spec(module).kind
        is_stored = len(modules[module].keys() - {"weight", "bias"}) > 0
        return kind in (LayerKind.MICROSCALED, LayerKind.FP8) and is_stored

    def read(name: str) -> torch.Tensor:
        with safe_open(folder / headers[name].file, "pt") as reader:
            return reader.get_tensor(name)

    def load(name: str) -> torch.Tensor:
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or not is_quantized(module):
            return read(name)
        tensors: Mapping[str, torch.Tensor] = {n: read(f"{module}.{n}") for n in modules[module]}
        return dequantize_layer(dialect.layer_spec(module), dict(tensors), module)

    names = {f"{m}.weight" if is_quantized(m) else "" for m in modules} | set(headers)
    return sorted(names - {""}), load
