# SPDX-License-Identifier: Apache-2.0
"""GGUF files with weights in FP4, made of other tools' checkpoints and back bit for bit."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from gguf_files import TYPE, write_gguf
from safetensors.torch import load_file
from serving_cases import compare, compare_to, gpt_oss_answer

from vllm_nvfp4.checkpoints.gguf import gguf_to_folder, holds_fp4, write_fp4
from vllm_nvfp4.checkpoints.gguf_fp4 import split_blocks
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.checkpoints.write import write_nvfp4
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.numerics.formats import MXFP4, NVFP4
from vllm_nvfp4.numerics.weight import BlockScaledWeight
from vllm_nvfp4.testing.checkpoints import edit_json, extract_fixture, to_gpt_oss_mxfp4
from vllm_nvfp4.testing.tiny_models import write_model

# What llama.cpp keeps for itself, or leaves out.
LOST = (".input_scale", ".k_scale", ".v_scale")


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8).tolist(), tensor.dtype, tensor.shape


def same_bits(folder, source):
    found, expected = (load_file(f / "model.safetensors") for f in (folder, source))
    expected = {n: t for n, t in expected.items() if not n.endswith(LOST)}
    return found.keys() == expected.keys() and all(
        bits(found[n]) == bits(expected[n]) for n in found
    )


@pytest.mark.parametrize("name", ["nvfp4-kv8-llama", "mxfp4-llama"])
def test_codes_and_scales_come_back_bit_for_bit(name, tmp_path, capsys):
    source = extract_fixture(f"modelopt/{name}", tmp_path)
    path = write_gguf(source, tmp_path / "model.gguf")
    assert main(["quantize", str(path), "-o", str(tmp_path / "out")]) == 0
    algo = "MXFP4" if name.startswith("mx") else "W4A16_NVFP4"
    assert f"14 layers in {algo}, codes and scales as model.gguf has" in capsys.readouterr().out
    assert same_bits(tmp_path / "out", source)


@pytest.fixture
def experts(tmp_path):
    write_nvfp4(write_model(tmp_path / "plain", "qwen3_moe"), tmp_path / "source", method="rtn")
    return tmp_path / "source"


@pytest.mark.parametrize("split", [0, 10])
def test_experts_come_back_one_by_one_with_their_own_scales(split, experts, tmp_path):
    write_fp4(write_gguf(experts, tmp_path / "model.gguf", split=split), tmp_path / "out", None)
    assert same_bits(tmp_path / "out", experts)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert len({t.item() for n, t in tensors.items() if "0.mlp" in n and "_proj.weight_scale_2" in n
                and "up_" in n}) == 4  # fmt: skip
    # A size that transformers leaves out, as it does a head's of gpt-oss below.
    assert json.loads((tmp_path / "out" / "config.json").read_text())["moe_intermediate_size"] == 64


def test_parts_that_are_not_all_there(experts, tmp_path):
    first = write_gguf(experts, tmp_path / "model.gguf", split=30)
    second = first.with_name(first.name.replace("00001-of", "00002-of"))

    def refusal(path):
        with pytest.raises(CheckpointError) as error:
            holds_fp4(path)
        return str(error.value)

    assert f"found part 2 of 2; needed the first part. Name {first}" in refusal(second)
    shutil.copy(first, other := tmp_path / "model.gguf")
    assert "name: found model.gguf; needed a name that ends in -00001-of-00002.gguf" in refusal(
        other
    )
    whole = second.read_bytes()
    number = whole.index(b"split.no") + 12
    second.write_bytes(whole[:number] + b"\0\0" + whole[number + 2 :])
    assert "split.no: found 0; needed 1" in refusal(first)
    second.unlink()
    assert f"parts: found no file {second.name}; needed all 2 parts" in refusal(first)


@pytest.mark.vllm
def test_gpt_oss_is_served_as_transformers_has_it(tmp_path):
    """Attention sinks, biases of experts, a sliding window and YaRN of the file's own numbers."""
    source = to_gpt_oss_mxfp4(write_model(tmp_path / "source", "gpt_oss"))
    edit_json(source / "config.json", lambda c: c["rope_parameters"].update(factor=8.0))
    write_fp4(write_gguf(source, tmp_path / "model.gguf"), tmp_path / "out", None)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sliding_window"] == 64
    compare_to(gpt_oss_answer(source), tmp_path / "out", atol=1e-4)


@pytest.mark.vllm
def test_the_folder_is_served(tmp_path):
    source = extract_fixture("modelopt/w4a16-llama", tmp_path)
    write_fp4(write_gguf(source, tmp_path / "model.gguf"), tmp_path / "out", None)
    compare(tmp_path / "out", atol=1e-4)


@pytest.mark.parametrize(("kind", "fmt"), [(40, NVFP4), (39, MXFP4)])
def test_blocks_are_worth_what_the_library_makes_of_them(kind, fmt):
    """Every code with every scale that ggml writes, against gguf's own dequantisation."""
    group = fmt.block_size
    in_block = 4 if kind == 40 else 1
    scales = np.arange(255, dtype=np.uint8).repeat(in_block)  # 255: NaN, with a sign besides
    codes = np.random.default_rng(0).integers(0, 256, (len(scales), group // 2), dtype=np.uint8)
    blocks = np.concatenate(
        [scales.reshape(-1, in_block), codes.reshape(-1, in_block * group // 2)], 1
    )
    data = blocks.reshape(1, -1)
    own_codes, own_scales = (torch.from_numpy(part) for part in split_blocks(data, kind))
    if kind == 40:
        own_scales = own_scales.view(torch.float8_e4m3fn)
    value = BlockScaledWeight(own_codes, own_scales, torch.ones(1), fmt).dequantize()
    expected = gguf.dequantize(data, TYPE(kind))
    assert torch.equal(value, torch.from_numpy(expected))


def drop_up(tensors):
    del tensors["blk.1.ffn_up.weight"]


def scale_an_mxfp4(tensors):
    one = np.ones(1, np.float32)
    tensors["blk.1.ffn_up.scale"] = 2 * one, TYPE.F32


def two_scales(tensors):
    tensors["blk.1.ffn_up.scale"] = np.ones(2, np.float32), TYPE.F32


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (drop_up, r"model.layers.1.mlp.up_proj.weight: found no tensor"),
        (scale_an_mxfp4, "blk.1.ffn_up.weight: found MXFP4 with a scale of its own"),
        (two_scales, "1 places, 2 scales"),
    ],
)
def test_what_cannot_be_taken_over_is_named(edit, words, tmp_path):
    source = extract_fixture("modelopt/mxfp4-llama", tmp_path)
    path = write_gguf(source, tmp_path / "model.gguf", edit)
    with pytest.raises(CheckpointError, match=words):
        write_fp4(path, tmp_path / "out", None)
    assert {p.name for p in tmp_path.iterdir()} == {"model.gguf", source.name}


def test_a_scale_beside_another_type_is_not_left_out(tmp_path):
    """transformers passes it over; Llama's q_proj it even takes for a matrix."""

    def in_16_bits(tensors):
        for name, (data, kind) in tensors.items():
            if kind == TYPE.NVFP4:
                half = TYPE.BF16
                tensors[name] = gguf.quants.quantize(gguf.dequantize(data, kind), half), half

    source = extract_fixture("modelopt/w4a16-llama", tmp_path)
    path = write_gguf(source, tmp_path / "model.gguf", in_16_bits)
    assert not holds_fp4(path)
    with pytest.raises(CheckpointError, match=r"\.scale: found a scale of blk\.0\..*\.weight"):
        gguf_to_folder(path, tmp_path / "out")


@pytest.mark.parametrize("flags", [["--method", "rtn"], ["--kv-cache", "fp8"], ["--towers"]])
def test_flags_of_rounding_are_refused(flags, tmp_path, capsys):
    path = write_gguf(extract_fixture("modelopt/mxfp4-llama", tmp_path), tmp_path / "model.gguf")
    assert main(["quantize", str(path), "-o", str(tmp_path / "out"), *flags]) == 1
    assert f"{flags[0]}: the weights of model.gguf are in 4 bits" in capsys.readouterr().err


@pytest.mark.vllm
def test_vllm_names_the_file_and_the_way_out(tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    from vllm_nvfp4 import register

    register()
    path = write_gguf(extract_fixture("modelopt/mxfp4-llama", tmp_path), tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=f"found a file.*quantize {path} -o OUT"):
        EngineArgs(model=str(path), quantization="nvfp4").create_engine_config()
