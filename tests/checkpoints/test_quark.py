# SPDX-License-Identifier: Apache-2.0
"""AMD Quark's configuration, and a file in its documented layout."""

import pytest

from vllm_nvfp4.checkpoints.census import Census
from vllm_nvfp4.checkpoints.detect import detect
from vllm_nvfp4.checkpoints.headers import TensorHeader
from vllm_nvfp4.checkpoints.spec import CheckpointError, LayerKind, Role
from vllm_nvfp4.numerics.formats import MXFP4, NVFP4

FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 16, "scale_format": "float32"}
FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}
MX = FP4 | {"group_size": 32, "scale_format": "e8m0"}


def config(weight, **keys):
    return {"quant_method": "quark", "global_quant_config": {"weight": weight}, **keys}


def test_what_a_layer_is():
    dialect = detect(
        config(
            [FP4, FP8],
            exclude=["lm_head", "*mlp.gate", "re:.*layers.7"],
            layer_quant_config={"*o_proj": {"weight": MX}, "*q_proj": {"weight": FP8}},
        )
    )
    assert dialect.layer_spec("model.layers.0.mlp.up_proj").fmt == NVFP4
    assert dialect.layer_spec("model.layers.0.self_attn.o_proj").fmt == MXFP4
    assert dialect.layer_spec("model.layers.0.self_attn.q_proj").kind is LayerKind.FP8
    for name in ("model.layers.0.mlp.gate", "lm_head", "model.layers.7.mlp.up_proj"):
        assert not dialect.layer_spec(name).is_quantized


def test_a_file_of_it():
    name = "model.layers.0.mlp.up_proj"
    shapes = {
        "weight": ("U8", (32, 32)),
        "weight_scale": ("F8_E4M3", (32, 4)),
        "weight_scale_2": ("BF16", ()),
        "input_scale_2": ("BF16", ()),
    }
    headers = {
        f"{name}.{leaf}": TensorHeader("f", dtype, shape, 0, 1)
        for leaf, (dtype, shape) in shapes.items()
    }
    spec = Census(headers, detect(config([FP4, FP8]))).modules[name].spec
    assert (spec.kind, spec.fmt) == (LayerKind.MICROSCALED, NVFP4)
    assert spec.tensor(Role.GLOBAL_SCALE).name == "weight_scale_2"
    assert spec.tensor(Role.INPUT_SCALE).name == "input_scale_2"


@pytest.mark.parametrize(
    ("weight", "keys", "words"),
    [
        ({"dtype": "int8"}, {}, "with weights in int8; needed weights in fp4 or fp8_e4m3"),
        # The tensors of both are those of MXFP4.
        (MX | {"scale_format": "e5m3"}, {}, "blocks of 32 with scales in e5m3"),
        ([MX, {"dtype": "fp8_e5m3"}], {}, "blocks of 32 with scales in fp8_e5m3"),
        (MX, {"algo_config": [{"name": "rotation", "r1": True, "r4": True}]}, "r4: activations"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(weight, keys, words):
    with pytest.raises(CheckpointError, match=words):
        detect(config(weight, **keys))


def test_a_rotation_that_is_in_the_weights_is_taken():
    rotation = {"name": "rotation", "r1": True, "r2": True, "r3": True, "r4": False}
    assert detect(config(MX, algo_config=[rotation])).has_microscaled_layers()


@pytest.mark.parametrize("key", ["kv_cache_quant_config", "layer_quant_config"])
def test_the_cache_is_what_the_outputs_of_its_layers_are(key):
    """Of 0.13's table for it, and of that of the layers where vLLM looks for it."""
    tables = {"*v_proj": {"weight": MX, "output_tensors": FP8}}
    export = {"kv_cache_group": ["*k_proj", "*v_proj"]}
    assert detect(config(MX, export=export, **{key: tables})).kv_cache.dtype == "fp8"
    assert detect(config(MX, export=export)).kv_cache.dtype is None
