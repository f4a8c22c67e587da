# SPDX-License-Identifier: Apache-2.0
"""What `quantize` writes of experts of their own kind, and of encoders, served by a real engine
against stock vLLM on the same weights dequantised."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import SIZES
from safetensors.torch import save_file

from vllm_nvfp4.checkpoints.headers import read_headers
from vllm_nvfp4.checkpoints.quantizer import DataFree
from vllm_nvfp4.checkpoints.write import WriteOptions, write_resumable
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.testing.architectures import ARCHITECTURES
from vllm_nvfp4.testing.checkpoints import edit_json
from vllm_nvfp4.testing.engine import engine
from vllm_nvfp4.testing.model_sweep import Sweep, stored_matrices, write_twin
from vllm_nvfp4.testing.tiny_models import build_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.long]
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
    if options.get("quantization", "nvfp4") is None:  # what stock vLLM asks an XLM-RoBERTa for
        edit_json(
            folder / "config.json", lambda c: c.setdefault("position_embedding_type", "absolute")
        )
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


def add_parts(folder: Path) -> None:
    """Make an encoder a sentence encoder: mean of the tokens, then a projection."""
    names = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(names.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for name in [*names][1:]:
        (folder / name).mkdir()
    pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    dense = {"in_features": 64, "out_features": 48, "bias": False}
    dense["activation_function"] = "torch.nn.modules.linear.Identity"
    (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)) / 8
    save_file({"linear.weight": weight}, folder / "2_Dense" / "model.safetensors")


def test_the_parts_of_a_sentence_encoder_go_along(tmp_path):
    """Without them vLLM takes the first token's state, of another size, without a word."""
    plain = write_encoder(tmp_path / "plain", "XLMRobertaModel")
    without = embeddings(plain, quantization=None)
    add_parts(plain)
    for copy in ("onnx", ".cache"):
        (plain / copy).mkdir()
        (plain / copy / "model.onnx").write_bytes(b"other form")
    (plain / "tf_model.h5").write_bytes(b"other form")
    target = tmp_path / "out"
    assert main(["quantize", str(plain), "-o", str(target), "--method", "rtn"]) == 0
    assert not [*target.rglob("*.onnx"), *target.rglob("*.h5"), *target.rglob(".cache")]
    twin = tmp_path / "twin"
    write_twin(plain, stored_matrices(target, plain), twin)
    for part in ("1_Pooling", "2_Dense"):
        shutil.copytree(plain / part, twin / part)
    found = embeddings(target)
    assert found.shape[1] == 48 != without.shape[1]
    assert (found - embeddings(twin, quantization=None)).abs().max() < 1e-4
