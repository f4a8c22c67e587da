# SPDX-License-Identifier: Apache-2.0
"""What stays in 16 bits of a model that is quantised while it loads: by what vLLM builds."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.linear import (
    LinearBase,
    ReplicatedLinear,
    UnquantizedLinearMethod,
)

from vllm_nvfp4.checkpoints.online import online_spec
from vllm_nvfp4.compat.first_rank import first_of_many
from vllm_nvfp4.layers.keep import Kept, keep_towers, why_kept
from vllm_nvfp4.layers.linear import NvFp4OnlineLinearMethod
from vllm_nvfp4.numerics.formats import NVFP4
from vllm_nvfp4.options import Options

EXPERTS = 48


def model_config(**text):
    return SimpleNamespace(get_num_experts=lambda: EXPERTS, hf_text_config=SimpleNamespace(**text))


def layer(cls=LinearBase, n=256, k=128):
    made = object.__new__(cls)
    made.__dict__.update(output_size=n, input_size=k)
    return made


@pytest.mark.parametrize(
    ("made", "prefix", "why"),
    [
        (layer(GateLinear), "model.layers.3.any", "routers"),
        (layer(ReplicatedLinear, n=EXPERTS), "model.layers.3.wg", "routers"),
        (layer(ReplicatedLinear, n=EXPERTS + 4), "model.layers.3.wg", "routers"),
        (layer(n=1), "model.layers.3.mlp.shared_expert_gate", "gates and scores"),
        (layer(ReplicatedLinear, n=1000), "classifier", "outside of the stacks"),
        (layer(), "mtp.fc", "outside of the stacks"),
        (layer(), "language_model.model.per_layer_model_projection", "outside of the stacks"),
        (layer(n=80), "model.layers.3.gate", "per-layer inputs"),
        (layer(k=80), "model.layers.3.projection", "per-layer inputs"),
        (layer(n=EXPERTS), "model.layers.3.self_attn.o_proj", None),  # not replicated
        (layer(), "model.layers.3.mlp.gate", None),
        (layer(ReplicatedLinear), "model.layers.3.self_attn.kv_a_proj_with_mqa", None),
    ],
)
def test_by_class_place_and_sizes(made, prefix, why):
    config = model_config(hidden_size_per_layer_input=80, zero_expert_num=4)
    assert why_kept(made, prefix, config) == why


def test_a_model_without_experts_has_no_router():
    config = SimpleNamespace(get_num_experts=lambda: 0, hf_text_config=SimpleNamespace())
    assert why_kept(layer(ReplicatedLinear), "model.layers.0.x", config) is None
    assert why_kept(layer(ReplicatedLinear), "model.layers.0.x", None) is None


@pytest.fixture
def _one_rank():
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    with first_of_many(SimpleNamespace(**dict.fromkeys(sizes, 1))):
        yield


def online_layer(n, k):
    """A module with the method that quantises, made as vLLM's layers make it."""
    made = torch.nn.Module()
    method = NvFp4OnlineLinearMethod(Options(), online_spec(NVFP4), "x")

    def load(param, loaded):
        param.data.copy_(loaded)

    method.create_weights(made, k, [n], k, n, torch.bfloat16, weight_loader=load)
    made.quant_method = method
    return made


@pytest.mark.usefixtures("_one_rank")
def test_towers_get_their_16_bit_weights_back():
    model = torch.nn.Module()
    model.encoder, model.language_model = torch.nn.Module(), torch.nn.Module()
    model.encoder.deep = torch.nn.ModuleList([online_layer(32, 16)])
    model.language_model.fc = online_layer(64, 16)
    model._tower_model_names = ["encoder"]
    kept = Kept()
    kept.note_quantized(32 * 16)
    kept.note_quantized(64 * 16)
    keep_towers(model, kept)
    given_back = model.encoder.deep[0]
    assert type(given_back.quant_method) is UnquantizedLinearMethod
    assert given_back.weight.shape == (32, 16)
    assert not given_back.weight.is_meta
    given_back.weight.weight_loader(given_back.weight, torch.ones(32, 16))
    assert given_back.weight.eq(1).all()
    assert isinstance(model.language_model.fc.quant_method, NvFp4OnlineLinearMethod)
    line = kept.line("nvfp4")
    assert "1 linear layers are quantised to nvfp4" in line
    assert "1 stay in 16 bits (33.3 % of their weights: 1 in encoders and connectors)" in line


def test_marks_reach_the_config():
    """vLLM's own marker, through the plugin's patch."""
    from vllm.model_executor.models.interfaces import SupportsMultiModal

    from vllm_nvfp4.compat import tower_marks

    told = []
    mm = SimpleNamespace(get_limit_per_prompt=lambda modality: 1)
    config = SimpleNamespace(
        quant_config=SimpleNamespace(towers_are_marked=told.append),
        model_config=SimpleNamespace(get_multimodal_config=lambda: mm),
    )
    tower_marks.install()
    tower_marks.install()  # once is enough

    class Model(torch.nn.Module):
        _mark_tower_model = SupportsMultiModal._mark_tower_model

        def __init__(self):
            super().__init__()
            with self._mark_tower_model(config, {"image"}):
                self.seer = torch.nn.Linear(1, 1)
            self.writer = torch.nn.Linear(1, 1)

    model = Model()
    assert told == [model]
    assert model._tower_model_names == ["seer"]
