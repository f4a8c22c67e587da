# SPDX-License-Identifier: Apache-2.0
"""The activation quantiser on the emulated GPU: the same bits as the executable spec."""

from __future__ import annotations

import pytest
import torch

from vllm_nvfp4.kernels.cuda.configs import QUANTIZE_CONFIGS, QuantizeConfig
from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row
from vllm_nvfp4.testing.host_gemm import DTYPES, build_host, run_quantize, shipped
from vllm_nvfp4.testing.host_kernel import HostKernelError


def assert_matches_spec(config: QuantizeConfig, a: torch.Tensor) -> None:
    q, a_scale = run_quantize(shipped(config), config, a)
    expected_q, expected_scale = quantize_fp8_per_row(a)
    assert torch.equal(a_scale, expected_scale[:, 0])
    assert torch.equal(q.view(torch.uint8), expected_q.view(torch.uint8))


CONFIGS = [c for c in QUANTIZE_CONFIGS if c.stem == "quantize_a8"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.symbol)
@pytest.mark.parametrize(("m", "k"), [(1, 16), (3, 48), (5, 2064), (2, 4096)])
def test_same_bits_as_the_spec(config: QuantizeConfig, m: int, k: int) -> None:
    torch.manual_seed(m * k)
    a = torch.distributions.StudentT(3.0).sample((m, k)) * 3
    assert_matches_spec(config, a.to(DTYPES[config.dtype]))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.symbol)
def test_zero_rows_tiny_rows_and_signed_zeros(config: QuantizeConfig) -> None:
    dtype = DTYPES[config.dtype]
    a = torch.zeros(4, 64, dtype=dtype)
    a[1] = -0.0
    a[2, 7] = torch.finfo(dtype).tiny
    a[3] = torch.linspace(-1, 1, 64)
    assert_matches_spec(config, a)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.symbol)
def test_every_16_bit_number(config: QuantizeConfig) -> None:
    """All finite values, in rows of like magnitude so that the codes spread."""
    bits = torch.arange(0x10000, dtype=torch.int32).to(torch.int16)
    values = bits.view(DTYPES[config.dtype])
    values = values[values.isfinite()]
    values = values[values.abs().float().argsort()]
    assert_matches_spec(config, values[: values.numel() // 2048 * 2048].view(-1, 2048))


def test_a_missing_barrier_is_noticed() -> None:
    config = CONFIGS[0]
    module = build_host([config], edits=[("  __syncthreads();\n", "")])
    with pytest.raises(HostKernelError, match=config.symbol):
        run_quantize(module, config, torch.ones(1, 4096, dtype=torch.bfloat16))
