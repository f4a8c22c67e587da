# SPDX-License-Identifier: Apache-2.0
"""The table of cards against a second source, and the sources that every figure names."""

from __future__ import annotations

import re

import pytest

from vllm_nvfp4.gpus import GPUS, PRICES, find_gpu


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
