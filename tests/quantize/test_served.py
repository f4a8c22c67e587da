# SPDX-License-Identifier: Apache-2.0
"""What `quantize` writes of experts of their own kind, and of encoders, served by a real engine
against stock vLLM on the same weights dequantised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import SIZES

from vllm_nvfp4.checkpoints.headers import read_headers
from vllm_nvfp4.checkpoints.quantizer import DataFree
from vllm_nvfp4.checkpoints.write import WriteOptions, write_resumable
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.testing.architectures import ARCHITECTURES
from vllm_nvfp4.testing.engine import engine
from vllm_nvfp4.testing.model_sweep import Sweep, stored_matrices, write_twin
from vllm_nvfp4.testing.tiny_models import build_tokenizer

pytestmark = pytest.mark.vllm
TEXT = ["--samples", "4", "--sample-length", "64"]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt-oss", ["--method", "mse"]),  # biases, rows of gate and up in turns
        ("gpt-oss", ["--method", "rtn", "--format", "compressed-tensors"]),
        ("gpt-oss", ["--method", "gptq", *TEXT]),
        ("llama4", ["--method", "gptq", *TEXT]),  # its router multiplies the inputs
    ],
)
def test_experts_as_written(family, options, tmp_path):
    sweep = Sweep(ARCHITECTURES[family], tmp_path, main)
    build_tokenizer().save_pretrained(sweep.plain)
    assert main(["quantize", str(sweep.plain), "-o", str(tmp_path / "out"), *options]) == 0
    measured = sweep.measure("out")
    assert measured.deviation < measured.tolerance
    assert measured.share > 0.5


@pytest.mark.parametrize(
    ("family", "options", "share"),
    [
        ("whisper", ["--method", "mse"], 0.4),
        ("whisper", ["--method", "rtn", "--towers", "--format", "compressed-tensors"], 0.8),
        ("gemma3-vision", ["--method", "mse", "--towers"], 0.7),
    ],
)
def test_towers_as_written(family, options, share, tmp_path):
    sweep = Sweep(ARCHITECTURES[family], tmp_path, main)
    assert main(["quantize", str(sweep.plain), "-o", str(tmp_path / "out"), *options]) == 0
    measured = sweep.measure("out")
    assert measured.shown < measured.tolerance
    assert measured.share > share


def test_a_stack_of_which_nothing_is_quantised_stays_one(tmp_path):
    """vLLM's gpt-oss takes no expert alone in 16 bits."""
    sweep = Sweep(ARCHITECTURES["gpt-oss"], tmp_path, main)
    kept = "model.layers.1.mlp.experts"

    def formats(work, asked):
        return {n: "bf16" if n.startswith(kept) else "nvfp4" for n in asked}

    write_resumable(sweep.plain, tmp_path / "out", DataFree("rtn"), WriteOptions(precision=formats))
    names = {n for n in read_headers(tmp_path / "out") if n.startswith(kept)}
    assert names == {f"{kept}.{p}_proj{b}" for p in ("down", "gate_up") for b in ("", "_bias")}
    measured = sweep.measure("out")
    assert measured.deviation < measured.tolerance


@pytest.mark.checks_written
@pytest.mark.parametrize(("family", "is_plain"), [("gpt-oss", True), ("qwen3", False)])
def test_formats_are_for_what_vllm_s_class_quantises(family, is_plain, tmp_path, capfd):
    """gpt-oss has an lm_head and an embedding that ask no quantization config."""
    sweep = Sweep(ARCHITECTURES[family], tmp_path, main)
    build_tokenizer().save_pretrained(sweep.plain)
    out = tmp_path / "out"
    arguments = ["quantize", str(sweep.plain), "-o", str(out), "--method", "rtn"]
    assert main([*arguments, "--target-bits", "5", "--embedding"]) == 0
    said = "".join(capfd.readouterr())
    assert ("builds them without quantisation" in said) is is_plain
    tables = ("lm_head.weight", "model.embed_tokens.weight")
    headers = read_headers(out)
    assert {headers[name].dtype == "BF16" for name in tables} == {is_plain}
    measured = sweep.measure("out")
    assert measured.deviation < measured.tolerance


ENCODERS = {
    "BertModel": "BertConfig",
    "RobertaModel": "RobertaConfig",
    "XLMRobertaModel": "XLMRobertaConfig",
    "ModernBertModel": "ModernBertConfig",
}
PROMPTS = [[1, 5, 17, 40, 3, 99, 2], [1, 200, 31, 2]]


def write_encoder(folder: Path, name: str) -> Path:
    import transformers

    sizes = SIZES | {"num_attention_heads": 2, "num_key_value_heads": 2}  # heads of 32
    config = getattr(transformers, ENCODERS[name])(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def embeddings(folder: Path, **options) -> torch.Tensor:
    with engine(folder, runner="pooling", dtype="float32", **options) as llm:
        prompts = [{"prompt_token_ids": p} for p in PROMPTS]
        return torch.tensor([o.outputs.embedding for o in llm.embed(prompts, use_tqdm=False)])


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
def test_embeddings_are_those_of_the_dequantised_weights(name, dialect, tmp_path):
    plain = write_encoder(tmp_path / "plain", name)
    target = tmp_path / "out"
    arguments = ["quantize", str(plain), "-o", str(target), "--method", "rtn"]
    assert main([*arguments, "--format", dialect]) == 0
    matrices = stored_matrices(target, plain)
    assert matrices
    assert write_twin(plain, matrices, tmp_path / "twin") == 0
    found = embeddings(target)
    expected = embeddings(tmp_path / "twin", quantization=None)
    before = embeddings(plain, quantization=None)
    assert (found - expected).abs().max() < 1e-4
    assert (found - before).abs().max() > 0.01
