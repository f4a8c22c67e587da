# SPDX-License-Identifier: Apache-2.0
"""The emulated GPU behaves as a GPU where a program can be wrong about one."""

from __future__ import annotations

import gc

import pytest
import torch

from vllm_nvfp4.kernels.cuda import linear as cuda
from vllm_nvfp4.kernels.cuda.configs import GEMM_CONFIGS
from vllm_nvfp4.testing import first_checks, host_driver, kernel_cases
from vllm_nvfp4.testing.emulated_gpu import emulated_gpu
from vllm_nvfp4.testing.kernel_cases import KernelCase, check_case

W4A16 = next(c for c in GEMM_CONFIGS if c.stem == "gemm_w4a16" and c.dtype == "bf16")
W4A8 = next(c for c in GEMM_CONFIGS if c.stem == "gemm_w4a8" and c.dtype == "bf16")
INT8 = next(c for c in GEMM_CONFIGS if c.stem == "gemm_w4i8" and c.dtype == "bf16")
PARTIALS = next(c for c in GEMM_CONFIGS if c.variant == "f16_partials" and c.dtype == "bf16")


@pytest.fixture
def gpu():
    with emulated_gpu() as found:
        yield found


DEVICE = torch.device("cuda", 0)


def test_tensors_say_where_they_are(gpu):
    here, there = torch.zeros(3, device="cuda"), torch.ones(3)
    assert here.is_cuda
    assert here.device == DEVICE
    assert not there.is_cuda
    moved = there.to(here.device)
    assert moved.is_cuda
    assert moved.cpu().device.type == "cpu"
    assert torch.empty_like(moved, device="cpu").is_cpu
    assert (moved * 2).view(3, 1).is_cuda
    parameter = torch.nn.Parameter(there, requires_grad=False)
    parameter.data = parameter.data.to(DEVICE)
    assert parameter.is_cuda
    with pytest.raises(RuntimeError, match="same device"):
        moved + there
    assert torch.equal(there.to(here), there.cuda())


def test_a_number_divides_as_on_cuda(gpu):
    x = torch.rand(4096)
    on_gpu = x.cuda() / 448.0
    assert (on_gpu.cpu() != x / 448.0).float().mean() > 0.1
    assert torch.equal(on_gpu.cpu(), x * (1 / torch.tensor(448.0)))
    by = torch.full((), 448.0, device="cuda")
    assert torch.equal((x.cuda() / by).cpu(), x / 448.0)


def test_bytes_are_counted(gpu):
    a = torch.zeros(1000, device="cuda")
    assert gpu.live_bytes == 4000
    b = (a + 1) * 2
    assert (gpu.live_bytes, gpu.peak_bytes) == (8000, 12000)
    del a, b
    gc.collect()
    assert gpu.live_bytes == 0


@pytest.mark.parametrize("config", [W4A16, W4A8, PARTIALS, INT8], ids=lambda c: c.symbol)
def test_a_kernel_is_loaded_by_what_runs_it(gpu, config):
    outcome = check_case(KernelCase(config, 3, 40, 96), DEVICE)
    assert outcome.is_match, outcome.report
    assert (config.symbol, (1, 1, 1)) in gpu.launches


def test_a_kernel_that_nothing_loaded_cannot_be_launched(gpu, monkeypatch):
    loaded = cuda.prepare(DEVICE, "nvfp4", (torch.bfloat16,))
    monkeypatch.setattr(kernel_cases, "prepared", lambda *args: loaded)
    with pytest.raises(RuntimeError, match="f16_partials is not loaded"):
        check_case(KernelCase(PARTIALS, 3, 40, 96), DEVICE)


def test_a_semaphore_left_at_1_is_a_mismatch(gpu, monkeypatch):
    run = host_driver.HostLibcuda._run

    def leave_one(self, symbol, grid, raw):
        run(self, symbol, grid, raw)
        next(m for m in self._memory.values())[400] = 1

    monkeypatch.setattr(host_driver.HostLibcuda, "_run", leave_one)
    outcome = check_case(KernelCase(W4A16, 3, 40, 96), DEVICE)
    assert "1 bytes of the semaphores are not zero" in outcome.report
    assert not outcome.is_match


def test_subnormals_that_become_zero_are_a_mismatch(gpu, monkeypatch):
    """Weights of 0.5, whose FP8 code is a subnormal, taken for zeros."""
    assert first_checks.check_subnormals(W4A8, DEVICE).is_match
    real = first_checks.subnormal_operands

    def flushed(config, device):
        a, weight = real(config, device)
        low, high = weight.codes & 0xF, weight.codes >> 4
        low, high = (torch.where(c % 8 == 1, 0, c) for c in (low, high))
        weight.codes.copy_(low | high << 4)
        return a, weight

    kept = cuda.pack_weight
    _, weight = flushed(W4A8, DEVICE)
    monkeypatch.setattr(cuda, "pack_weight", lambda _: kept(weight))
    outcome = first_checks.check_subnormals(W4A8, DEVICE)
    assert outcome.num_wrong == 2 * (8 + 7)  # weights picked out, and multiples of 2^-9


def test_a_reference_that_is_off_by_an_ulp_is_a_mismatch(gpu, monkeypatch):
    assert first_checks.check_quantizer(torch.bfloat16, DEVICE).is_match
    exact = first_checks.quantize_fp8_per_row

    def off(x):
        q, scale = exact(x)
        return q, torch.nextafter(scale, torch.full_like(scale, torch.inf))

    monkeypatch.setattr(first_checks, "quantize_fp8_per_row", off)
    assert not first_checks.check_quantizer(torch.bfloat16, DEVICE).is_match


def test_a_graph_runs_what_it_captured_on_new_input(gpu):
    weight = kernel_cases.random_weight(64, 128, "nvfp4", DEVICE)
    packed = cuda.pack_weight(weight)
    a = torch.randn(3, 128, device="cuda").bfloat16()
    expected = cuda.linear(a, packed, None, 16).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda.linear(a * 2, packed, None, 16)
    graph.replay()
    assert torch.equal(y, expected * 2)
    a.mul_(2)
    graph.replay()
    assert torch.equal(y, expected * 4)
