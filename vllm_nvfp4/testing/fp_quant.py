# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the format of FP-Quant 0.3.2 (module/linear.py), whose own quantiser needs a
Blackwell GPU."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vllm_nvfp4.numerics.codes import encode_e2m1, pack_codes
from vllm_nvfp4.numerics.quantize import quantize_nvfp4


def write_fp_quant(folder: Path, dtype: str, size: int) -> None:
    """Write a tiny Llama in the format. dtype: nvfp4 or mxfp4; size: of a Hadamard block."""
    from safetensors.torch import load_file, save_file

    from vllm_nvfp4.testing.tiny_models import write_model

    write_model(folder, "llama")
    hadamard = torch.ones((1, 1))
    while len(hadamard) < size:
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    hadamard = (hadamard * size**-0.5).to(torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in list(tensors.items()):
        layer = name.removesuffix(".weight")
        if weight.dim() != 2 or "layers" not in name:
            continue
        rotated = (weight.float().view(-1, size) @ hadamard.float()).view(weight.shape)
        codes, scales, divisor = _round_as_fp_quant(rotated, dtype)
        del tensors[name]
        tensors[f"{layer}.qweight"] = codes
        tensors[f"{layer}.scales"] = scales
        for key in ("weight_global_scale", "act_global_scale"):
            tensors[f"{layer}.{key}"] = torch.tensor([divisor], dtype=torch.bfloat16)
        for key in ("forward_hadamard_matrix", "backward_hadamard_matrix"):
            tensors[f"{layer}.{key}"] = hadamard.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "backward_dtype": "bf16",
        "forward_dtype": dtype,
        "forward_method": "abs_max",
        "hadamard_group_size": size,
        "modules_to_not_convert": ["lm_head"],
        "pseudoquantization": False,
        "quant_method": "fp_quant",
        "store_master_weights": False,
        "transform_init": "hadamard",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _round_as_fp_quant(
    weight: torch.Tensor, dtype: str
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(packed codes, scale bytes, divisor) by the tool's "abs_max" rule: a fixed divisor of 10 for
    NVFP4; for MXFP4 a scale of 2^floor(log2 amax) and a divisor of 3, which puts amax in [3, 6)."""
    if dtype == "nvfp4":
        packed = quantize_nvfp4(weight, global_scale=torch.tensor(1 / 10.0))
        return packed.codes, packed.block_scale.view(torch.uint8), 10.0
    blocks = weight.view(len(weight), -1, 32)
    exponent = blocks.abs().amax(-1).log2().floor()
    codes = encode_e2m1(blocks * 3 / exponent.exp2()[..., None]).flatten(1)
    return pack_codes(codes), (exponent + 127).to(torch.uint8), 3.0
