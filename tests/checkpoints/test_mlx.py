# SPDX-License-Identifier: Apache-2.0
"""MLX's checkpoints: what mlx_lm wrote and turned round, and what is refused."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import FalconH1Config

from vllm_nvfp4.checkpoints import read_config
from vllm_nvfp4.checkpoints.headers import TensorHeader
from vllm_nvfp4.checkpoints.mlx import MlxDialect, Restored, unfold
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.checkpoints.validate import take_census, validate
from vllm_nvfp4.testing.checkpoints import (
    dequantized_state_dict,
    edit_tensors,
    extract_fixture,
)

MODES = ("nvfp4", "mxfp4")
CONFIG = {"bits": 4, "group_size": 16, "mode": "nvfp4"}


@pytest.mark.parametrize("mode", MODES)
def test_values_are_those_that_mlx_dequantises(mode, tmp_path):
    folder = extract_fixture(f"moe_mlx/{mode}-qwen3", tmp_path)
    inventory = validate(folder, *read_config(folder))
    found = {r.name: (r.format, list(r.shape)) for r in inventory.layers}
    mlp = "model.layers.0.mlp"
    assert found[f"{mlp}.experts.down_proj"] == (mode, [4, 64, 64])
    assert found["lm_head"] == found["model.embed_tokens"] == (mode, [288, 64])
    assert found[f"{mlp}.gate"] == ("int", [4, 64])
    assert found["model.norm"][0] == "BF16"
    state = dequantized_state_dict(folder)
    digest = hashlib.sha256()
    for name in sorted(n for n, (form, _) in found.items() if form == mode):
        parent, _, leaf = name.rpartition(".")
        experts = [f"{parent}.{e}.{leaf}.weight" for e in range(4)]
        for key in experts if ".experts" in name else [f"{name}.weight"]:
            digest.update(state[key].numpy().tobytes())
    assert {"all": digest.hexdigest()} == json.loads((folder / "dequantized.json").read_text())


def restored(tensors, **config):
    """(tensors, headers) as they are read. tensors: as MLX has them"""
    names = {torch.uint32: "U32", torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32"}
    headers = {
        n: TensorHeader("f", names[t.dtype], tuple(t.shape), 0, t.nbytes)
        for n, t in tensors.items()
    }
    found = Restored(headers, MlxDialect(CONFIG | config))
    read = dict(found.tensors(tensors.items()))
    for name, tensor in read.items():
        assert tuple(tensor.shape) == found.headers[name].shape
    return read


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_of_any_width(bits):
    values = torch.randint(0, 2**bits, (3, 64), generator=torch.Generator().manual_seed(bits))
    stream = [sum(int(v) << bits * i for i, v in enumerate(row)) for row in values]
    words = [list(s.to_bytes(8 * bits, "little")) for s in stream]
    weight = torch.tensor(words, dtype=torch.uint8).view(torch.uint32)
    beside = {f"a.{n}": torch.ones(3, 1, dtype=torch.bfloat16) for n in ("scales", "biases")}
    read = restored({"a.weight": weight, **beside}, a={"bits": bits, "group_size": 64})
    assert torch.equal(read["a.weight"].long(), values)
    assert {"a.weight_scale", "a.weight_offset"} < set(read)


def test_what_the_tool_changed_is_turned_back():
    conv = torch.arange(12, dtype=torch.float32).view(3, 1, 4)
    norm = torch.tensor([0.1, -0.3, 1.5]).bfloat16()
    base = "model.layers.0"
    stack = torch.zeros(2, 16, 4, dtype=torch.uint32)
    largest = torch.tensor([2688.0, 5376.0])
    patches = torch.arange(32.0).view(2, 2, 2, 2, 2)
    read = restored(
        {
            f"{base}.linear_attn.conv1d.weight": conv.mT.contiguous(),
            f"{base}.input_layernorm.weight": norm + 1,
            f"{base}.linear_attn.norm.weight": norm,
            f"{base}.mixer.switch_mlp.fc1.weight": stack,
            f"{base}.mixer.switch_mlp.fc1.scales": stack.view(torch.uint8)[..., :2].contiguous(),
            f"{base}.mixer.switch_mlp.fc1.global_scale": largest,
            "vision_tower.patch_embed.proj.weight": patches.movedim(1, -1),
            "vision_tower.blocks.0.norm1.weight": norm,
        }
    )
    assert torch.equal(read[f"{base}.linear_attn.conv1d.weight"], conv)
    assert torch.equal(read[f"{base}.input_layernorm.weight"], (norm + 1) - 1)
    assert torch.equal(read[f"{base}.linear_attn.norm.weight"], norm)
    assert read[f"{base}.mixer.experts.up_proj.weight_scale_2"].tolist() == [1, 2]
    assert torch.equal(read["visual.patch_embed.proj.weight"], patches)
    assert torch.equal(read["visual.blocks.0.norm1.weight"], norm)


def test_what_is_multiplied_in_is_not_again():
    config = FalconH1Config(embedding_multiplier=2.0, ssm_multipliers=[2.0] * 5)
    config.lm_head_multiplier, config.tie_word_embeddings = 3.0, True
    unfold(config)
    assert (config.embedding_multiplier, config.lm_head_multiplier) == (1, 1.5)
    assert config.ssm_multipliers == [1] * 5


@pytest.mark.vllm
def test_integers_that_no_layer_asks_for_are_widened(tmp_path):
    from vllm_nvfp4.layers.plain_places import widen_for

    folder = extract_fixture("moe_mlx/nvfp4-qwen3", tmp_path)
    census = take_census(folder, MlxDialect(read_config(folder)[1]))
    stream = census.as_read(load_file(folder / "model.safetensors").items())
    read = dict(widen_for(torch.nn.Module(), census, dict)(stream))
    expected = dequantized_state_dict(folder)[f"{GATE}.weight"]
    assert torch.equal(read[f"{GATE}.weight"], expected)


def without(name):
    return lambda tensors: tensors.pop(name)


def cut(name):
    return lambda tensors: tensors.update({name: tensors[name][..., :3].contiguous()})


Q = "model.layers.0.self_attn.q_proj"
GATE = "model.layers.0.mlp.gate"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (without(f"{Q}.scales"), rf"{Q}\.scales: found no such tensor"),
        (cut(f"{Q}.scales"), r"q_proj\.scales: found U8 \[128, 3\] of a weight U32 \[128, 8\]"),
        (cut(f"{Q}.weight"), "needed one scale for 16 or 32 elements of 4 bits"),
        (without(f"{GATE}.biases"), r"gate\.weight_offset: found no such tensor"),
        (cut(f"{GATE}.weight"), "found 8 bits in groups of 64, .*; needed 96 bits in a group"),
        (without(f"{Q}.weight"), rf"{Q}.weight: found no such tensor; the layer has scales"),
    ],
)
def test_damage_is_named(edit, words, tmp_path):
    folder = edit_tensors(extract_fixture("moe_mlx/nvfp4-qwen3", tmp_path), edit)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=words):
        validate(folder, *read_config(folder))


def test_what_cannot_be_served_is_refused(tmp_path):
    for config, words in (
        ({"bits": 4, "group_size": 64}, "found 4-bit integers alone"),
        (CONFIG | {"mode": "nvfp5"}, "mode: found nvfp5; needed one of nvfp4"),
    ):
        with pytest.raises(CheckpointError, match=words):
            MlxDialect(config)
    folder = extract_fixture("moe_mlx/mxfp4-qwen3", tmp_path)
    config, quant_config = read_config(folder)
    for entry in quant_config.values():
        if isinstance(entry, dict):  # the routers', in integers
            entry["group_size"] = {}
    with pytest.raises(CheckpointError, match=r"found 8 bits in groups of \{\}"):
        validate(folder, config, quant_config)
    with pytest.raises(CheckpointError, match="found experts in one tensor of BF16"):
        restored({"m.switch_mlp.up_proj.weight": torch.zeros(2, 4, 4).bfloat16()})
