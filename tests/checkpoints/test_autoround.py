# SPDX-License-Identifier: Apache-2.0
"""AutoRound's configuration; its tensors are those of compressed-tensors."""

import pytest

from vllm_nvfp4.checkpoints.detect import detect
from vllm_nvfp4.checkpoints.spec import CheckpointError, LayerKind, Role
from vllm_nvfp4.numerics.formats import MXFP4, NVFP4

CONFIG = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:llm_compressor",
    "bits": 4,
    "data_type": "nv_fp",
    "group_size": 16,
    "sym": True,
    "act_bits": 4,
    "act_data_type": "nv_fp4_with_static_gs",
    "block_name_to_quantize": "model.layers",
    "extra_config": {
        "model.layers.0.mlp.gate_proj": {"bits": 16, "data_type": "float"},
        "model.layers.0.mlp.up_proj": {"bits": 8, "data_type": "mx_fp"},
        # What --layer_config's "mlp.down_proj" becomes.
        r".*mlp\.down_proj.*": {"bits": 16, "data_type": "float"},
        r"o_proj$": {"bits": 8, "data_type": "mx_fp"},
    },
}


class Nested:
    """As vLLM's mapper of a model that calls its layers language_model.model."""

    def apply_list(self, names):
        return [n.replace("model.", "language_model.model.", 1) for n in names]

    def apply_dict(self, table):
        return dict(zip(self.apply_list(table), table.values(), strict=True))


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_what_a_layer_is(prefix):
    dialect = detect(CONFIG)
    if prefix:
        dialect.rename(Nested())
    layer = dialect.layer_spec(f"{prefix}model.layers.1.mlp.up_proj")
    assert (layer.kind, layer.fmt, layer.activation_bits) == (LayerKind.MICROSCALED, NVFP4, 4)
    assert layer.tensor(Role.GLOBAL_DIVISOR).name == "weight_global_scale"
    for name in ("0.mlp.gate_proj", "1.mlp.down_proj"):
        assert not dialect.layer_spec(f"{prefix}model.layers.{name}").is_quantized
        assert dialect.excludes(f"{prefix}model.layers.{name}")
    for name in ("model.mm_projector.0", "lm_head"):
        assert not dialect.layer_spec(prefix + name).is_quantized
    assert dialect.layer_spec(f"{prefix}model.layers.1.self_attn.o_proj").algo == "MXFP8"
    assert dialect.layer_spec(f"{prefix}model.layers.0.mlp.up_proj").algo == "MXFP8"
    assert dialect.has_microscaled_layers()


def test_mxfp4():
    dialect = detect(CONFIG | {"data_type": "mx_fp4e2m1", "group_size": 32})
    assert dialect.layer_spec("model.layers.1.mlp.up_proj").fmt == MXFP4


def test_the_cache_is_what_its_type_says():
    assert detect(CONFIG | {"static_kv_dtype": "fp8"}).kv_cache.dtype == "fp8"
    for other in ({}, {"static_kv_dtype": "nvfp4"}, {"static_kv_granularity": "tensor"}):
        assert detect(CONFIG | other).kv_cache.dtype is None


def test_integers_are_refused():
    with pytest.raises(CheckpointError, match="data_type: found int with 4 bits; needed nv_fp4"):
        detect(CONFIG | {"data_type": "int"})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rotation_config": {"hadamard_type": "hadamard", "block_size": 32}}, "rotated while"),
        ({"spinquant_config": {"algorithm": "spinquant", "r4": True}}, "rotated while"),
        # E5M3 block scales, in the dtype that E8M0's are stored in.
        ({"data_type": "nvfp4_v2"}, "found nvfp4_v2 with 4 bits"),
        ({"extra_config": {"(": {"bits": 16}}}, "a regular expression"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(keys, words):
    with pytest.raises(CheckpointError, match=words):
        detect(CONFIG | keys)
