# SPDX-License-Identifier: Apache-2.0
"""gpt-oss's own format: stacked MXFP4 experts with biases, gate and up rows in turns.

The reference is transformers' reader of the same file, which shares no code with this package.
"""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from serving_cases import (
    NUM_TOKENS,
    PROMPT,
    TWO_RANKS,
    compare_to,
    gpt_oss_answer,
    quantise_like_online,
    rounded,
)

from vllm_nvfp4.checkpoints import read_config
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.numerics.quantize import quantize_nvfp4
from vllm_nvfp4.testing.checkpoints import edit_json, edit_tensors, to_gpt_oss_mxfp4
from vllm_nvfp4.testing.engine import ask_reference, plain_model
from vllm_nvfp4.testing.model_sweep import write_twin
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


def stacked_nvfp4(name, experts, bias, out):
    """ModelOpt's layout of a stack: K before N, the scales beside it."""
    out[name] = torch.stack([e.codes.T for e in experts])
    scales = [e.block_scale.view(torch.uint8).T for e in experts]
    out[f"{name}_weight_scale"] = torch.stack(scales).view(torch.float8_e4m3fn)
    out[f"{name}_weight_scale_2"] = torch.stack([e.global_scale[0] for e in experts])
    out[f"{name}_bias"] = bias


@pytest.mark.vllm
@pytest.mark.parametrize("options", [{}, pytest.param(TWO_RANKS, marks=pytest.mark.trust)])
def test_experts_in_nvfp4_with_biases(options, tmp_path, monkeypatch):
    """On two ranks each expert is cut, and one of them adds the bias of the down projection."""
    plain = write_model(tmp_path / "plain", "gpt_oss")
    folder = write_model(tmp_path / "nvfp4", "gpt_oss")
    matrices = []

    def edit(tensors):
        for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
            weights = tensors.pop(name)  # [E, K, N]
            experts = [quantize_nvfp4(w.T.float().contiguous(), "rtn") for w in weights]
            matrices.extend(e.dequantize() for e in experts)
            stacked_nvfp4(name, experts, tensors.pop(f"{name}_bias"), tensors)

    edit_tensors(folder, edit)
    config = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "ignore": ["*self_attn*"]}
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=config))
    assert write_twin(plain, matrices, tmp_path / "twin") == 0
    expected = ask_reference(plain_model(tmp_path / "twin", torch.float32), PROMPT, NUM_TOKENS)
    if options:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    compare_to(expected, folder, atol=1e-4, **options)


@pytest.mark.vllm
def test_quantised_while_loading(tmp_path, monkeypatch):
    """The 16-bit model, whose stacks have K before N, on two ranks that share each expert."""
    folder = write_model(tmp_path, "gpt_oss")
    model = quantise_like_online(plain_model(folder, torch.float32), "nvfp4")
    with torch.no_grad():
        for layer in model.model.layers:
            for stack, turns in (
                (layer.mlp.experts.gate_up_proj, 2),
                (layer.mlp.experts.down_proj, 1),
            ):
                for expert in stack:
                    for i in range(turns):  # gate and up have each a scale of their own
                        rows = expert[:, i::turns]
                        rows.copy_(rounded(rows.T.contiguous(), "nvfp4").T)
    expected = ask_reference(model, PROMPT, NUM_TOKENS)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    compare_to(expected, folder, atol=1e-4, **TWO_RANKS)


def test_one_seed_is_one_model(tmp_path):
    """All of it, what transformers itself draws included: two copies are compared above."""
    one, other = (
        load_file(write_model(tmp_path / n, "gpt_oss") / "model.safetensors") for n in "ab"
    )
    assert {n for n in one if not torch.equal(one[n], other[n])} == set()


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
