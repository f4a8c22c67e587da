# SPDX-License-Identifier: Apache-2.0
"""Weights chosen for 8-bit activations: what the moments are of, and going on."""

from __future__ import annotations

import pytest
import torch
from made_once import made_once
from quantizing import interrupted_at, noted_moments, write_with_tokenizer

from vllm_nvfp4.checkpoints.source import Source
from vllm_nvfp4.checkpoints.units import by_layer
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.numerics.hadamard import hadamard, rotate_blocks
from vllm_nvfp4.numerics.reference import rounded_activations
from vllm_nvfp4.quantize import calibrated
from vllm_nvfp4.quantize.activations import rounded
from vllm_nvfp4.quantize.calibrated import Calibrated
from vllm_nvfp4.quantize.calibration import Calibration
from vllm_nvfp4.quantize.routed import Moments

TEXT = ["--samples", "4", "--sample-length", "64"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(family) -> the folder of a tiny model with a tokenizer, made once."""
    return made_once(tmp_path_factory.mktemp("models"), write_with_tokenizer)


@pytest.mark.parametrize("variant", ["exact", "int8"])
def test_rounding_is_that_of_the_products(variant):
    x = torch.randn(3, 5000, 192, generator=torch.Generator().manual_seed(0))
    expected = rounded_activations(x.flatten(0, 1), variant).float()
    assert torch.equal(rounded(x, variant).flatten(0, 1), expected)
    matrix = hadamard(64)
    turned = rounded(x, variant, lambda t: rotate_blocks(t, matrix)).flatten(0, 1)
    inside = rounded_activations(rotate_blocks(x.flatten(0, 1), matrix), variant).float()
    assert torch.allclose(rotate_blocks(turned, matrix), inside, atol=1e-5)


def moments_of(models, monkeypatch, family: str, variant: str) -> dict[str, torch.Tensor]:
    """Weight -> H, of the first layer that has linear layers."""
    found = noted_moments(monkeypatch)
    source = Source(models(family))
    quantized, _ = source.quantizable()
    quantizer = Calibrated(
        source, "gptq", Calibration(num_samples=4, length=64), a8_variant=variant
    )
    unit = by_layer(source.tensors, quantized)[1]
    quantizer.start(unit, quantized, set(), lambda scale: scale)
    return found


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_moments_are_of_rounded_inputs(models, monkeypatch, family):
    """Each layer's H is of inputs that are all multiples of their scale: an integer grid as coarse
    as this one leaves no other trace than in H itself."""
    seen: list[torch.Tensor] = []

    def coarse(x, variant, rotate=None):
        made = (4 * x.float()).round() / 4
        seen.append(made.flatten(0, -2))
        return made.to(x.dtype)

    monkeypatch.setattr(calibrated, "rounded", coarse)
    found = moments_of(models, monkeypatch, family, "exact")
    # Of an expert's inputs, times router weights, which are no multiples.
    plain = {n: h for n, h in found.items() if ".experts." not in n}
    assert plain
    for name, hessian in plain.items():
        grams = [(x.T @ x / len(x)) for x in seen if x.shape[1] == len(hessian)]
        assert any(torch.allclose(g, hessian, rtol=1e-2, atol=1e-3) for g in grams), name
    downs = [n for n in found if "down_proj" in n]
    assert len({*map(len, seen)}) > (1 if family == "qwen3_moe" else 0), downs


def test_the_down_projection_of_an_expert_sees_rounded_inputs(models, monkeypatch):
    """Inputs of 0 where everything is rounded to 0: H has no trace of them."""
    monkeypatch.setattr(calibrated, "rounded", lambda x, *rest: torch.zeros_like(x))
    found = moments_of(models, monkeypatch, "qwen3_moe", "exact")
    experts = [n for n in found if ".experts." in n]
    assert {n.split(".")[-2] for n in experts} == {"gate_proj", "up_proj", "down_proj"}
    assert all(not found[n].any() for n in found)
    assert Moments.of(torch.ones(4, 16), None).hessian.any()


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(models, tmp_path, monkeypatch):
    arguments = ["quantize", str(models("qwen3_moe")), "--method", "gptq", *TEXT, "--no-check"]
    eight = [*arguments, "--activation", "8", "-o"]
    assert main([*eight, str(tmp_path / "whole")]) == 0
    with interrupted_at(monkeypatch, "model.layers.1."):
        assert main([*eight, str(tmp_path / "parts")]) != 0
    assert main([*eight, str(tmp_path / "parts")]) == 0
    assert main([*arguments, "-o", str(tmp_path / "sixteen")]) == 0
    first, second, third = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
        for name in ("whole", "parts", "sixteen")
    )
    assert first == second
    assert first != third


def test_methods_that_look_at_no_inputs_refuse(models, tmp_path, capsys):
    arguments = ["quantize", str(models("qwen3_moe")), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--activation", "8"]) != 0
    assert "--activation 8 with --method mse, which looks at no inputs" in capsys.readouterr().err
