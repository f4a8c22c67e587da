# SPDX-License-Identifier: Apache-2.0
"""Latent attention decodes with parts of kv_b_proj, W_UK and W_UV, that vLLM takes from the layer
once it is loaded: they are those of the stored weight, and decoding depends on them.

A token of the prompt is multiplied by kv_b_proj itself, so that only decoding can tell.
"""

import pytest
import torch
from serving_cases import layer_of
from stored_forms import store, stored_as

from vllm_nvfp4.testing.architectures import ARCHITECTURES, write_architecture
from vllm_nvfp4.testing.checkpoints import edit_tensors
from vllm_nvfp4.testing.engine import engine
from vllm_nvfp4.testing.model_sweep import FORCED_ENGINE, ask_forced, serve

pytestmark = pytest.mark.vllm

NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
# In BF16 the prompt's products round differently here and there; a wrong part is off by more.
CLOSE, WRONG = 0.06, 0.3


def difference(one, other):
    return float((one - other).abs().max())


@pytest.mark.parametrize(
    ("name", "form"),
    [("deepseek-v3", "nvfp4"), ("glm4-moe-lite", "ct"), ("glm4-moe-lite", "fp8row"),
     ("glm4-moe-lite", "fp8block")],
)  # fmt: skip
def test_decoding_reads_the_stored_weight(name, form, tmp_path):
    stored = write_architecture(tmp_path / "stored", ARCHITECTURES[name])
    values = {}

    def round_alone(tensors):
        for tensor in tensors:
            if tensor.endswith("kv_b_proj.weight"):
                values[tensor] = stored_as(form, tensors[tensor])[1].bfloat16()
                tensors[tensor] = values[tensor]

    store(stored, lambda layer: form if layer.endswith("kv_b_proj") else "bf16", NVFP4)
    twin = edit_tensors(write_architecture(tmp_path / "twin", ARCHITECTURES[name]), round_alone)
    expected, _ = serve(twin, "bfloat16", quantization=None)
    with engine(stored, dtype="bfloat16", **FORCED_ENGINE) as llm:
        layers = [layer_of(llm, f"model.layers.{i}.self_attn.mla_attn.mla_attn") for i in range(2)]
        for layer, name in zip(layers, sorted(values), strict=True):
            heads = values[name].unflatten(0, (layer.num_heads, -1))
            nope = layer.qk_nope_head_dim
            torch.testing.assert_close(layer.W_UK_T.data, heads[:, :nope], rtol=2**-7, atol=1e-6)
            torch.testing.assert_close(layer.W_UV.data, heads[:, nope:].mT, rtol=2**-7, atol=1e-6)
        found = ask_forced(llm)
        assert difference(found.prefill, expected.prefill) < CLOSE
        assert difference(found.decode, expected.decode) < CLOSE
        for part in ("W_UK_T", "W_UV"):
            right = [getattr(layer, part) for layer in layers]
            for layer, other in zip(layers, reversed(right), strict=True):
                setattr(layer, part, other)
            wrong = ask_forced(llm)
            assert torch.equal(wrong.prefill, found.prefill)
            assert difference(wrong.decode, expected.decode) > WRONG, part
            for layer, own in zip(layers, right, strict=True):
                setattr(layer, part, own)
        again = ask_forced(llm)
        assert torch.equal(again.decode, found.decode)
