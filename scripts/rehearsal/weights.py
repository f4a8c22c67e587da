# SPDX-License-Identifier: Apache-2.0
"""What a loaded model holds in the order of the CUDA kernels, against what its file stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rehearsal import stage
from vllm_nvfp4.compat import versions
from vllm_nvfp4.kernels.cuda.linear import unpack_weight
from vllm_nvfp4.kernels.layout import PackedWeight
from vllm_nvfp4.layers.experts import NvFp4OnlineMoEMethod
from vllm_nvfp4.layers.linear import CheckpointLinearMethod
from vllm_nvfp4.layers.weights import experts_of
from vllm_nvfp4.numerics.formats import FORMATS
from vllm_nvfp4.testing.checkpoints import dequantized_state_dict

# Of an expert, as files name them.
_LEAVES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


def compare_with_file(model: Any, folder: Path) -> str:
    """Every packed weight, unpacked, is what the checkpoint's tensors give in float32.

    Returns how many were compared and how many only loaded, which are those that are quantised
    while they load, that are rotated, and gpt-oss's. Raises ValueError for one that differs, and
    where the model has none.
    """
    stored = dequantized_state_dict(folder)
    parts = dict(getattr(model, "packed_modules_mapping", {}))
    equal, loaded, turned = 0, 0, _turned_by(model)
    with stage.packed_as_on_a_gpu():
        for name, layer in model.named_modules():
            if (found := _weights_of(name, layer, parts, stored)) is None:
                continue
            for sources, weight in found:
                if sources is None or any(f"{s}.weight" not in stored for s in sources):
                    loaded += 1
                    continue
                expected = torch.cat([turned(s, stored[f"{s}.weight"].float()) for s in sources])
                if not torch.equal(weight[: len(expected)], expected):
                    raise ValueError(f"{name}: what is packed is not what {folder.name} stores")
                equal += 1
    if not equal + loaded:
        raise ValueError("no layer of the model is quantised")
    return f"{equal} weights as stored" + (f", {loaded} more loaded" if loaded else "")


def _turned_by(model: Any) -> Any:
    """What the model makes of a stored weight, by its name: Llama-4's class turns the rows of q and
    k for its rotary embedding."""
    turn = "permute_qk_weight_for_rotary"
    turning = next((getattr(m, turn) for m in model.modules() if hasattr(m, turn)), None)
    return lambda name, weight: turning(f"{name}.weight", weight)[1] if turning else weight


def _weights_of(name: str, layer: Any, parts: dict[str, list[str]], stored: Any) -> Any:
    """[(the names in the file, or None, and the weight [N, K] in float32)] of a layer."""
    parent, _, leaf = name.rpartition(".")
    sources = [f"{parent}.{part}" if parent else part for part in parts.get(leaf, [leaf])]
    is_stored = isinstance(getattr(layer, "quant_method", None), CheckpointLinearMethod)
    if hasattr(layer, "weight_packed"):
        num_rows, num_cols = layer.nvfp4_shape
        packed = PackedWeight(
            layer.weight_packed, layer.weight_block_scale, layer.weight_global_scale,
            num_rows, num_cols, FORMATS[layer.nvfp4_format],
        )  # fmt: skip
        weight = unpack_weight(packed).dequantize(torch.float32)
        if hasattr(layer, "pre_scale"):  # the file's weight in plain form has it folded in
            weight = weight * layer.pre_scale
        is_there = is_stored and not hasattr(layer, "hadamard")
        return [(sources if is_there else None, weight)]
    if hasattr(layer, "row_scale"):
        weight = layer.weight.float() * layer.row_scale[:, None]
        return [(sources if is_stored else None, weight)]
    if versions.is_moe_layer(layer) and hasattr(layer, "nvfp4_format"):
        return _experts(name, layer, stored)
    return None


def _experts(name: str, layer: Any, stored: Any) -> Any:
    fmt, inner = FORMATS[layer.nvfp4_format], layer.nvfp4_intermediate_size
    method = layer.quant_method
    # Here weights lie on the CPU, where releases before 0.30 take the experts without the kernel.
    kernel = method.moe_kernel or method.make_kernel(layer, method.experts)
    if type(kernel).__name__ != "FusedMoEKernel":
        raise ValueError(f"{name}: vLLM's modular kernel was not made")
    gated = 2 if layer.quant_method.activation.is_gated else 1
    hidden = layer.moe_config.hidden_dim
    shapes = {"w13": (gated * inner, hidden), "w2": (hidden, inner)}
    is_online = isinstance(layer.quant_method, NvFp4OnlineMoEMethod)
    found = []
    for stem, (rows, cols) in shapes.items():
        for e, tensors in enumerate(zip(*experts_of(layer, stem), strict=True)):
            codes, block_scale, global_scale = tensors
            packed = PackedWeight(codes, block_scale, global_scale, rows, cols, fmt)
            weight = unpack_weight(packed)
            base = f"{name.removesuffix('.routed_experts')}.{e}"
            named = _LEAVES[f"{base}.w2.weight" in stored]
            leaves = named[2:] if stem == "w2" else named[2 - gated : 2]
            sources = None if is_online else [f"{base}.{leaf}" for leaf in leaves]
            found.append((sources, weight.dequantize(torch.float32)))
    return found
