# SPDX-License-Identifier: Apache-2.0
"""A model that cuts a layer's rows over the ranks by a loader of its own, in every stored form.

vLLM's own Mamba-2 mixer, as each of two ranks builds it, in one process: nothing is sent between
ranks until a projection that adds up.
"""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from stored_forms import stored_as

from vllm_nvfp4.checkpoints.census import Census
from vllm_nvfp4.checkpoints.headers import read_headers
from vllm_nvfp4.config import NvFp4Config
from vllm_nvfp4.numerics.quantize import quantize_mxfp4, quantize_nvfp4

pytestmark = pytest.mark.vllm

MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
FP_QUANT = {"quant_method": "fp_quant", "forward_dtype": "nvfp4", "hadamard_group_size": 16}
HIDDEN, INNER, STATE, HEADS = 64, 128, 32, 32  # whole squares of FP8
PREFIX = "model.layers.0.mixer"


def in_form(form, weight):
    """(tensors by their names after the layer's, what they are worth, their configuration)."""
    if form == "fp-quant":
        rotation = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) * 0.5**0.5
        for _ in range(3):
            rotation = torch.kron(rotation, torch.tensor([[1.0, 1.0], [1.0, -1.0]]) * 0.5**0.5)
        blocks = (weight.view(-1, 16) @ rotation).view_as(weight)
        quantized = quantize_nvfp4(blocks, global_scale=torch.tensor(0.1))
        tensors = {
            "qweight": quantized.codes,
            "scales": quantized.block_scale.view(torch.uint8),
            "weight_global_scale": torch.tensor([10.0]),
            "act_global_scale": torch.tensor([10.0]),
            "forward_hadamard_matrix": rotation,
            "backward_hadamard_matrix": rotation.clone(),
        }
        value = (quantized.dequantize().view(-1, 16) @ rotation.T).view_as(weight)
        return tensors, value, FP_QUANT
    if form == "mxfp4":
        quantized = quantize_mxfp4(weight)
        scales = quantized.block_scale.view(torch.uint8)
        tensors = {"weight_packed": quantized.codes, "weight_scale": scales}
        return tensors, quantized.dequantize(), MODELOPT
    if form == "stray":
        tensors, value = stored_as("bf16", weight)
        strays = {name: torch.tensor(0.01) for name in ("weight_scale", "input_scale")}
        return {**tensors, **strays}, value, MODELOPT
    return *stored_as(form, weight), MODELOPT


def build_mixer(monkeypatch, rank, quant_config):
    """vLLM's mixer of one group, as rank of two builds it."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

    group = SimpleNamespace(world_size=2, rank_in_group=rank)
    monkeypatch.setattr(parallel_state, "_TP", group)
    with set_current_vllm_config(VllmConfig()):
        return MambaMixer2(
            hidden_size=HIDDEN, ssm_state_size=STATE, conv_kernel_size=4, intermediate_size=INNER,
            use_conv_bias=True, use_bias=True, n_groups=1, num_heads=HEADS,
            head_dim=INNER // HEADS, quant_config=quant_config, prefix=PREFIX,
        )  # fmt: skip


def rows_of(rank):
    """Of gate, x, B, C and dt; B and C of the one group are on every rank."""
    half, heads = INNER // 2, HEADS // 2
    parts = [
        range(rank * half, (rank + 1) * half),
        range(INNER + rank * half, INNER + (rank + 1) * half),
        range(2 * INNER, 2 * INNER + 2 * STATE),
        range(2 * INNER + 2 * STATE + rank * heads, 2 * INNER + 2 * STATE + (rank + 1) * heads),
    ]
    return [row for part in parts for row in part]


FORMS = (
    "nvfp4", "w4a16", "awq", "ct", "ct16", "mxfp4", "fp-quant", "fp8", "fp8row", "fp8block",
    "mxfp8", "stray", "bf16",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_rank_has_its_rows(form, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(2 * INNER + 2 * STATE + HEADS, HIDDEN, generator=generator)
    weight = weight.bfloat16().float()
    tensors, value, stored_config = in_form(form, weight)
    bias = torch.randn(len(weight), generator=generator).bfloat16().float()
    tensors = {f"{PREFIX}.in_proj.{leaf}": t.contiguous() for leaf, t in tensors.items()}
    tensors[f"{PREFIX}.in_proj.bias"] = bias
    save_file(tensors, tmp_path / "model.safetensors")
    config = NvFp4Config(stored_config)
    config.census = Census(read_headers(tmp_path), config.dialect)
    x = torch.randn(3, HIDDEN, generator=generator)
    for rank in range(2):
        mixer = build_mixer(monkeypatch, rank, config)
        list(config.prepare_weights((), mixer))
        layer = mixer.in_proj
        for name, tensor in tensors.items():
            parameter = getattr(layer, name.rpartition(".")[2])
            parameter.weight_loader(parameter, tensor)
        layer.quant_method.process_weights_after_loading(layer)
        y = x @ value[rows_of(rank)].T + bias[rows_of(rank)]
        torch.testing.assert_close(layer(x)[0], y, rtol=1e-4, atol=1e-4)
