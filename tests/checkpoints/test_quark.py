# SPDX-License-Identifier: Apache-2.0
"""AMD Quark's configuration, and a file in its documented layout."""

import pytest

from vllm_nvfp4.checkpoints.census import Census
from vllm_nvfp4.checkpoints.detect import detect
from vllm_nvfp4.checkpoints.headers import TensorHeader
from vllm_nvfp4.checkpoints.spec import CheckpointError, LayerKind, Role
from vllm_nvfp4.numerics.formats import MXFP4, NVFP4

FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 16, "is_dynamic": False}
FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}


def config(weight, **keys):
    return {"quant_method": "quark", "global_quant_config": {"weight": weight}, **keys}


def test_what_a_layer_is():
    dialect = detect(
        config(
            [FP4, FP8],
            exclude=["lm_head", "*mlp.gate"],
            layer_quant_config={"*o_proj": {"weight": FP4 | {"group_size": 32}}},
        )
    )
    assert dialect.layer_spec("model.layers.0.mlp.up_proj").fmt == NVFP4
    assert dialect.layer_spec("model.layers.0.self_attn.o_proj").fmt == MXFP4
    assert not dialect.layer_spec("model.layers.0.mlp.gate").is_quantized
    assert not dialect.layer_spec("lm_head").is_quantized


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
    assert spec.tensor(Role.UNUSED).name == "input_scale_2"


def test_other_types_are_refused():
    with pytest.raises(CheckpointError, match="with weights in int8; needed weights in fp4"):
        detect(config({"dtype": "int8"}))
