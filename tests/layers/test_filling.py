# SPDX-License-Identifier: Apache-2.0
"""A layer that loading did not fill ends the load with the tensor's name, whatever memory held."""

import pytest
import torch

from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.config import NvFp4Config
from vllm_nvfp4.layers.filling import check_filled, counted
from vllm_nvfp4.testing.checkpoints import edit_tensors, extract_fixture
from vllm_nvfp4.testing.engine import engine

MODELOPT = "modelopt/nvfp4-kv8-llama"


def parameter(shape):
    made = torch.nn.Parameter(torch.zeros(shape), requires_grad=False)
    made.nvfp4_is_expected = True
    return made


def layer_with(made):
    layer = torch.nn.Module()
    layer.register_parameter("weight", made)
    return layer


def test_what_is_written_is_counted_once():
    made = parameter((4, 8))

    def write(param, rows):
        param.data[rows].copy_(torch.ones(2, 8))

    load = counted(write)
    load(made, slice(0, 2))
    load(made, slice(0, 2))  # the same shard again does not stand for the other
    with pytest.raises(CheckpointError, match=r"a\.b\.weight: found 16 of 32 elements"):
        check_filled(layer_with(made), "a.b")
    load(made, slice(2, 4))
    check_filled(layer_with(made), "a.b")


def test_a_loader_that_fills_the_rest_counts():
    made = parameter((4, 8))

    def write(param, loaded):
        param.data[:3].copy_(loaded)
        param.data[3:].fill_(0)

    counted(write)(made, torch.ones(3, 8))
    check_filled(layer_with(made), "a")


def test_a_loader_that_writes_elsewhere_does_not():
    made = parameter((4, 8))
    counted(lambda param, loaded: loaded.copy_(param))(made, torch.ones(4, 8))
    with pytest.raises(CheckpointError, match="found 0 of 32"):
        check_filled(layer_with(made), "a")


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("name", "gone", "named"),
    [
        (MODELOPT, "model.layers.1.self_attn.k_proj.weight", r"layers\.1\.self_attn\.qkv_proj\.w"),
        (MODELOPT, "model.layers.0.mlp.down_proj.weight", r"model\.layers\.0\.mlp\.down_proj\.w"),
        (
            "moe_modelopt/nvfp4-qwen3",
            "model.layers.1.mlp.experts.2.up_proj.weight",
            r"layers\.1\.mlp\.experts\.2\..*up_proj: weight",
        ),
    ],
)
def test_codes_that_no_file_holds(name, gone, named, tmp_path, monkeypatch):
    """Past the check of the headers, as where they are out of reach."""
    folder = edit_tensors(extract_fixture(name, tmp_path), lambda tensors: tensors.pop(gone))
    for index in folder.glob("*.index.json"):
        index.unlink()
    monkeypatch.setattr(NvFp4Config, "maybe_update_config", lambda *args, **kwargs: None)
    with pytest.raises(CheckpointError, match=named), engine(folder):
        pass
