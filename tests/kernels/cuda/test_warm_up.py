# SPDX-License-Identifier: Apache-2.0
"""What a load compiles is all that requests need: Triton's compilations are counted after it.

Triton's own binder decides what is another variant; in the compiler's and the driver's place stands
what counts.
"""

from __future__ import annotations

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from vllm_nvfp4.kernels import ops
from vllm_nvfp4.kernels.cuda import linear as cuda
from vllm_nvfp4.kernels.cuda import triton as kernels
from vllm_nvfp4.layers.embedding import look_up
from vllm_nvfp4.layers.weights import attach_fp8_weight, attach_weight, packed_weight
from vllm_nvfp4.testing import kernel_cases
from vllm_nvfp4.testing.emulated_gpu import emulated_gpu

DEVICE = torch.device("cuda", 0)


class Compiled:
    """A kernel that a launch finds; it does nothing."""

    function, packed_metadata = 1, None

    def launch_metadata(self, *args):
        return None

    def run(self, *args):
        pass


class FakeDriver:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 89, 32)


@pytest.fixture
def compiled(monkeypatch):
    """The sources that Triton compiled so far, on an RTX 4090 with BF16 activations."""
    found = []

    def compile_nothing(source, **kwargs):
        found.append(source)
        return Compiled()

    monkeypatch.setattr(triton.compiler, "compile", compile_nothing)
    monkeypatch.setattr(triton.runtime.driver, "_active", FakeDriver())
    for kernel in (kernels._fp8_linear_kernel, kernels._gather_rows_kernel):
        kernel.device_caches.clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with emulated_gpu():
            yield found
    finally:
        torch.set_default_dtype(torch.float32)
        for kernel in (kernels._fp8_linear_kernel, kernels._gather_rows_kernel):
            kernel.device_caches.clear()


def activations(k):
    """Batches of every size and layout that a layer may be given."""
    for m in (1, 2, 15, 16, 17, 32, 33, 64, 65, 128, 129, 300):
        wide = torch.zeros(m, 2 * k + 1, device=DEVICE)
        yield torch.zeros(m, k, device=DEVICE)
        yield wide[:, :k]
        yield wide[:, 1 : k + 1]
        yield torch.zeros(k, m, device=DEVICE).t()
        yield torch.zeros(2 * m, k, device=DEVICE)[::2]


def fp8_layer(n, k, bias=None):
    layer = torch.nn.Module()
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    weight = torch.zeros(n, k, device=DEVICE).to(torch.float8_e4m3fn)
    attach_fp8_weight(layer, weight, torch.ones(n, dtype=torch.float32, device=DEVICE))
    return layer


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("n", "k"), [(512, 256), (520, 264), (1000, 256), (40, 24)])
def test_no_request_compiles_a_product_with_an_fp8_weight(compiled, n, k, has_bias):
    layer = fp8_layer(n, k, torch.zeros(n, device=DEVICE) if has_bias else None)
    ready = len(compiled)
    assert ready == 4 * (1 + has_bias)
    for a in activations(k):
        for bias in {None, getattr(layer, "bias", None)}:
            y = ops.fp8_linear(a, layer.weight, layer.row_scale, bias, 16)
            assert y.shape == (len(a), n)
    assert len(compiled) == ready


def test_the_count_sees_what_a_load_left_out(compiled, monkeypatch):
    monkeypatch.setattr(ops, "warm_up_fp8", lambda *args: None)
    layer = fp8_layer(512, 256)
    for a in activations(256):
        ops.fp8_linear(a, layer.weight, layer.row_scale, None, 16)
    assert len(compiled) == 4


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("k", [256, 288])
def test_no_request_compiles_a_gather(compiled, fmt, k):
    layer = torch.nn.Module()
    attach_weight(layer, kernel_cases.random_weight(48, k, fmt, DEVICE))
    ops.warm_up_gather(packed_weight(layer), torch.bfloat16)
    ready = len(compiled)
    assert ready == 2
    for kind in (torch.int32, torch.int64):
        tokens = torch.zeros(65, dtype=kind, device=DEVICE)
        for ids in (tokens[:1], tokens[1:2], tokens[1:], tokens[:64], tokens[:64].view(8, 8)):
            assert look_up(layer, ids, torch.bfloat16).shape == (*ids.shape, k)
    assert len(compiled) == ready


def test_the_kernels_of_csrc_are_loaded_with_the_weight():
    """A launch of one that is not loaded is an error: here every batch and width is tried."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with emulated_gpu() as gpu:
            packed = cuda.pack_weight(kernel_cases.random_weight(48, 128, "nvfp4", DEVICE))
            for m in (1, 9, 17, 40, 70):
                for bits in (0, 16, 8):
                    cuda.linear(torch.zeros(m, 128, device=DEVICE), packed, None, bits)
            launched = " ".join(symbol for symbol, _ in gpu.launches)
            assert all(stem in launched for stem in ("gemm_w4a16", "gemm_w4a8", "quantize_a8"))
    finally:
        torch.set_default_dtype(torch.float32)
