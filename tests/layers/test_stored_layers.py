# SPDX-License-Identifier: Apache-2.0
"""Files whose layers are stored otherwise than their configuration says, through real engines."""

import pytest
from serving_cases import compare, layer_of
from stored_forms import store

from vllm_nvfp4.checkpoints import read_config
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.testing.engine import engine
from vllm_nvfp4.testing.tiny_models import write_model

pytestmark = pytest.mark.vllm

NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


FORMS = {
    "model.layers.0.self_attn.k_proj": "bf16",  # a shard unlike the others
    "model.layers.0.self_attn.o_proj": "fp8block",
    "model.layers.0.mlp.down_proj": "mxfp8",
    "model.layers.1.self_attn.q_proj": "fp8row",  # shards in three forms
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


@pytest.mark.parametrize("forms", [("fp8block", "mxfp8"), ("awq", "fp8row")])
def test_experts_in_forms_without_a_kernel(forms, tmp_path):
    """Each layer's experts in another form: all become 16 bits, as their values are."""
    folder = write_model(tmp_path, "qwen3_moe")

    def form(name):
        if ".experts." in name:
            return forms[int(name.split(".")[2])]
        return "bf16" if name.endswith(("embed_tokens", "lm_head", "mlp.gate")) else "nvfp4"

    store(folder, form, NVFP4)
    compare(folder, atol=1e-4)
