# SPDX-License-Identifier: Apache-2.0
"""Damaged mixtures of experts: each ends before loading, in one error that names the tensor."""

import re

import pytest
import torch

from vllm_nvfp4.checkpoints import read_config
from vllm_nvfp4.checkpoints.spec import CheckpointError, LayerKind
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.testing.checkpoints import edit_json, edit_tensors, extract_fixture
from vllm_nvfp4.testing.tiny_models import write_model

MODELOPT = "moe_modelopt/nvfp4-qwen3"
COMPRESSED = "moe_compressed_tensors/mxfp4a16-qwen2"
EXPERTS = "model.layers.0.mlp.experts"


def refused(folder, pattern):
    with pytest.raises(CheckpointError) as error:
        validate(folder, *read_config(folder))
    message = str(error.value)
    assert re.search(pattern, message), f"{pattern!r} not in: {message}"
    assert re.fullmatch(r".+: .+: found .+; needed .+\. .+", message, re.DOTALL), message


def without(prefix):
    def edit(tensors):
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return edit


@pytest.mark.parametrize("name", [MODELOPT, COMPRESSED])
def test_real_checkpoints_pass(name, tmp_path):
    folder = extract_fixture(name, tmp_path)
    config, quantization = read_config(folder)
    inventory = validate(folder, config, quantization)
    experts = [layer for layer in inventory.layers if ".experts." in layer.name]
    assert len(experts) == config["num_hidden_layers"] * 4 * 3
    assert {layer.spec.kind for layer in experts} == {LayerKind.MICROSCALED}


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral"])
def test_16_bit_checkpoints_pass(family, tmp_path):
    folder = write_model(tmp_path / family, family)
    inventory = validate(folder, *read_config(folder))
    kinds = {layer.spec.kind for layer in inventory.layers if ".experts." in layer.name}
    assert kinds == {LayerKind.ONLINE}


@pytest.mark.parametrize("name", [MODELOPT, COMPRESSED])
@pytest.mark.parametrize("number", [0, 2, 3])
def test_an_expert_is_missing(name, number, tmp_path):
    folder = edit_tensors(extract_fixture(name, tmp_path), without(f"{EXPERTS}.{number}."))
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)  # it would list the expert
    refused(
        folder,
        rf"model.safetensors: {EXPERTS}.{number}: found no such expert; needed experts 0 to 3, "
        r"as num_(local_)?experts of config.json says",
    )


def test_more_experts_than_the_config_says(tmp_path):
    folder = extract_fixture(MODELOPT, tmp_path)
    edit_json(folder / "config.json", lambda c: c.update(num_experts=3))
    refused(folder, r"model.layers.0.mlp.experts.3: found expert 3; needed experts 0 to 2")


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
def test_a_part_of_an_expert_is_missing(part, tmp_path):
    folder = edit_tensors(extract_fixture(MODELOPT, tmp_path), without(f"{EXPERTS}.2.{part}."))
    refused(folder, rf"{EXPERTS}.2.{part}: found no such tensors; the expert has \w+_proj, \w+_pr")


def test_w1_without_w3_in_every_expert(tmp_path):
    def edit(tensors):
        for name in [name for name in tensors if ".w3." in name]:
            del tensors[name]

    folder = edit_tensors(write_model(tmp_path / "mixtral", "mixtral"), edit)
    refused(
        folder, r"experts.0.w3: found no such tensors; the expert has w1, w2; needed w1, w3, w2"
    )


@pytest.mark.parametrize(
    ("name", "leaf", "value", "pattern"),
    [
        (MODELOPT, "weight_scale_2", torch.ones(2), r"found shape \[2\]; needed 1 value"),
        (MODELOPT, "weight_scale", None, r"found no such tensor.*needed F8_E4M3"),
        (
            COMPRESSED,
            "weight_scale",
            torch.ones(64, 3, dtype=torch.uint8),
            r"found shape \[64, 3\]; needed \[64, 2\]",
        ),
    ],
)
def test_scales_of_the_wrong_count(name, leaf, value, pattern, tmp_path):
    tensor = f"{EXPERTS}.3.up_proj.{leaf}"

    def edit(tensors):
        del tensors[tensor]
        if value is not None:
            tensors[tensor] = value

    folder = edit_tensors(extract_fixture(name, tmp_path), edit)
    refused(folder, rf"{tensor}: {pattern}")


def test_one_expert_in_another_format(tmp_path):
    def edit(tensors):
        without(f"{EXPERTS}.1.")(tensors)
        for part in ("gate_proj", "up_proj", "down_proj"):
            tensors[f"{EXPERTS}.1.{part}.weight"] = torch.zeros(64, 64, dtype=torch.bfloat16)

    folder = edit_tensors(extract_fixture(MODELOPT, tmp_path), edit)
    refused(folder, rf"{EXPERTS}.1.\w+_proj: found BF16; needed nvfp4 \(NVFP4\), as expert 0")


def test_one_expert_of_another_shape(tmp_path):
    def edit(tensors):
        for name in tensors:
            if name.startswith(f"{EXPERTS}.2.up_proj.weight") and tensors[name].dim() == 2:
                tensors[name] = tensors[name][:32]

    folder = edit_tensors(extract_fixture(MODELOPT, tmp_path), edit)
    refused(folder, rf"{EXPERTS}.2.up_proj: found \[32, 64\]; needed \[64, 64\]")


def test_more_choices_than_experts(tmp_path):
    folder = extract_fixture(MODELOPT, tmp_path)
    edit_json(folder / "config.json", lambda c: c.update(num_experts_per_tok=5))
    refused(
        folder, r"config.json: num_experts_per_tok: found 5; needed at most num_local_experts = 4"
    )


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ("gate_up_proj", r"gate_up_proj.weight_scale: found no such tensor; the layer has weight;"),
        ("mixed_proj", r"mixed_proj: found quantised experts stacked in one tensor, U8"),
    ],
)
def test_a_stack_that_cannot_be_read(leaf, message, tmp_path):
    """Without its scales, or of rows that nothing says what they are."""

    def edit(tensors):
        without(f"{EXPERTS}.")(tensors)
        tensors[f"{EXPERTS}.{leaf}"] = torch.zeros(4, 128, 32, dtype=torch.uint8)

    folder = edit_tensors(extract_fixture(MODELOPT, tmp_path), edit)
    refused(folder, rf"{EXPERTS}.{message}")
