# SPDX-License-Identifier: Apache-2.0
"""Latent attention decodes with parts of kv_b_proj, W_UK and W_UV, that vLLM takes from the layer
once it is loaded: they are those of the stored weight, and decoding depends on them.

A token of the prompt is multiplied by kv_b_proj itself, so that only decoding can tell; not so with
vLLM's kernel for CPUs with AMX, which packs both parts, and reads them for the prompt too.
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


def held_by(layer):
    """(what holds it, its name there) of W_UK and of W_UV."""
    if hasattr(layer, "W_UK_T"):
        return (layer, "W_UK_T"), (layer, "W_UV")
    return (layer.impl, "_w_uk_packed"), (layer.impl, "_w_uv_packed")


def as_held(layer, w_uk, w_uv):
    """w_uk: [heads, nope, rank]; w_uv: [heads, v, rank]"""
    if hasattr(layer, "W_UK_T"):
        return w_uk, w_uv.mT
    pack = torch.ops._C.convert_weight_packed
    return pack(w_uk.mT.contiguous()), pack(w_uv.contiguous())


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
            halves = heads.split((layer.qk_nope_head_dim, layer.v_head_dim), dim=1)
            for (holder, part), expected_part in zip(
                held_by(layer), as_held(layer, *halves), strict=True
            ):
                held = getattr(holder, part).data
                torch.testing.assert_close(held, expected_part, rtol=2**-7, atol=1e-6)
        found = ask_forced(llm)
        assert difference(found.prefill, expected.prefill) < CLOSE
        assert difference(found.decode, expected.decode) < CLOSE
        for both in zip(*map(held_by, layers), strict=True):
            right = [getattr(holder, part) for holder, part in both]
            for (holder, part), other in zip(both, reversed(right), strict=True):
                setattr(holder, part, other)
            wrong = ask_forced(llm)
            if hasattr(layers[0], "W_UK_T"):
                assert torch.equal(wrong.prefill, found.prefill)
            assert difference(wrong.decode, expected.decode) > WRONG, both
            for (holder, part), own in zip(both, right, strict=True):
                setattr(holder, part, own)
        again = ask_forced(llm)
        assert torch.equal(again.decode, found.decode)
