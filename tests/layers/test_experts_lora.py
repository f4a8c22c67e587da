# SPDX-License-Identifier: Apache-2.0
"""LoRA on a mixture of experts: adapters on the experts and beside them, and vLLM's own products.

The reference is transformers with the adapter added to the dequantised weights.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from serving_cases import KEEP_KV, NUM_TOKENS, PROMPT

from vllm_nvfp4.testing.checkpoints import edit_tensors, extract_fixture, write_dequantized
from vllm_nvfp4.testing.engine import ask_engine, ask_reference, engine, plain_model

RANK = 4
LEAVES = {
    "experts": ("gate_proj", "up_proj", "down_proj"),
    "attention": ("q_proj", "o_proj"),
}


def is_adapted(name: str, where: str) -> bool:
    return name.endswith(".weight") and name.split(".")[-2] in LEAVES[where]


def write_adapter(plain, folder, where: str):
    """Write a random adapter for the experts or the attention of a 16-bit checkpoint, and add it to
    the checkpoint's weights."""
    from safetensors import safe_open

    generator = torch.Generator().manual_seed(0)
    tensors, deltas = {}, {}
    with safe_open(plain / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if is_adapted(name, where):
                rows, cols = file.get_slice(name).get_shape()
                a = torch.randn(RANK, cols, generator=generator)
                b = torch.randn(rows, RANK, generator=generator) * 0.05
                prefix = "base_model.model." + name.removesuffix(".weight")
                tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
                deltas[name] = b @ a
    folder.mkdir()
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK,
                    "target_modules": list(LEAVES[where])})
    )  # fmt: skip

    def add(weights):
        for name, delta in deltas.items():
            weights[name] = weights[name].float() + delta

    edit_tensors(plain, add)


@pytest.mark.vllm
def test_adapters_give_the_tokens_of_weights_with_them_added(tmp_path):
    """Of one engine: without an adapter, with one on the experts, and with one beside them."""
    from vllm.lora.request import LoRARequest

    folder = extract_fixture("moe_modelopt/nvfp4-qwen3", tmp_path)
    expected, requests = [], [None]
    for number, where in enumerate((None, *LEAVES)):
        plain = write_dequantized(folder, tmp_path / f"plain-{where}")
        if where:
            write_adapter(plain, tmp_path / where, where)
            requests.append(LoRARequest(where, number, str(tmp_path / where)))
        expected.append(ask_reference(plain_model(plain, torch.float32), PROMPT, NUM_TOKENS))
    assert expected[0].tokens != expected[1].tokens != expected[2].tokens
    options = {"dtype": "float32", "additional_config": KEEP_KV, "enable_lora": True}
    with engine(folder, max_lora_rank=8, max_loras=2, **options) as llm:
        answers = [ask_engine(llm, PROMPT, NUM_TOKENS, r) for r in requests]
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.tokens == wanted.tokens
        assert (answer.logprobs - wanted.logprobs).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("num_data_parallel", "fully_sharded", "wanted"),
    [(2, False, "--data-parallel-size 2"), (1, True, "--fully-sharded-loras"), (1, False, None)],
)
def test_adapters_that_the_cpu_cannot_place_are_refused(num_data_parallel, fully_sharded, wanted):
    from dataclasses import fields

    from vllm.model_executor.layers.fused_moe.experts.lora_context import MoELoRAContext

    from vllm_nvfp4.layers.experts_lora import check

    unset = dict.fromkeys(f.name for f in fields(MoELoRAContext))
    context = MoELoRAContext(**{**unset, "fully_sharded": fully_sharded})
    check(context, torch.device("cuda"), num_data_parallel)
    if wanted is None:
        check(context, torch.device("cpu"), num_data_parallel)
        return
    with pytest.raises(ValueError, match=wanted):
        check(context, torch.device("cpu"), num_data_parallel)
