# SPDX-License-Identifier: Apache-2.0
"""What a load needs beside the weight it is given and the one it makes: one piece of its rows."""

from __future__ import annotations

import gc

import pytest
import torch

from vllm_nvfp4.kernels.cpu import layout as cpu_layout
from vllm_nvfp4.kernels.layout import PackedWeight, pack_weight
from vllm_nvfp4.layers.weights import quantize_online
from vllm_nvfp4.numerics import quantize
from vllm_nvfp4.numerics.formats import MXFP4, NVFP4
from vllm_nvfp4.numerics.weight import BlockScaledWeight
from vllm_nvfp4.testing.emulated_gpu import emulated_gpu

# Bytes for each element of a piece, at the most; docs/quality.md says what that makes.
BYTES_PER_ELEMENT = 24
ROWS, COLS = 1024, 512
SHARDS = [512, 256, 256]


def size_of(found):
    if isinstance(found, torch.Tensor):
        return found.numel() * found.element_size()
    fields = found if isinstance(found, tuple) else vars(found).values()
    return sum(size_of(field) for field in fields if isinstance(field, torch.Tensor))


def online(weight, shards, fmt, method):
    """As a layer does it on one rank."""
    amax = torch.stack([quantize.largest_magnitude(shard) for shard in weight.split(shards)])
    return quantize_online(weight, shards, fmt, method, amax)


STEPS = {
    "nvfp4": lambda w: online(w, SHARDS, NVFP4, "rtn"),
    "nvfp4, swept": lambda w: online(w, SHARDS, NVFP4, "mse"),
    "mxfp4": lambda w: online(w, SHARDS, MXFP4, "rtn"),
    "fp8": quantize.quantize_fp8_weight,
}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(quantize, "CHUNK_ELEMENTS", 1 << 14)
    with emulated_gpu() as found:
        yield found


def peak_beyond(gpu, step, given):
    """(what a step makes, bytes that it had beside what it was given and made)"""
    gc.collect()
    gpu.reset_peak()
    before = gpu.live_bytes
    made = step(given)
    return made, gpu.peak_bytes - before - size_of(made)


@pytest.mark.parametrize("name", STEPS)
def test_quantising_takes_one_piece_beyond_input_and_output(gpu, name):
    weight = torch.randn(ROWS, COLS, device="cuda", dtype=torch.bfloat16)
    made, beyond = peak_beyond(gpu, STEPS[name], weight)
    print(name, beyond / (1 << 14), "bytes for each element of a piece")
    assert beyond <= BYTES_PER_ELEMENT << 14
    assert beyond < ROWS * COLS  # a byte for each element of the layer would already be more
    assert size_of(made) > ROWS * COLS / 2


@pytest.mark.parametrize("pack", [pack_weight, cpu_layout.pack_weight], ids=["cuda", "cpu"])
@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda fmt: fmt.name)
def test_packing_takes_one_piece_beyond_input_and_output(gpu, fmt, pack):
    weight = torch.randn(ROWS, COLS, device="cuda", dtype=torch.bfloat16)
    made = online(weight, SHARDS, fmt, "rtn")
    packed, beyond = peak_beyond(gpu, pack, made)
    assert isinstance(packed, PackedWeight)
    # The check of the scales looks at them all: three bytes for each block.
    assert beyond <= (BYTES_PER_ELEMENT << 14) + 3 * ROWS * COLS // fmt.block_size


@pytest.mark.parametrize("chunk", [1, 1 << 10, 1 << 30])
def test_the_pieces_make_no_difference(monkeypatch, chunk):
    weight = torch.randn(76, 160).bfloat16()
    whole = {name: step(weight.repeat(1, 1)) for name, step in _on(76).items()}
    packs = (pack_weight, cpu_layout.pack_weight)
    packed = [pack(whole["nvfp4, swept"]) for pack in packs]
    monkeypatch.setattr(quantize, "CHUNK_ELEMENTS", chunk)
    for name, step in _on(76).items():
        assert_same(step(weight), whole[name])
    for pack, expected in zip(packs, packed, strict=True):
        assert_same(pack(whole["nvfp4, swept"]), expected)


def _on(rows):
    shards = [rows // 2, rows // 2]
    return {
        "nvfp4, swept": lambda w: online(w, shards, NVFP4, "mse"),
        "mxfp4": lambda w: online(w, shards, MXFP4, "rtn"),
        "fp8": quantize.quantize_fp8_weight,
    }


def assert_same(found, expected):
    pairs = [found, expected]
    if isinstance(found, BlockScaledWeight | PackedWeight):
        pairs = [[t for t in vars(w).values() if isinstance(t, torch.Tensor)] for w in pairs]
    for here, there in zip(*pairs, strict=True):
        assert torch.equal(here.view(torch.uint8), there.view(torch.uint8))
