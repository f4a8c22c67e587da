# SPDX-License-Identifier: Apache-2.0
"""`quantize --ignore`: what stays, what stays with it, and the layers after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantizing import noted_moments
from safetensors.torch import load_file

from vllm_nvfp4.checkpoints.source import Source
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.quantize.calibrated import Calibrated
from vllm_nvfp4.testing.engine import plain_model
from vllm_nvfp4.testing.tiny_models import write_model

TEXT = ["--samples", "4", "--sample-length", "64"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "llama", "llama")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def test_the_shards_of_a_fused_layer_stay_together(llama, tmp_path):
    target = tmp_path / "out"
    arguments = ["quantize", str(llama), "-o", str(target), "--no-check", "--method", "rtn"]
    assert main([*arguments, "--ignore", "*.up_proj", "--ignore", "model.layers.1.self_attn"]) == 0
    ignore = json.loads((target / "config.json").read_text())["quantization_config"]["ignore"]
    assert {n for n in ignore if n.startswith("model.layers.0")} == {
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
    }
    kept = {n.rpartition(".")[2] for n in ignore if n.startswith("model.layers.1")}
    assert kept == {"gate_proj", "up_proj", "q_proj", "k_proj", "v_proj", "o_proj"}
    before, after = stored(llama), stored(target)
    for name in ignore:
        if name != "lm_head":
            assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])


def test_the_experts_of_a_block_stay_together_and_a_strange_name_is_said(tmp_path, capfd):
    """A pattern counts for what lies below a name too."""
    model = write_model(tmp_path / "model", "qwen3_moe")
    found = []
    for i, pattern in enumerate(("*.1.mlp.experts", "*.1.mlp.experts.2", "*.1.*.3.down_proj")):
        target = tmp_path / str(i)
        arguments = ["quantize", str(model), "-o", str(target), "--no-check", "--method", "rtn"]
        assert main([*arguments, "--ignore", pattern, "--ignore", "*.mlp.expert"]) == 0
        said = "".join(capfd.readouterr())
        assert "--ignore *.mlp.expert: no layer has such a name" in said
        assert said.count("no layer has such a name") == 1
        scales = {n for n in stored(target) if "experts" in n and n.endswith(".weight_scale")}
        assert {n.split(".")[2] for n in scales} == {"0"}
        found.append(stored(target).keys())
    assert found[0] == found[1] == found[2]


def test_the_text_goes_through_layers_that_stay(llama, tmp_path, monkeypatch):
    """The second layer's moments are of what the first, unquantised, gives."""
    found = noted_moments(monkeypatch)
    monkeypatch.setattr("vllm_nvfp4.quantize.calibrated.forward_dtype", lambda _: torch.float32)
    samples: list[torch.Tensor] = []
    make = Calibrated.__init__

    def keep_samples(self, *args, **options):
        make(self, *args, **options)
        samples.append(self._samples)

    monkeypatch.setattr(Calibrated, "__init__", keep_samples)
    arguments = ["quantize", str(llama), "-o", str(tmp_path / "out"), "--no-check"]
    arguments += ["--method", "gptq", *TEXT, "--ignore", "model.layers.0"]
    assert main(arguments) == 0
    assert {n.split(".")[2] for n in found} == {"1"}
    model = plain_model(Source(llama).folder, torch.float32)
    inputs: list[torch.Tensor] = []
    q_proj = model.get_submodule("model.layers.1.self_attn.q_proj")
    q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    with torch.inference_mode():
        model(samples[0])
    x = inputs[0]
    expected = x.T @ x / len(x)
    assert torch.allclose(
        found["model.layers.1.self_attn.q_proj.weight"], expected, rtol=1e-3, atol=1e-4
    )
