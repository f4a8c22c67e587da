# SPDX-License-Identifier: Apache-2.0
"""The checkpoint writer, and what the demo measures."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vllm_nvfp4.checkpoints import quantizer
from vllm_nvfp4.checkpoints.safetensors_file import SafetensorsWriter
from vllm_nvfp4.checkpoints.source import TensorInfo
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.checkpoints.write import write_nvfp4
from vllm_nvfp4.numerics.formats import NVFP4
from vllm_nvfp4.numerics.quantize import nvfp4_global_scale, quantize_nvfp4
from vllm_nvfp4.numerics.weight import BlockScaledWeight

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, KV, FFN = 64, 32, 96
ATTENTION = {"q_proj": HIDDEN, "k_proj": KV, "v_proj": KV, "o_proj": HIDDEN}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with the tensors of a two-layer Llama in two files; sizes differ by projection."""
    generator = torch.Generator().manual_seed(7)

    def matrix(rows: int, cols: int, size: float = 1.0) -> torch.Tensor:
        return (torch.randn(rows, cols, generator=generator) * size).to(torch.bfloat16)

    folder = tmp_path / "bf16"
    folder.mkdir()
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}
        for position, (name, rows) in enumerate(ATTENTION.items()):
            tensors[f"{prefix}.self_attn.{name}.weight"] = matrix(rows, HIDDEN, 4.0**-position)
        tensors[f"{prefix}.mlp.gate_proj.weight"] = matrix(FFN, HIDDEN)
        tensors[f"{prefix}.mlp.up_proj.weight"] = matrix(FFN, HIDDEN, 0.01)
        tensors[f"{prefix}.mlp.down_proj.weight"] = matrix(HIDDEN, FFN)
        if layer == 0:
            tensors["model.embed_tokens.weight"] = matrix(128, HIDDEN)
        save_file(tensors, folder / f"model-0000{layer + 1}-of-00002.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": HIDDEN}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_written_layers_read_back_bit_exact(source: Path, tmp_path: Path, method: str):
    report = write_nvfp4(source, tmp_path / "out", method=method)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    before = {}
    for path in source.glob("*.safetensors"):
        before |= load_file(path)
    assert sorted(report.quantized) == sorted(
        n.removesuffix(".weight") for n in before if "_proj" in n
    )
    for layer in report.quantized:
        global_scale = stored[f"{layer}.weight_scale_2"]
        expected = quantize_nvfp4(before[f"{layer}.weight"], method, global_scale)
        assert global_scale.shape == ()
        assert global_scale.dtype == torch.float32
        assert stored[f"{layer}.weight_scale"].dtype == torch.float8_e4m3fn
        assert torch.equal(stored[f"{layer}.weight"], expected.codes)
        read = BlockScaledWeight(
            stored[f"{layer}.weight"],
            stored[f"{layer}.weight_scale"],
            global_scale.expand(len(expected.codes)),
            NVFP4,
        )
        assert torch.equal(read.dequantize(), expected.dequantize())
    for name, tensor in before.items():
        if name.removesuffix(".weight") not in report.quantized:
            assert torch.equal(stored[name], tensor), name


def test_pieces_of_rows_are_the_whole(monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    shared = nvfp4_global_scale(weight)
    whole = quantize_nvfp4(weight, "mse", shared)
    monkeypatch.setattr(quantizer, "_PIECE_ELEMENTS", 7 * 64)
    pieces = quantizer.quantize_in_pieces(weight, "mse", shared)
    assert torch.equal(pieces.codes, whole.codes)
    assert torch.equal(pieces.block_scale.view(torch.uint8), whole.block_scale.view(torch.uint8))
    assert torch.equal(pieces.global_scale, whole.global_scale)


def test_shards_of_a_fused_layer_share_their_global_scale(source: Path, tmp_path: Path):
    write_nvfp4(source, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")

    def scale(name: str) -> float:
        return stored[f"model.layers.1.{name}.weight_scale_2"].item()

    assert scale("self_attn.q_proj") == scale("self_attn.k_proj") == scale("self_attn.v_proj")
    assert scale("mlp.gate_proj") == scale("mlp.up_proj")
    assert scale("self_attn.o_proj") != scale("self_attn.q_proj")
    assert scale("mlp.down_proj") != scale("mlp.gate_proj")


def test_config_and_companions(source: Path, tmp_path: Path):
    report = write_nvfp4(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == HIDDEN
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "modelopt"
    assert quantization["quant_algo"] == "W4A16_NVFP4"
    assert quantization["ignore"] == ["model.embed_tokens", "lm_head"]
    assert report.kept == ["model.embed_tokens"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "chat_template.jinja", "model.safetensors"}


def test_report_counts_the_bytes_of_the_files(source: Path, tmp_path: Path):
    report = write_nvfp4(source, tmp_path / "out")
    demo = _load_script("demo")
    assert report.bytes_before == demo.weight_bytes(source)
    assert report.bytes_after == demo.weight_bytes(tmp_path / "out")
    scales = 4 * len(report.quantized)
    assert (report.layer_bytes_after - scales) * 16 == report.layer_bytes_before * 4.5


def test_an_interrupted_write_leaves_nothing(source: Path, tmp_path: Path):
    calls = []

    def interrupt(layer: str) -> None:
        calls.append(layer)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_nvfp4(source, tmp_path / "out", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["bf16"]
    write_nvfp4(source, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_existing_target_is_left_alone(source: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="remove it or choose"):
        write_nvfp4(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_layers_that_do_not_fit_stay_and_are_named(source: Path, tmp_path: Path):
    path = source / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(64, 40, dtype=torch.bfloat16)
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(2, 32, 64)
    save_file(tensors, path)
    report = write_nvfp4(source, tmp_path / "out", ignore=("*down_proj", "model.layers.1.mlp"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    kept = {
        "model.embed_tokens",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.down_proj",
        *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    assert set(report.kept) == kept
    assert set(config["quantization_config"]["ignore"]) == {*kept, "lm_head"}


def test_unusable_sources_say_what_is_missing(source: Path, tmp_path: Path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"0 \.safetensors files, config\.json missing"):
        write_nvfp4(empty, tmp_path / "out")
    with pytest.raises(CheckpointError, match="none to quantise"):
        write_nvfp4(source, tmp_path / "out", ignore=("*",))
    write_nvfp4(source, tmp_path / "once")
    with pytest.raises(CheckpointError, match="found modelopt; needed an unquantised"):
        write_nvfp4(tmp_path / "once", tmp_path / "twice")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "twice").exists()


def test_writer_holds_to_its_header(tmp_path: Path):
    entries = {"a": TensorInfo("F32", (2, 3)), "b": TensorInfo("BF16", (1,))}
    a, b = torch.arange(6.0).view(2, 3), torch.ones(1, dtype=torch.bfloat16)
    with SafetensorsWriter(tmp_path / "x.safetensors", entries) as writer:
        writer.write("a", a.T.contiguous().T)
        writer.write("b", b)
    with safe_open(tmp_path / "x.safetensors", "pt") as reader:
        assert torch.equal(reader.get_tensor("a"), a)
        assert torch.equal(reader.get_tensor("b"), b)
    for name, tensor in (("b", b), ("a", a.double()), ("a", a.T)):
        with (
            pytest.raises(ValueError, match="the header says a"),
            SafetensorsWriter(tmp_path / "y.safetensors", entries) as writer,
        ):
            writer.write(name, tensor)
    with (
        pytest.raises(ValueError, match="1 announced tensors were not written"),
        SafetensorsWriter(tmp_path / "y.safetensors", entries) as writer,
    ):
        writer.write("a", a)


def _load_script(name: str):
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
