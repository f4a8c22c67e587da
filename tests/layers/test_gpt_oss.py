# SPDX-License-Identifier: Apache-2.0
"""gpt-oss's own format: stacked MXFP4 experts with biases, gate and up rows in turns.

The reference is transformers' reader of the same file, which shares no code with this package.
"""

import pytest
import torch
from safetensors import safe_open
from serving_cases import TWO_RANKS, compare_to, gpt_oss_answer

from vllm_nvfp4.checkpoints import read_config
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.testing.checkpoints import edit_tensors, to_gpt_oss_mxfp4
from vllm_nvfp4.testing.tiny_models import write_model

LAYER = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return to_gpt_oss_mxfp4(write_model(tmp_path_factory.mktemp("gpt-oss"), "gpt_oss"))


@pytest.fixture
def checkpoint(original, tmp_path):
    """A copy to damage."""
    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.vllm
@pytest.mark.parametrize("options", [{}, TWO_RANKS | {"enable_expert_parallel": True}])
def test_the_tokens_of_transformers(original, options, monkeypatch):
    """Each expert cut over two ranks: tests/trust/test_scale_out.py."""
    if options:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    compare_to(gpt_oss_answer(original), original, atol=1e-4, **options)


def test_the_inventory_counts_every_weight(original):
    inventory = validate(original, *read_config(original))
    assert inventory.dialect == "mxfp4"
    experts = [r for r in inventory.layers if r.format == "mxfp4"]
    assert [r.name for r in experts] == ["model.layers.0.mlp.experts", LAYER]
    assert experts[0].num_weights == 4 * (256 * 64 + 64 * 128)
    with safe_open(original / "model.safetensors", "pt") as file:
        num_bytes = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert inventory.num_bytes == num_bytes
    attention = [r for r in inventory.layers if "self_attn.q_proj" in r.name]
    assert {r.format for r in attention} == {"BF16"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.pop(f"{LAYER}.down_proj_scales"),
            rf"{LAYER}.down_proj_scales: found no such tensor.*needed U8 \[4, 64, 4\]",
        ),
        (
            lambda t: t.update({f"{LAYER}.gate_up_proj_blocks": torch.zeros(4, 256, 3, 16).byte()}),
            rf"{LAYER}.gate_up_proj_blocks: found U8 \[4, 256, 3, 16\]; needed U8 \[4, 256, 2, 16",
        ),
        (
            lambda t: t.update({f"{LAYER}.down_proj_bias": torch.zeros(3, 64)}),
            rf"{LAYER}.down_proj_bias: found F32 \[3, 64\]; needed BF16 \[4, 64\]",
        ),
    ],
)
def test_damage_names_the_tensor(checkpoint, edit, message):
    edit_tensors(checkpoint, edit)
    with pytest.raises(CheckpointError, match=message):
        validate(checkpoint, *read_config(checkpoint))
