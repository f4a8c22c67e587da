# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints: each ends in one error that names file, tensor, found, needed, remedy."""

import json
import re

import pytest
import torch

from vllm_nvfp4.checkpoints import detect, read_config
from vllm_nvfp4.checkpoints.inventory import EMBEDDING, HEAD, LINEAR, OTHER
from vllm_nvfp4.checkpoints.spec import CheckpointError, LayerKind, Role
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.layers.weights import quantize_online
from vllm_nvfp4.numerics.formats import MXFP4, NVFP4
from vllm_nvfp4.testing.checkpoints import (
    dequantized_state_dict,
    edit_json,
    edit_tensors,
    extract_fixture,
    fixture_names,
    make_legacy,
    split_into_shards,
)
from vllm_nvfp4.testing.tiny_models import write_model

MODELOPT = "modelopt/nvfp4-kv8-llama"
COMPRESSED = "compressed_tensors/nvfp4a16-llama"
FP_QUANT = "fp_quant/nvfp4-llama"
UP = "model.layers.0.mlp.up_proj"
K_PROJ = "model.layers.1.self_attn.k_proj"


def check(folder):
    return validate(folder, *read_config(folder))


@pytest.fixture
def damaged(tmp_path):
    """damaged(name, edit): a copy of a fixture whose tensors went through ``edit``."""

    def damage(name, edit):
        return edit_tensors(extract_fixture(name, tmp_path), edit)

    return damage


def refused(folder, *words):
    """Validation ends in a CheckpointError that holds every word and all its five parts."""
    with pytest.raises(CheckpointError) as error:
        check(folder)
    message = str(error.value)
    for word in words:
        assert re.search(word, message), f"{word!r} not in: {message}"
    assert re.fullmatch(r".+: .+: found .+; needed .+\. .+", message, re.DOTALL), message


@pytest.mark.parametrize("name", fixture_names())
def test_real_checkpoints_pass(tmp_path, name):
    folder = extract_fixture(name, tmp_path)
    inventory = check(folder)
    linear = [layer for layer in inventory.layers if layer.part == LINEAR]
    every = 7 * json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    assert len(linear) == every
    assert {layer.part for layer in inventory.layers} >= {EMBEDDING, OTHER, LINEAR}
    assert any(layer.part == HEAD for layer in inventory.layers) != inventory.tied_embeddings
    quantized = [layer for layer in linear if layer.spec.kind is not LayerKind.UNQUANTIZED]
    assert len(quantized) == {
        "modelopt/mixed-llama": 13,
        "compressed_tensors/mixed-llama": 6,
    }.get(name, every)
    size = (folder / "model.safetensors").stat().st_size
    assert 0 < size - inventory.num_bytes < 20_000  # the header, and the cache scales


def test_shapes_and_bits_of_a_real_checkpoint(tmp_path):
    inventory = check(extract_fixture(MODELOPT, tmp_path))
    layer = next(layer for layer in inventory.layers if layer.name == UP)
    assert layer.shape == (128, 64)
    assert layer.format == "nvfp4"
    # 4-bit codes, an 8-bit scale for 16 of them, and two 32-bit scalars.
    assert layer.bits_per_weight == pytest.approx(4.5 + 64 / (128 * 64))
    assert layer.files == ("model.safetensors",)
    assert inventory.kv_cache == "fp8"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_checkpoints_without_quantisation_pass(tmp_path, family):
    inventory = check(write_model(tmp_path, family))
    kinds = {layer.spec.kind for layer in inventory.layers if layer.part == LINEAR}
    assert kinds == {LayerKind.ONLINE}
    assert inventory.dialect == "online"


def test_legacy_and_sharded_checkpoints_pass(tmp_path):
    folder = split_into_shards(make_legacy(extract_fixture(MODELOPT, tmp_path)), 3)
    assert len({file for layer in check(folder).layers for file in layer.files}) == 3


# --- files -------------------------------------------------------------------------------------


def test_truncated_shard(tmp_path):
    folder = split_into_shards(extract_fixture(MODELOPT, tmp_path))
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(folder, r"model-00002-of-00002\.safetensors: model\.layers", "truncated", "Download")


def test_missing_shard(tmp_path):
    folder = split_into_shards(extract_fixture(MODELOPT, tmp_path))
    (folder / "model-00001-of-00002.safetensors").unlink()
    refused(folder, r"model-00001-of-00002\.safetensors: file: found nothing")


def test_empty_folder(tmp_path):
    refused(tmp_path, r"config\.json", "found nothing")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, r"no \*\.safetensors file")


# --- tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensor", "dtype", "words"),
    [
        (MODELOPT, "weight_scale", torch.float16, "dtype F16; needed F8_E4M3"),
        (MODELOPT, "weight", torch.int16, "dtype I16; needed U8"),
        (MODELOPT, "weight_scale_2", torch.float64, "dtype F64; needed F32"),
        (COMPRESSED, "weight_packed", torch.int32, "dtype I32; needed U8"),
        (COMPRESSED, "weight_scale", torch.uint8, "dtype U8; needed F8_E4M3"),
        (FP_QUANT, "scales", torch.float8_e4m3fn, "dtype F8_E4M3; needed U8"),
        ("compressed_tensors/mxfp4-llama", "weight_scale", torch.float32, "dtype F32; needed U8"),
    ],
)
def test_wrong_dtype(damaged, name, tensor, dtype, words):
    def edit(tensors):
        tensors[f"{UP}.{tensor}"] = tensors[f"{UP}.{tensor}"].float().to(dtype)

    refused(damaged(name, edit), r"^model\.safetensors: ", rf"{UP}\.{tensor}: found", words)


@pytest.mark.parametrize(
    ("name", "tensor", "change", "words"),
    [
        (MODELOPT, "weight_scale", lambda t: t[:, :3], r"shape \[128, 3\]; needed \[128, 4\]"),
        (MODELOPT, "weight_scale", lambda t: t[:64], r"shape \[64, 4\]; needed \[128, 4\]"),
        (MODELOPT, "weight_scale", lambda t: t.flatten(), r"shape \[512\]; needed \[128, 4\]"),
        (MODELOPT, "weight_scale_2", lambda t: t.repeat(3), r"shape \[3\]; needed 1 value\."),
        (MODELOPT, "weight", lambda t: t.T, r"\[N, K\] = \[32, 256\]"),
        (MODELOPT, "weight", lambda t: t[0], r"shape \[32\]; needed \[N, K\]"),
        (COMPRESSED, "weight_global_scale", lambda t: t.repeat(2), r"shape \[2\]; needed 1 value"),
        (FP_QUANT, "forward_hadamard_matrix", lambda t: t[:8, :8], r"\[8, 8\]; needed \[16, 16\]"),
        (
            "modelopt/fp8-channel-llama",
            "weight_scale",
            lambda t: t[:5],
            r"\[5\]; needed 128 values",
        ),
    ],
)
def test_wrong_shape(damaged, name, tensor, change, words):
    def edit(tensors):
        tensors[f"{UP}.{tensor}"] = change(tensors[f"{UP}.{tensor}"]).contiguous()

    refused(damaged(name, edit), UP, words)


def test_a_weight_of_three_dimensions_that_is_of_no_experts(damaged):
    name = "model.layers.0.self_attn.q_proj"

    def lift(tensors):
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].unflatten(1, (8, -1))

    refused(
        damaged(MODELOPT, lift), re.escape(f"{name}: found shape [128, 8, "), r"needed \[N, K\]\."
    )


def test_wrong_row_scale_and_pre_scale(damaged, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    folder = damaged(
        "compressed_tensors/mixed-llama", lambda t: t.update({name: t[name][:64].contiguous()})
    )
    refused(folder, name, r"shape \[64, 1\]; needed 128 values")
    name = "model.layers.0.self_attn.o_proj.pre_quant_scale"
    folder = damaged("modelopt/awq-llama", lambda t: t.update({name: t[name][:64].contiguous()}))
    refused(folder, name, r"shape \[64\]; needed \[128\]")


@pytest.mark.parametrize("name", [MODELOPT, COMPRESSED])
def test_k_that_is_not_a_multiple_of_the_block(damaged, name):
    codes = f"{UP}.weight" if name == MODELOPT else f"{UP}.weight_packed"
    folder = damaged(name, lambda t: t.update({codes: t[codes][:, :28].contiguous()}))
    refused(folder, codes, "K=56; needed a multiple of the block of 16", "ignore list")


@pytest.mark.parametrize("name", [MODELOPT, COMPRESSED, FP_QUANT])
def test_missing_tensor(damaged, name):
    scale = "scales" if name == FP_QUANT else "weight_scale"
    folder = damaged(name, lambda t: t.pop(f"{K_PROJ}.{scale}"))
    refused(folder, rf"{K_PROJ}\.{scale}: found no such tensor; the layer has", "again")


def test_a_tensor_that_no_list_speaks_of_and_that_has_a_place(damaged):
    """The file decides: an AWQ scale is multiplied in, a scale of activations is of no use."""
    extra = {f"{UP}.pre_quant_scale": torch.ones(64), f"{UP}.output_scale": torch.ones(())}
    layers = {r.name: r for r in check(damaged(MODELOPT, lambda t: t.update(extra))).layers}
    roles = {t.name: t.role for t in layers[UP].spec.tensors}
    assert roles["pre_quant_scale"] is Role.PRE_SCALE
    assert roles["output_scale"] is Role.UNUSED


def test_an_awq_scale_beside_a_16_bit_weight(damaged):
    def edit(tensors):
        tensors["lm_head.pre_quant_scale"] = torch.ones(64)

    refused(damaged(MODELOPT, edit), r"lm_head\.pre_quant_scale", "left out of the product")


@pytest.mark.parametrize("leaf", ["svdquant_lora_a", "weight_zero_point"])
def test_tensor_that_would_be_left_out_of_the_product(damaged, leaf):
    folder = damaged(MODELOPT, lambda t: t.update({f"{UP}.{leaf}": torch.ones(64)}))
    refused(folder, rf"{UP}\.{leaf}", "does not have", "left out of the product")


@pytest.mark.parametrize(("byte", "shown"), [(0x7F, "nan"), (0xFF, "nan"), (0xB8, "-1.0")])
def test_nan_and_negative_block_scales_in_a_file(damaged, byte, shown):
    def edit(tensors):
        tensors[f"{UP}.weight_scale"].view(torch.uint8)[7, 2] = byte

    folder = damaged(MODELOPT, edit)
    check(folder)  # headers alone are in order
    with pytest.raises(CheckpointError) as error:
        dequantized_state_dict(folder)
    assert f"{UP}.weight_scale: found 1 bad of 512, first {shown} at [7, 2]" in str(error.value)


def test_zero_block_scale_is_an_all_zero_block(damaged):
    def edit(tensors):
        tensors[f"{UP}.weight_scale"].view(torch.uint8)[7, 2] = 0

    value = dequantized_state_dict(damaged(MODELOPT, edit))[f"{UP}.weight"]
    assert (value[7, 32:48] == 0).all()
    assert (value[7, :32] != 0).any()


# --- the configuration against the files --------------------------------------------------------


def test_unknown_quant_algo(tmp_path):
    folder = make_legacy(extract_fixture(MODELOPT, tmp_path))
    edit_json(folder / "hf_quant_config.json", lambda c: c["quantization"].update(quant_algo="X9"))
    refused(folder, "quant_algo: found X9; needed one of NVFP4, W4A16_NVFP4")


@pytest.mark.parametrize("name", [MODELOPT, COMPRESSED])
def test_a_shard_in_16_bits_is_one(damaged, name):
    def edit(tensors):
        for key in [k for k in tensors if k.startswith(K_PROJ + ".") and "k_scale" not in k]:
            del tensors[key]
        tensors[f"{K_PROJ}.weight"] = torch.zeros((64, 64), dtype=torch.bfloat16)

    folder = damaged(name, edit)
    formats = {layer.name: layer.format for layer in check(folder).layers}
    assert formats[K_PROJ] == "BF16"
    assert formats[K_PROJ.replace("k_proj", "q_proj")] == "nvfp4"


def test_missing_shard_of_a_fused_layer(damaged):
    def edit(tensors):
        for key in [k for k in tensors if k.startswith("model.layers.1.mlp.gate_proj.")]:
            del tensors[key]

    refused(damaged(MODELOPT, edit), "gate_up_proj: found up_proj nvfp4, no gate_proj", "all there")


def test_quantised_layer_that_the_config_ignores(tmp_path):
    folder = extract_fixture(COMPRESSED, tmp_path)
    edit_json(
        folder / "config.json", lambda c: c["quantization_config"]["ignore"].append("re:.*mlp.*")
    )
    formats = {layer.format for layer in check(folder).layers if ".mlp." in layer.name}
    assert formats == {"nvfp4"}  # the file decides


def test_nothing_is_quantised_at_all(tmp_path):
    folder = write_model(tmp_path / "plain", "llama")
    quantized = extract_fixture(COMPRESSED, tmp_path)
    quant_config = json.loads((quantized / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=quant_config))
    refused(folder, "a BF16 weight, with the tensors weight, and no quantised.*; needed nvfp4")


def test_config_names_a_layer_that_is_not_there(tmp_path):
    folder = extract_fixture("modelopt/mixed-llama", tmp_path)
    layers = {"model.layers.7.mlp.up_proj": {"quant_algo": "NVFP4", "group_size": 16}}
    edit_json(
        folder / "config.json",
        lambda c: c["quantization_config"]["quantized_layers"].update(layers),
    )
    formats = {layer.name: layer.format for layer in check(folder).layers}
    assert next(iter(layers)) not in formats
    folder = extract_fixture("compressed_tensors/mixed-llama", tmp_path)
    edit_json(
        folder / "config.json",
        lambda c: c["quantization_config"]["config_groups"]["group_2"].update(targets=["a.b.c"]),
    )
    assert "a.b.c" not in {layer.name for layer in check(folder).layers}


def test_layers_that_are_missing(tmp_path):
    folder = extract_fixture(MODELOPT, tmp_path)
    edit_json(folder / "config.json", lambda c: c.update(num_hidden_layers=14))
    refused(
        folder,
        r"model\.layers\.<n>: found 2 of 14 layers, without 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.",
        "num_hidden_layers",
    )


# --- what must not be refused -------------------------------------------------------------------


def test_modules_that_no_configuration_lists_pass(damaged):
    """Routers, vision encoders' convolutions, draft layers past the last one."""

    def edit(tensors):
        tensors["model.layers.0.mlp.router.weight"] = torch.zeros((4, 64), dtype=torch.bfloat16)
        tensors["model.layers.0.mlp.router.bias"] = torch.zeros(4, dtype=torch.bfloat16)
        tensors["visual.patch_embed.weight"] = torch.zeros((8, 3, 4, 4), dtype=torch.bfloat16)
        tensors["visual.layers.9.norm.weight"] = torch.ones(8, dtype=torch.bfloat16)
        tensors["mtp.head.weight"] = torch.zeros((4, 8), dtype=torch.uint8)
        tensors["model.layers.2.extra.weight"] = torch.zeros((4, 8), dtype=torch.uint8)

    folder = damaged(MODELOPT, edit)
    edit_json(
        folder / "config.json",
        lambda c: c["quantization_config"]["ignore"].extend(["mtp*", "model.layers.2*"]),
    )
    names = {layer.name: layer for layer in check(folder).layers}
    assert names["model.layers.0.mlp.router"].spec.kind is LayerKind.UNQUANTIZED
    assert names["mtp.head"].format == "U8"


def test_a_bias_is_part_of_its_layer(damaged):
    folder = damaged(MODELOPT, lambda t: t.update({f"{UP}.bias": torch.zeros(128)}))
    layer = next(layer for layer in check(folder).layers if layer.name == UP)
    assert layer.shape == (128, 64)


@pytest.mark.parametrize(("name", "block"), [(MODELOPT, 16), ("modelopt/w4a8-llama", 32)])
def test_a_dialect_at_hand_is_settled(tmp_path, name, block):
    folder = extract_fixture(name, tmp_path)
    config, _ = read_config(folder)
    quant_config = {"quant_method": "modelopt", "quant_algo": "W4A8_NVFP4_FP8"}
    quant_config |= {"ignore": ["lm_head"]}
    dialect = detect(quant_config)
    assert dialect.layer_spec(UP).scale_block == 32  # the tool's own recipe
    validate(folder, config, quant_config, dialect=dialect)
    assert dialect.layer_spec(UP).scale_block == block


def test_an_error_is_one_short_line_whatever_the_file_holds():
    error = CheckpointError("f", "a\nb\x1b[31m\ud800", "x" * 10**6, 1, "Do.")
    assert error.what == "a\\nb\\x1b[31m\\ud800"
    assert str(error).isprintable()
    assert len(str(error)) < 2000


def test_no_layers(tmp_path):
    folder = extract_fixture(MODELOPT, tmp_path)
    edit_json(folder / "config.json", lambda c: c.update(num_hidden_layers=0))
    refused(folder, "num_hidden_layers: found 0; needed 1 or more")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("modelopt/awq-llama", "model.layers.0.self_attn.o_proj.pre_quant_scale"),
        (FP_QUANT, f"{UP}.forward_hadamard_matrix"),
    ],
)
def test_what_activations_are_multiplied_by_is_finite(damaged, name, tensor, bad):
    def edit(tensors):
        tensors[tensor].view(-1)[3] = bad

    with pytest.raises(CheckpointError, match=f"{tensor}: found 1 bad of .*finite values"):
        dequantized_state_dict(damaged(name, edit))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda f: f.name)
def test_a_16_bit_weight_that_is_not_finite_is_not_quantised(fmt, bad):
    weight = torch.ones(4, 64, dtype=torch.bfloat16)
    weight[2, 5] = bad
    with pytest.raises(CheckpointError, match=r"a\.b\.weight: found 1 bad of 256.*at \[2, 5\]"):
        quantize_online(weight, [2, 2], fmt, "rtn", torch.ones(2), layer="a.b")
