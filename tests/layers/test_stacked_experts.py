# SPDX-License-Identifier: Apache-2.0
"""Quantised experts that are stacked in one tensor, through real engines, against stock vLLM."""

import pytest
import torch

from vllm_nvfp4.checkpoints import read_config
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.numerics.quantize import quantize_nvfp4
from vllm_nvfp4.testing.architectures import ARCHITECTURES, write_architecture
from vllm_nvfp4.testing.checkpoints import edit_json, edit_tensors
from vllm_nvfp4.testing.model_sweep import TOLERANCE, serve, write_twin

pytestmark = pytest.mark.vllm

MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
_GROUP = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
COMPRESSED_TENSORS = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": _GROUP}},
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
}


def modelopt_turned(name, stack, out):
    """[E, K, N] in 16 bits -> codes [E, K/2, N] and scales beside it, as of Llama-4."""
    experts = [quantize_nvfp4(e.T.float().contiguous(), "rtn") for e in stack]
    out[name] = torch.stack([e.codes.T for e in experts])
    scales = [e.block_scale.view(torch.uint8).T for e in experts]
    out[f"{name}_weight_scale"] = torch.stack(scales).view(torch.float8_e4m3fn)
    out[f"{name}_weight_scale_2"] = torch.stack([e.global_scale[0] for e in experts])
    out[f"{name}_input_scale"] = torch.full((len(experts),), 0.01)
    return [e.dequantize() for e in experts]


def modelopt_linear(name, stack, out):
    """Granite's input_linear.weight [E, N, K], with scales under the same module."""
    module = name.removesuffix(".weight")
    experts = [quantize_nvfp4(e.float(), "rtn") for e in stack]
    out[f"{module}.weight"] = torch.stack([e.codes for e in experts])
    scales = [e.block_scale.view(torch.uint8) for e in experts]
    out[f"{module}.weight_scale"] = torch.stack(scales).view(torch.float8_e4m3fn)
    out[f"{module}.weight_scale_2"] = torch.stack([e.global_scale[0] for e in experts])
    return [e.dequantize() for e in experts]


def packed_rows(name, stack, out):
    """compressed-tensors, all experts' rows in one matrix with one divisor."""
    whole = quantize_nvfp4(stack.flatten(0, 1).float(), "rtn")
    out[f"{name}.weight_packed"], out[f"{name}.weight_scale"] = whole.codes, whole.block_scale
    divisor = (1 / whole.global_scale[0].double()).float()
    out[f"{name}.weight_global_scale"] = divisor.reshape(1)
    return [whole.dequantize()]


def left_in_16_bits(name, stack, out):
    """The layer's o_proj in NVFP4 alone, as AMD Quark leaves transformers' stacks."""
    out[name] = stack
    layer = name.replace("mlp.experts.down_proj", "self_attn.o_proj")
    if layer == name:
        return []
    one = quantize_nvfp4(out[f"{layer}.weight"].float(), "rtn")
    out[f"{layer}.weight"], out[f"{layer}.weight_scale"] = one.codes, one.block_scale
    out[f"{layer}.weight_scale_2"] = one.global_scale[0]
    return [one.dequantize()]


CASES = {
    "llama4": (MODELOPT, modelopt_turned),
    "granite-moe": (MODELOPT, modelopt_linear),
    "qwen3-moe": (COMPRESSED_TENSORS, packed_rows),
    "olmoe": (MODELOPT, left_in_16_bits),
    "mixtral": (MODELOPT, left_in_16_bits),
    "qwen3-vl-moe": (MODELOPT, left_in_16_bits),  # turned against the hub's
}


@pytest.mark.parametrize("family", CASES)
def test_a_stack_is_served(family, tmp_path):
    config, store = CASES[family]
    plain = write_architecture(tmp_path / "plain", ARCHITECTURES[family])
    is_own = store in (packed_rows, left_in_16_bits)
    folder = write_architecture(tmp_path / "stacked", ARCHITECTURES[family], is_own=is_own)
    matrices = []

    def edit(tensors):
        stacks = [n for n, t in tensors.items() if t.dim() == 3 and "conv" not in n]
        assert stacks
        for name in stacks:
            matrices.extend(store(name, tensors.pop(name), tensors))

    edit_tensors(folder, edit)
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=config))
    validate(folder, *read_config(folder))
    answer, held = serve(folder, "float32")
    assert sum(m.numel() for m in held) == sum(m.numel() for m in matrices)
    assert write_twin(plain, matrices, tmp_path / "twin") == 0
    expected, _ = serve(tmp_path / "twin", "float32", quantization=None)
    assert answer.deviation(expected) < TOLERANCE["float32"]
