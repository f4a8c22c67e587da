# SPDX-License-Identifier: Apache-2.0
"""GGUF files with weights in FP4, made of other tools' checkpoints and back bit for bit."""

import gguf
import numpy as np
import pytest
import torch
from gguf_files import TYPE, write_gguf
from safetensors.torch import load_file
from serving_cases import compare
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from vllm_nvfp4.checkpoints.gguf import gguf_to_folder, holds_fp4, write_fp4
from vllm_nvfp4.checkpoints.gguf_fp4 import split_blocks
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.checkpoints.write import write_nvfp4
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.numerics.formats import MXFP4, NVFP4
from vllm_nvfp4.numerics.weight import BlockScaledWeight
from vllm_nvfp4.testing.checkpoints import extract_fixture
from vllm_nvfp4.testing.tiny_models import build_tokenizer

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


def test_experts_come_back_one_by_one_with_their_own_scales(tmp_path):
    # The inner size of an expert is one that transformers does not read and takes for 768.
    config = Qwen3MoeConfig(
        vocab_size=288, hidden_size=64, intermediate_size=128, moe_intermediate_size=768,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
        num_experts=3, num_experts_per_tok=2, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "plain")
    build_tokenizer().save_pretrained(tmp_path / "plain")
    write_nvfp4(tmp_path / "plain", tmp_path / "source", method="rtn")
    path = write_gguf(tmp_path / "source", tmp_path / "model.gguf")
    write_fp4(path, tmp_path / "out", None)
    assert same_bits(tmp_path / "out", tmp_path / "source")
    scales = {t.item() for n, t in load_file(tmp_path / "out" / "model.safetensors").items()
              if "up_proj.weight_scale_2" in n}  # fmt: skip
    assert len(scales) == 3


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
