# SPDX-License-Identifier: Apache-2.0
"""Calibrated experts: what each of them sees, what those that see little get, and going on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import write_family
from made_once import made_once
from quantizing import write_with_tokenizer
from safetensors.torch import load_file

from vllm_nvfp4.checkpoints.source import Source
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.checkpoints.units import by_layer
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.quantize import memory, routed
from vllm_nvfp4.quantize.calibrated import Calibrated
from vllm_nvfp4.quantize.calibration import Calibration
from vllm_nvfp4.quantize.forward import LayerwiseModel
from vllm_nvfp4.quantize.hessian import output_error, quantize_hessian
from vllm_nvfp4.quantize.routed import FEW_TOKENS, ExpertInputs, Moments, Routing, Stack
from vllm_nvfp4.testing.checkpoints import dequantized_state_dict, edit_tensors
from vllm_nvfp4.testing.engine import plain_model
from vllm_nvfp4.testing.tiny_models import build_tokenizer

EXPERTS = "model.layers.0.mlp.experts"
# Four experts, two a token: about half of these go to each.
TEXT = ["--samples", "8", "--sample-length", "128"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(family) -> the folder of a tiny model with a tokenizer, made once."""
    return made_once(tmp_path_factory.mktemp("models"), write_with_tokenizer)


def layerwise(folder: Path, samples: torch.Tensor) -> tuple[Source, LayerwiseModel]:
    source = Source(folder)
    source.quantizable()
    load = lambda name: source.load(name, "cpu")  # noqa: E731
    return source, LayerwiseModel(folder, source.tensors, load, samples)


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("qwen3_moe", 1),
        ("qwen3_vl_moe", 1),
        ("granite4", 0),
        ("glm47_flash", 1),
        ("qwen3_next", 3),
        ("gemma4_moe", 1),
        ("gemma4_e", 3),
        ("falcon_h1", 1),
        ("mamba2", 1),
        ("gpt_oss", 1),
        ("llama4", 1),
        ("kimi-linear", 3),
    ],
)
def test_layer_by_layer_is_the_whole_model(models, family, layer):
    """Hidden states against transformers' own forward: stacks, hybrids, text stacks of vision
    models; nothing of what a layer is passed beside its input is lost."""
    samples = torch.randint(4, 260, (2, 40), generator=torch.Generator().manual_seed(1))
    _, mine = layerwise(models(family), samples)
    whole = plain_model(models(family), torch.float32) if "vl" not in family else _vision(models)
    seen: list[torch.Tensor] = []
    decoder = whole.get_decoder()
    watched = getattr(decoder, "model", decoder).layers[layer]
    watched.register_forward_pre_hook(
        lambda _, args, options: seen.append((*args, *options.values())[0]), with_kwargs=True
    )
    with torch.inference_mode():
        whole(input_ids=samples)
    hidden = torch.cat(mine.hidden)
    for i in range(layer):
        hidden = mine.run(mine.layer(i, {}), i, hidden)
    assert torch.allclose(hidden, seen[0], rtol=1e-3, atol=1e-4)


def test_layers_that_take_other_hidden_states_are_refused(models):
    with pytest.raises(CheckpointError, match="hidden states of 4 dimensions"):
        layerwise(models("gemma3n"), torch.zeros(1, 8, dtype=torch.long))


def _vision(models):
    from transformers import AutoModelForImageTextToText

    folder = models("qwen3_vl_moe")
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def test_each_expert_sees_its_tokens(models, tmp_path):
    """hessian's scales against moments that are collected here, expert by expert, in float64."""
    source = Source(models("qwen3_moe"))
    calibration = Calibration(num_samples=16, length=128)
    quantized, _ = source.quantizable()
    calibrated = Calibrated(source, "hessian", calibration)
    unit = by_layer(source.tensors, quantized)[1]
    calibrated.start(unit, quantized, set(), lambda scale: scale)
    counts = calibrated.expert_tokens[EXPERTS]
    assert sum(counts) == 2 * 16 * 128

    whole = plain_model(source.folder, torch.float32)
    found = calibrated._found
    with torch.no_grad():
        for name, weight in found.items():
            if "self_attn" in name:
                whole.get_parameter(name).copy_(weight.dequantize())
    seen: list[tuple[torch.Tensor, ...]] = []
    whole.get_submodule(EXPERTS).register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.inference_mode():
        whole(calibration.samples(source.folder))
    x, index, weights = seen[0]
    expert = int(torch.tensor(counts).argmax())
    assert counts[expert] >= FEW_TOKENS
    token, slot = (index == expert).nonzero(as_tuple=True)
    own = (x[token] * weights[token, slot, None]).double()
    hessian = (own.T @ own / len(own)).float()
    name = f"{EXPERTS}.{expert}.up_proj.weight"
    weight = source.load(name, "cpu").float()
    expected = quantize_hessian(weight, hessian, found[name].global_scale[0])
    mine, best = (output_error(weight, q, hessian) for q in (found[name], expected))
    # Hidden states in BF16 where the CPU has it: the moments differ in the third digit.
    assert mine <= best * 1.02
    other = quantize_hessian(weight, torch.eye(64), found[name].global_scale[0])
    assert output_error(weight, other, hessian) > best * 1.1


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_gptq_of_experts_keeps_the_hidden_states_nearer_than_mse(models, tmp_path, family):
    folder = models(family)
    samples = Calibration(num_samples=8, length=128).samples(folder)
    _, plain = layerwise(folder, samples)
    errors = {}
    for method in ("mse", "gptq"):
        target = tmp_path / method
        options = TEXT if method == "gptq" else []
        assert main(["quantize", str(folder), "-o", str(target), "--method", method, *options]) == 0
        weights = {n: t.float() for n, t in dequantized_state_dict(target).items()}
        outputs = []
        for changed in ({}, weights):
            hidden = torch.cat(plain.hidden)
            for i in range(plain.num_layers):
                hidden = plain.run(plain.layer(i, changed), i, hidden)
            outputs.append(hidden)
        errors[method] = float((outputs[1] - outputs[0]).norm())
    assert errors["gptq"] < 0.9 * errors["mse"]


def test_experts_that_get_little_take_their_layer_s_moments(models, tmp_path, capfd):
    """One expert that no token reaches: its codes are those for the inputs of all."""
    folder = tmp_path / "model"
    write_family(folder, "qwen3_moe")
    build_tokenizer().save_pretrained(folder)

    def edit(tensors):
        gate = tensors["model.layers.1.mlp.gate.weight"]
        gate[1:] = gate[0]  # ties go to the first two
        gate[3] = 0

    edit_tensors(folder, edit)
    target = tmp_path / "out"
    assert main(["quantize", str(folder), "-o", str(target), "--method", "gptq", *TEXT]) == 0
    said = "".join(capfd.readouterr())
    assert "experts got fewer than 256 tokens" in said
    assert " 0 of them none" not in said
    for tensor in dequantized_state_dict(target).values():
        assert tensor.isfinite().all()


def test_moments_shrink_towards_the_layer_s():
    generator = torch.Generator().manual_seed(0)
    many, few = torch.randn(4096, 32, generator=generator), torch.randn(64, 32, generator=generator)
    pooled, own = Moments.of(many, many + 0.1), Moments.of(few, few + 0.1)
    quarter = pooled.shrunk(own, 64 / 256)
    assert torch.allclose(quarter.hessian, 0.75 * pooled.hessian + 0.25 * own.hessian, atol=1e-6)
    assert quarter.shift is not None
    assert torch.allclose(quarter.shift, 0.75 * pooled.shift + 0.25 * own.shift, atol=1e-6)
    assert pooled.shrunk(None, 0.0) is pooled


def test_experts_of_another_kind_are_refused(models):
    """A module whose forward is not act(gate) * up is found by comparing, not by its name."""
    folder = models("qwen3_moe")
    source, mine = layerwise(folder, torch.randint(4, 260, (1, 16)))
    layer = mine.layer(0, {})
    module = layer.mlp.experts
    names = [n for n in source.quantizable()[0] if n.startswith(EXPERTS)]
    places = {n: mine.expert(0, n) for n in names}
    routing = Routing.of(
        "x", (torch.randn(16, 64), torch.randint(0, 4, (16, 2)), torch.rand(16, 2)), 4
    )
    stack = Stack("x", module, places)
    stack.check(routing)
    module.act_fn = torch.nn.Tanh()
    stack.check(routing)
    inner = module.forward
    module.forward = lambda *args: 2 * inner(*args)
    with pytest.raises(CheckpointError, match="outputs that are not"):
        stack.check(routing)
    with pytest.raises(CheckpointError, match="indices of experts"):
        Routing.of("x", (torch.randn(15, 64),), 4)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(models, tmp_path, monkeypatch):
    folder = models("glm47_flash")
    arguments = ["quantize", str(folder), "--method", "gptq", *TEXT, "-o"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    calls = []
    whole = routed.quantize_routed

    def stopped(*args):
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_nvfp4.quantize.calibrated.quantize_routed", stopped)
    assert main([*arguments, str(tmp_path / "parts")]) != 0
    assert calls
    monkeypatch.setattr("vllm_nvfp4.quantize.calibrated.quantize_routed", whole)
    assert main([*arguments, str(tmp_path / "parts")]) == 0
    first, second = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "parts")
    )
    assert first == second


def test_gate_and_up_share_a_global_scale(models, tmp_path):
    target = tmp_path / "out"
    arguments = ["quantize", str(models("qwen3_moe")), "-o", str(target), "--method", "hessian"]
    assert main([*arguments, *TEXT]) == 0
    stored: dict[str, torch.Tensor] = {}
    for path in target.glob("*.safetensors"):
        stored |= load_file(path)
    for expert in range(4):
        gate, up = (stored[f"{EXPERTS}.{expert}.{n}_proj.weight_scale_2"] for n in ("gate", "up"))
        assert gate == up


@pytest.mark.parametrize("method", ["gptq", "hessian"])
def test_less_memory_is_more_passes_to_the_same_bytes(models, tmp_path, monkeypatch, capfd, method):
    """Room for the moments of none, of two and of all four experts of a layer."""
    folder = models("qwen3_moe")
    passes: list[int] = []
    whole = ExpertInputs.of_down
    monkeypatch.setattr(
        ExpertInputs,
        "of_down",
        lambda self, expert, names: passes.append(expert) or whole(self, expert, names),
    )
    monkeypatch.setattr(memory, "expected_peak", lambda extra: 0)
    source = Source(folder)
    quantized, _ = source.quantizable()
    all_of_them = memory.kept_bytes(
        source, by_layer(source.tensors, quantized), quantized, method == "gptq"
    )
    files, counts = [], []
    for part in (1, 0.5, 1e-9):
        passes.clear()
        target = tmp_path / f"{part}"
        arguments = ["quantize", str(folder), "-o", str(target), "--method", method, *TEXT]
        capfd.readouterr()
        assert main([*arguments, "--memory", str(part * all_of_them / 2**30)]) == 0
        said = "".join(capfd.readouterr())
        assert ("the others computed twice" in said) is (part < 1)
        files.append({p.name: p.read_bytes() for p in target.iterdir()})
        counts.append(len(passes))
    assert files[1] == files[0]
    assert files[2] == files[0]
    layers = 2
    assert counts == [4 * layers, 6 * layers, 8 * layers]


def test_a_budget_that_is_too_small_is_refused(models, tmp_path, capfd):
    arguments = ["quantize", str(models("qwen3_moe")), "-o", str(tmp_path / "out"), *TEXT]
    assert main([*arguments, "--method", "gptq", "--memory", "0.01"]) != 0
    said = "".join(capfd.readouterr())
    assert "--memory 0.01: this run needs about" in said
    assert "fewer --samples" in said
    assert not (tmp_path / "out").exists()
