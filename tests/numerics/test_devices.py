# SPDX-License-Identifier: Apache-2.0
"""What numerics computes does not depend on how a device divides: the same bits on an emulated
GPU, where torch divides by a number as CUDA does, and on the CPU."""

from __future__ import annotations

import inspect

import pytest
import torch

from vllm_nvfp4.numerics import activation, codes, hadamard, quantize, reference, weight
from vllm_nvfp4.numerics.formats import NVFP4
from vllm_nvfp4.testing.emulated_gpu import emulated_gpu
from vllm_nvfp4.testing.kernel_cases import heavy_tailed

DENSE = heavy_tailed((48, 320), torch.Generator().manual_seed(0))
SCALE = quantize.nvfp4_global_scale(DENSE)
E4M3 = quantize.block_scale_rtn(DENSE.view(48, 20, 16), SCALE)
CODES = codes.encode_e2m1(DENSE)

# Of each function: how it is called with tensors that `put` has moved.
CALLS = {
    "to_e4m3": lambda put: quantize.to_e4m3(put(DENSE) * 100),
    "nvfp4_global_scale": lambda put: quantize.nvfp4_global_scale(put(DENSE)),
    "nvfp4_scale_from_amax": lambda put: quantize.nvfp4_scale_from_amax(put(DENSE.abs())),
    "block_scale_rtn": lambda put: quantize.block_scale_rtn(
        put(DENSE).view(48, 20, 16), put(SCALE)
    ),
    "block_scale_candidates": lambda put: quantize.block_scale_candidates(put(E4M3)),
    "quantize_nvfp4": lambda put: quantize.quantize_nvfp4(put(DENSE), "mse"),
    "quantize_mxfp4": lambda put: quantize.quantize_mxfp4(put(DENSE)),
    "quantize_fp8_per_row": lambda put: quantize.quantize_fp8_per_row(put(DENSE)),
    "quantize_int8_per_group": lambda put: quantize.quantize_int8_per_group(put(DENSE)),
    "quantize_fp8_weight": lambda put: quantize.quantize_fp8_weight(put(DENSE)),
    "quantize_nvfp4_shards": lambda put: quantize.quantize_nvfp4_shards(
        put(DENSE).split([16, 32]), "rtn", put(SCALE.repeat(2))
    ),
    "largest_magnitude": lambda put: quantize.largest_magnitude(put(DENSE)),
    "encode_e2m1": lambda put: codes.encode_e2m1(put(DENSE)),
    "round_e2m1": lambda put: codes.round_e2m1(put(DENSE)),
    "round_e2m1_": lambda put: codes.round_e2m1_(put(DENSE.clone()), put(DENSE.clone())),
    "decode_e2m1": lambda put: codes.decode_e2m1(put(CODES)),
    "pack_codes": lambda put: codes.pack_codes(put(CODES)),
    "unpack_codes": lambda put: codes.unpack_codes(put(CODES)),
    "rotate_blocks": lambda put: hadamard.rotate_blocks(put(DENSE), put(hadamard.hadamard(32))),
    "hadamard": lambda put: hadamard.hadamard(32),
    "decode_block_scale": lambda put: weight.decode_block_scale(put(E4M3), NVFP4),
    "reference_linear": lambda put: reference.reference_linear(
        put(DENSE[:3]), quantize.quantize_nvfp4(put(DENSE)), None, 8
    ),
    "rounded_activations": lambda put: reference.rounded_activations(put(DENSE), "int8"),
    "int8_error_bound": lambda put: reference.int8_error_bound(
        put(DENSE[:3]), quantize.quantize_nvfp4(put(DENSE))
    ),
    "raise_block_scales": lambda put: weight.raise_block_scales(
        quantize.quantize_nvfp4(put(DENSE))
    ),
    "folded_weight": lambda put: reference.folded_weight(quantize.quantize_nvfp4(put(DENSE))),
}


def tensors_of(found):
    if isinstance(found, torch.Tensor):
        return [found.cpu().reshape(-1).view(torch.uint8)]
    fields = found if isinstance(found, tuple) else vars(found).values()
    return [t for field in fields if isinstance(field, torch.Tensor) for t in tensors_of(field)]


def test_every_function_is_here():
    modules = (activation, codes, hadamard, quantize, reference, weight)
    functions = {
        name
        for module in modules
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    }
    assert functions - {"row_chunks"} == set(CALLS)  # which makes no tensor


@pytest.mark.parametrize("name", CALLS)
def test_a_gpu_gives_the_cpus_bits(name):
    expected = tensors_of(CALLS[name](lambda t: t))
    with emulated_gpu():
        found = tensors_of(CALLS[name](lambda t: t.cuda()))
    assert len(found) == len(expected) > 0
    for here, there in zip(found, expected, strict=True):
        assert torch.equal(here, there)
