# SPDX-License-Identifier: Apache-2.0
"""The table of cards against a second source, and the sources that every figure names."""

from __future__ import annotations

import re

import pytest

from vllm_nvfp4.gpus import GPUS, PRICES, estimate_gpu, find_gpu
from vllm_nvfp4.kernels.cuda import cost, devices, dispatch
from vllm_nvfp4.kernels.cuda.moe_dispatch import MoeShape, choose_moe


@pytest.mark.parametrize(
    ("name", "fp32_tflops", "watts"),
    [
        ("RTX 3090", 35.58, 350),
        ("RTX 4070", 29.15, 200),
        ("RTX 4070 SUPER", 35.48, 220),
        ("RTX 4070 Ti SUPER", 44.1, 285),
        ("RTX 4080", 48.7, 320),
        ("RTX 4080 SUPER", 52.2, 320),
        ("L40S", 91.61, 350),
        ("RTX 6000 Ada Generation", 91.1, 300),
    ],
)
def test_processors_clock_and_power_are_those_of_another_table(name, fp32_tflops, watts):
    """The pages of huggingface.co/hardware. 128 FMA each clock and SM, two FLOP each."""
    gpu = find_gpu(name)
    assert gpu.num_sms * gpu.boost_ghz * 256 / 1e3 == pytest.approx(fp32_tflops, rel=5e-3)
    assert gpu.tdp_w == watts


def test_every_card_and_every_price_says_where_it_is_from():
    for gpu in GPUS:
        assert gpu.source
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", gpu.date)
        assert gpu.cuda_gib < gpu.memory_gb
    assert set(PRICES) <= {gpu.name for gpu in GPUS}
    for price in PRICES.values():
        assert price.rent_per_h or price.buy
        assert bool(price.rent_per_h) == bool(price.rent_source)
        assert bool(price.buy) == bool(price.buy_source)


# The L40 has the L40S's processors at half of their rate, which no property of it tells.
@pytest.mark.parametrize(
    "gpu", [gpu for gpu in GPUS if gpu.name != "L40"], ids=lambda gpu: gpu.name
)
def test_a_card_that_is_not_in_the_table_is_estimated_near_what_it_is(gpu):
    """As if each row were missing: from its SM count, clock and DRAM alone."""
    found = estimate_gpu(
        gpu.name, gpu.arch, gpu.num_sms, gpu.boost_ghz, gpu.dram_gbps, gpu.memory_gb
    )
    assert found.is_estimate
    assert found.bf16_tflops == pytest.approx(gpu.bf16_tflops, rel=0.06)
    assert found.fp8_f32_tflops == pytest.approx(gpu.fp8_f32_tflops, rel=0.06)


# (name, compute capability, SMs, clock kHz, memory clock kHz, bus bits): as drivers report them;
# integrated GPUs have no memory of their own to speak of.
UNKNOWN_CARDS = [
    ("NVIDIA GeForce RTX 4050 Laptop GPU", (8, 9), 20, 2370000, 8001000, 96),
    ("NVIDIA GeForce RTX 4070 Laptop GPU", (8, 9), 36, 2175000, 8001000, 128),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), 76, 2040000, 9001000, 256),
    ("NVIDIA GeForce RTX 4060", (8, 9), 24, 2460000, 8501000, 128),
    ("NVIDIA RTX 4000 Ada Generation", (8, 9), 48, 2175000, 9001000, 160),
    ("NVIDIA L20", (8, 9), 92, 2520000, 9001000, 384),
    ("NVIDIA A10", (8, 6), 72, 1695000, 6251000, 384),
    ("Orin (nvgpu)", (8, 7), 16, 1300000, 0, 0),
    ("NVIDIA Thor", (11, 0), 20, 1575000, 0, 0),
    ("NVIDIA GB10", (12, 1), 48, 2418000, 0, 0),
    ("NVIDIA Unheard-of", (13, 0), 64, 0, 0, 0),
]


@pytest.mark.parametrize("card", UNKNOWN_CARDS, ids=lambda card: card[0])
def test_dispatch_has_sensible_figures_for_every_card(card):
    name, (major, minor), sms, clock, memory_clock, bus = card
    found = {
        "arch_major": major, "arch_minor": minor, "num_sms": sms, "clock_khz": clock,
        "memory_clock_khz": memory_clock, "memory_bus_bits": bus, "l2_bytes": 1 << 21,
    }  # fmt: skip
    gpu = devices.describe(name, 8 << 30, found)
    assert gpu.is_estimate == (find_gpu(name) is None)
    assert 3 <= gpu.dram_gbps / gpu.num_sms <= 16
    arch = 10 * major + minor
    for k in (1024, 4096, 14336):
        times = []
        for m in (1, 16, 64, 512, 4096):
            choice = dispatch.choose(gpu, m, 4096, k, "nvfp4", "bf16")
            assert choice.config.min_arch <= arch
            times.append(choice.estimated_us)
        assert times == sorted(times)
        assert 1 < times[0] < 1e4
        switch = dispatch.activation_switch(gpu, 4096, k, "nvfp4")
        assert (switch < 4096) == cost.has_fp8_mma(arch)
    shape = MoeShape(128, 8, 2048, 768)
    assert choose_moe(gpu, 4096, shape, "nvfp4", "bf16").min_arch <= arch


@pytest.mark.parametrize(
    ("arch", "is_native"),
    [(86, False), (89, True), (90, False), (100, False), (103, False), (110, False), (120, True)],
)
def test_fp8_mma_is_an_instruction_on_some_architectures(arch, is_native):
    assert cost.has_fp8_mma(arch) == is_native
