# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvfp4 quantize --kv-cache fp8`: scales of what the written model's own layers produce."""

import json
import math

import pytest
import torch
from families import write_family
from safetensors.torch import load_file, save_file
from serving_cases import layer_of
from transformers import DynamicCache

from vllm_nvfp4.checkpoints import detect, read_config
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.quantize.calibration import Calibration
from vllm_nvfp4.quantize.kv_scales import FILE_NAME, HEADROOM, scale_for
from vllm_nvfp4.testing.checkpoints import edit_json
from vllm_nvfp4.testing.engine import engine, has_fp8_kv_cache, reference_model
from vllm_nvfp4.testing.tiny_models import write_model

SIZES = ["--samples", "3", "--sample-length", "64"]
LEAVES = {
    "modelopt": ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
    "compressed-tensors": ("self_attn.k_scale", "self_attn.v_scale"),
}


def quantise(tmp_path, dialect, *flags):
    source = write_model(tmp_path / "plain", "qwen3")
    target = tmp_path / "out"
    command = ["quantize", str(source), "-o", str(target), "--format", dialect, *SIZES, *flags]
    assert main([*command, "--kv-cache", "fp8"]) == 0
    return target


def largest(folder):
    """[(max |K|, max |V|)] of each layer, from transformers' own cache on the same samples."""
    model = reference_model(folder, torch.float32)
    found = []
    for sample in Calibration("builtin", 3, 64, 0).samples(folder):
        cache = DynamicCache()
        with torch.inference_mode():
            model(sample[None], past_key_values=cache, use_cache=True)
        found.append([(c.keys.abs().amax(), c.values.abs().amax()) for c in cache.layers])
    return torch.tensor(found).amax(0).tolist()


@pytest.mark.cpu_path
@pytest.mark.parametrize(
    ("dialect", "method"), [("modelopt", "rtn"), ("compressed-tensors", "gptq")]
)
def test_scales_are_those_of_the_quantised_model(tmp_path, dialect, method):
    folder = quantise(tmp_path, dialect, "--method", method)
    config, quant_config = read_config(folder)
    assert detect(quant_config).kv_cache.dtype == "fp8"
    validate(folder, config, quant_config)
    stored = load_file(folder / FILE_NAME)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {n for n, file in index.items() if file == FILE_NAME} == set(stored)
    for layer, pair in enumerate(largest(folder)):
        for leaf, amax in zip(LEAVES[dialect], pair, strict=True):
            scale = stored[f"model.layers.{layer}.{leaf}"].item()
            assert scale == scale_for(amax)
            assert 448 * scale / 2 < HEADROOM * amax <= 448 * scale


@pytest.mark.vllm
@pytest.mark.cpu_path
def test_vllm_takes_the_scales_where_the_cache_is_fp8(tmp_path):
    folder = quantise(tmp_path, "modelopt", "--method", "rtn")
    stored = load_file(folder / FILE_NAME)
    is_fp8 = has_fp8_kv_cache()
    with engine(folder, dtype="bfloat16") as llm:
        attention = layer_of(llm, "model.layers.1.self_attn.attn")
        assert attention.kv_cache_dtype == ("fp8_e4m3" if is_fp8 else "auto")
        for leaf, found in zip(
            LEAVES["modelopt"], (attention._k_scale_float, attention._v_scale_float), strict=True
        ):
            assert found == (stored[f"model.layers.1.{leaf}"].item() if is_fp8 else 1.0)


K, LAYER = "self_attn.{x}_proj.{x}_scale", "self_attn.{x}_scale"
FUSED, ATTENTION = "self_attn.qkv_proj.{x}_scale", "self_attn.attn.{x}_scale"
NAMES = {"declared": (FUSED, ATTENTION), "not declared": (LAYER, K), "not stored": ("", "")}


def undeclare(config):
    for table in (config, config.get("quantization_config", {}), config.get("quantization", {})):
        table.pop("kv_cache_quant_algo", None)
        table.pop("kv_cache_scheme", None)


@pytest.mark.vllm
@pytest.mark.cpu_path
@pytest.mark.parametrize("case", NAMES)
def test_scales_are_taken_by_every_name_in_use(case, tmp_path):
    """One name in the first layer, one in the second."""
    folder = quantise(tmp_path, "modelopt", "--method", "rtn")
    stored = load_file(folder / FILE_NAME)
    renamed, index = {}, json.loads((folder / "model.safetensors.index.json").read_text())
    for layer, name in enumerate(NAMES[case]):
        for x in "kv":
            old = f"model.layers.{layer}.self_attn.{x}_proj.{x}_scale"
            file = index["weight_map"].pop(old)
            if name:
                new = f"model.layers.{layer}.{name.format(x=x)}"
                renamed[new] = stored[old]
                index["weight_map"][new] = file
    save_file(renamed or {"unused": torch.zeros(1)}, folder / FILE_NAME)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if case == "not declared":
        edit_json(
            folder / "config.json",
            lambda c: c["quantization_config"].pop("kv_cache_quant_algo", None),
        )
    with engine(folder, dtype="bfloat16") as llm:
        for layer, name in enumerate(NAMES[case]):
            attention = layer_of(llm, f"model.layers.{layer}.self_attn.attn")
            is_taken = has_fp8_kv_cache() and name
            for x in "kv":
                expected = stored[f"model.layers.{layer}.self_attn.{x}_proj.{x}_scale"].item()
                found = getattr(attention, f"_{x}_scale_float")
                assert found == (expected if is_taken else 1.0), (layer, x)


@pytest.mark.parametrize("amax", [1e-30, 0.3, 1.0, 447.0, 449.0])
def test_scale_is_a_power_of_two_with_room_above(amax):
    scale = scale_for(amax)
    assert math.log2(scale).is_integer()
    assert 224 * scale < HEADROOM * amax <= 448 * scale
    assert scale_for(0.0) == 1.0


def test_a_model_without_a_plain_cache_is_refused_whole(tmp_path, capsys):
    source = write_family(tmp_path / "plain", "bert")
    command = ["quantize", str(source), "-o", str(tmp_path / "out"), "--kv-cache", "fp8"]
    assert main([*command, *SIZES]) == 1
    assert "Leave --kv-cache out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_text_without_use_is_still_refused(tmp_path, capsys):
    source = write_model(tmp_path / "plain", "qwen3")
    command = ["quantize", str(source), "-o", str(tmp_path / "out"), "--method", "rtn"]
    assert main([*command, "--calibration", "builtin"]) == 1
    assert "looks at no text" in capsys.readouterr().err
