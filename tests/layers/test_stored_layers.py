# SPDX-License-Identifier: Apache-2.0
"""Files whose layers are stored otherwise than their configuration says, through real engines."""

import pytest
import torch
from serving_cases import compare, layer_of

from vllm_nvfp4.checkpoints import read_config
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row, quantize_nvfp4
from vllm_nvfp4.testing.checkpoints import edit_json, edit_tensors
from vllm_nvfp4.testing.engine import engine
from vllm_nvfp4.testing.tiny_models import write_model

pytestmark = pytest.mark.vllm

NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def stored_as(form, weight):
    """A weight [N, K] as the tensors of a form, by their names after the layer's."""
    weight = weight.float()
    if form == "bf16":
        return {"weight": weight.bfloat16()}
    if form == "fp8":
        codes, scale = quantize_fp8_per_row(weight)
        return {"weight": codes, "weight_scale": scale}
    if form == "fp8block":
        tiles = weight.unflatten(0, (-1, 32)).unflatten(2, (-1, 32)).abs().amax((1, 3)) / 448
        full = tiles.repeat_interleave(32, 0).repeat_interleave(32, 1)
        return {"weight": (weight / full).to(torch.float8_e4m3fn), "weight_scale_inv": tiles}
    if form == "mxfp8":
        amax = weight.unflatten(1, (-1, 32)).abs().amax(2).clamp(min=2.0**-100)
        exponent = torch.floor(torch.log2(amax)).int() - 8
        full = torch.ldexp(torch.ones(()), exponent).repeat_interleave(32, 1)
        codes = (weight / full).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": (exponent + 127).to(torch.uint8)}
    quantized = quantize_nvfp4(weight, "rtn")
    scales = quantized.block_scale, quantized.global_scale[0].reshape(())
    if form == "ct":
        divisor = (1 / scales[1].double()).float().reshape(1)
        names = ("weight_packed", "weight_scale", "weight_global_scale")
        return dict(zip(names, (quantized.codes, scales[0], divisor), strict=True))
    if form == "awq":
        pre_scale = 0.5 + torch.arange(weight.shape[1]) / weight.shape[1]
        return stored_as("nvfp4", weight / pre_scale) | {"pre_quant_scale": pre_scale}
    names = ("weight", "weight_scale", "weight_scale_2")
    tensors = dict(zip(names, (quantized.codes, *scales), strict=True))
    return {**tensors, "input_scale": torch.tensor(0.01)}


def store(folder, decide, config, strays=()):
    """Write the model of a folder with each weight [N, K] in the form ``decide(its name)``."""

    def edit(tensors):
        for name in [n for n in tensors if n.endswith(".weight") and tensors[n].dim() == 2]:
            layer = name.removesuffix(".weight")
            stored = stored_as(decide(layer), tensors.pop(name))
            tensors |= {f"{layer}.{leaf}": tensor for leaf, tensor in stored.items()}
        for name in strays:
            tensors[name] = torch.tensor(0.01)

    edit_json(folder / "config.json", lambda c: c.update(quantization_config=config))
    return edit_tensors(folder, edit)


FORMS = {
    "model.layers.0.self_attn.k_proj": "bf16",  # a shard unlike the others
    "model.layers.0.self_attn.o_proj": "fp8block",
    "model.layers.0.mlp.down_proj": "mxfp8",
    "model.layers.1.self_attn.q_proj": "fp8",  # shards in three forms
    "model.layers.1.self_attn.v_proj": "bf16",
    "model.layers.1.self_attn.o_proj": "fp8",
    "model.layers.1.mlp.gate_proj": "fp8block",
    "model.layers.1.mlp.up_proj": "fp8block",
    "model.layers.1.mlp.down_proj": "bf16",
    "model.embed_tokens": "bf16",
    "lm_head": "bf16",
}
STRAYS = (
    "lm_head.input_scale",
    "lm_head.weight_scale",
    "model.layers.1.mlp.down_proj.input_scale",
    "model.layers.1.self_attn.v_proj.weight_scale_2",
)


@pytest.mark.parametrize("family", ["llama", "llama-bias"])
def test_the_files_decide_for_each_layer(family, tmp_path):
    """Every form in one file, under a list that names other layers."""
    config = {**NVFP4, "ignore": ["re:.*layers.0.mlp.*", "*o_proj*"]}
    folder = store(write_model(tmp_path, family), lambda n: FORMS.get(n, "nvfp4"), config, STRAYS)
    inventory = validate(folder, *read_config(folder))
    formats = {r.name: r.format for r in inventory.layers}
    assert formats["model.layers.0.mlp.gate_proj"] == "nvfp4"
    assert formats["model.layers.0.self_attn.o_proj"] == "fp8"
    assert formats["model.layers.0.mlp.down_proj"] == "mxfp8"
    compare(folder, atol=1e-4)


def test_a_shared_expert_in_no_list_and_in_16_bits(tmp_path):
    folder = write_model(tmp_path, "qwen2_moe")

    def form(name):
        kept = ("shared_expert", "embed_tokens", "lm_head", "mlp.gate")
        return "bf16" if any(k in name for k in kept) and ".experts." not in name else "ct"

    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    group = {"targets": ["Linear"], "weights": weights}
    config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    config |= {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    store(folder, form, config)
    compare(folder, atol=1e-4)
    with engine(folder, dtype="float32") as llm:
        shared = layer_of(llm, "model.layers.0.mlp.shared_expert.down_proj")
        assert type(shared.quant_method).__name__ == "UnquantizedLinearMethod"


@pytest.mark.parametrize("forms", [("fp8block", "mxfp8"), ("awq", "fp8")])
def test_experts_in_forms_without_a_kernel(forms, tmp_path):
    """Each layer's experts in another form: all become 16 bits, as their values are."""
    folder = write_model(tmp_path, "qwen3_moe")

    def form(name):
        if ".experts." in name:
            return forms[int(name.split(".")[2])]
        return "bf16" if name.endswith(("embed_tokens", "lm_head", "mlp.gate")) else "nvfp4"

    store(folder, form, NVFP4)
    compare(folder, atol=1e-4)
