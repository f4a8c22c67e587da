# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvfp4 quantize --method mr-gptq`: GPTQ on rotated weights, in FP-Quant's dialect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from serving_cases import compare

from vllm_nvfp4.checkpoints.detect import read_config
from vllm_nvfp4.checkpoints.source import Source
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.checkpoints.written import FpQuantFormat
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.numerics.hadamard import hadamard, rotate_blocks
from vllm_nvfp4.quantize.calibrated import rotation_size
from vllm_nvfp4.quantize.calibration import Calibration
from vllm_nvfp4.quantize.forward import LayerwiseModel
from vllm_nvfp4.testing.checkpoints import dequantized_state_dict, extract_fixture
from vllm_nvfp4.testing.tiny_models import write_model

SMALL = Calibration(num_samples=4, length=48)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny model and what mr-gptq makes of it."""
    root = tmp_path_factory.mktemp("mr-gptq")
    source, target = write_model(root / "source", "llama"), root / "out"
    command = ["quantize", str(source), "-o", str(target), "--method", "mr-gptq"]
    command += ["--samples", str(SMALL.num_samples), "--sample-length", str(SMALL.length)]
    assert main(command) == 0
    return source, target


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as reader:
            found |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_hadamard_is_orthogonal_and_symmetric(size):
    matrix = hadamard(size).double()
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-6)
    assert torch.equal(matrix, matrix.T)
    if size in (1, 16, 64):
        assert torch.equal(hadamard(size).bfloat16().float(), hadamard(size))


def test_file_is_what_fp_quant_writes(folders, tmp_path):
    """Names, dtypes, shapes and configuration against a checkpoint of the fp_quant package."""
    theirs = extract_fixture("fp_quant/nvfp4-llama", tmp_path)
    configs = [read_config(folder)[1] for folder in (folders[1], theirs)]
    assert configs[0].keys() == configs[1].keys()
    changed = {key for key in configs[0] if configs[0][key] != configs[1][key]}
    assert changed == {"hadamard_group_size", "modules_to_not_convert"}
    assert "lm_head" in configs[0]["modules_to_not_convert"]
    layer = "model.layers.0.mlp.down_proj."
    leaves = [
        {name.removeprefix(layer): t for name, t in stored(folder).items() if layer in name}
        for folder in (folders[1], theirs)
    ]
    assert leaves[0].keys() == leaves[1].keys()
    assert all(leaves[0][n].dtype == leaves[1][n].dtype for n in leaves[0])
    assert all(leaves[0][n].dim() == leaves[1][n].dim() for n in leaves[0])
    validate(folders[1], *read_config(folders[1]))


def test_weights_are_near_the_source_and_read_back_alike(folders):
    source, target = folders
    before, after, files = stored(source), dequantized_state_dict(target), stored(target)
    assert before.keys() == after.keys()
    stored_as = FpQuantFormat(
        json.loads((target / "config.json").read_text())["quantization_config"][
            "hadamard_group_size"
        ]
    )
    for name, weight in before.items():
        if "_proj" not in name:
            assert torch.equal(after[name], weight), name
            continue
        mine = stored_as.dequantize(name.removesuffix(".weight"), files.__getitem__)
        assert torch.equal(after[name], mine), name
        relative = (after[name] - weight).norm() / weight.float().norm()
        assert 0.01 < relative < 0.4, (name, relative)


def test_input_scale_is_that_of_the_rotated_inputs(folders):
    """The first layer's inputs are the source's own: no quantised layer comes before."""
    folder, target = folders
    source = Source(folder)
    samples = SMALL.samples(folder)
    model = LayerwiseModel(folder, source.tensors, lambda n: source.load(n, "cpu"), samples)
    found, _ = model.inputs(model.layer(0, {}), 0, torch.cat(model.hidden), ["self_attn.q_proj"])
    files, layer = stored(target), "model.layers.0.self_attn.q_proj"
    rotation = files[f"{layer}.forward_hadamard_matrix"].float()
    amax = rotate_blocks(found["self_attn.q_proj"], rotation).abs().amax()
    stored_amax = 6 * 448 / files[f"{layer}.act_global_scale"].float()
    assert torch.allclose(stored_amax, amax, rtol=0.02)


def test_rotation_fits_every_layer(folders):
    source = Source(folders[0])
    names = set(source.quantizable(())[0])
    assert rotation_size(source, names) == 64
    shape = source.tensors[min(names)].shape
    source.tensors[min(names)] = type(source.tensors[min(names)])("BF16", (shape[0], 48))
    assert rotation_size(source, names) == 16


@pytest.mark.vllm
def test_served_tokens_are_those_of_the_dequantised_weights(folders):
    compare(folders[1], atol=1e-4)
