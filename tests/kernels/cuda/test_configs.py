# SPDX-License-Identifier: Apache-2.0
"""Launch geometry: pure functions, so that every shape can be tried."""

from __future__ import annotations

import math

import pytest

from vllm_nvfp4.kernels.cuda import configs
from vllm_nvfp4.kernels.cuda.configs import ALL_CONFIGS, GEMM_CONFIGS, GemmConfig

SHAPES = [
    (1, 16, 16),
    (1, 4096, 4096),
    (7, 6144, 4096),
    (16, 24576, 4096),
    (33, 4096, 12288),
    (128, 1000, 2880),
    (4096, 10240, 8192),
]


def test_names_are_unique_and_few() -> None:
    assert len({c.symbol for c in ALL_CONFIGS}) == len(ALL_CONFIGS)
    assert len(ALL_CONFIGS) < 100


@pytest.mark.parametrize("config", GEMM_CONFIGS, ids=lambda c: c.symbol)
def test_a_block_fits_every_gpu_it_is_compiled_for(config: GemmConfig) -> None:
    assert config.smem_bytes <= configs.MAX_SMEM_BYTES
    assert config.threads <= 1024
    assert config.smem_bytes % 16 == 0
    assert config.stage_bytes % 16 == 0
    assert config.symbol in config.source


@pytest.mark.parametrize("config", GEMM_CONFIGS, ids=lambda c: c.symbol)
@pytest.mark.parametrize("num_sms", [58, 128, 132])
def test_splits_cover_k_and_the_workspace_holds_them(config: GemmConfig, num_sms: int) -> None:
    for m, n, k in SHAPES:
        tiles, splits, _ = configs.grid(config, m, n, k, num_sms)
        steps = math.ceil(k / config.block_k)
        assert tiles == math.ceil(m / config.block_m) * math.ceil(n / config.block_n)
        # As in the kernel: split s takes steps from steps * s / splits to the next one's.
        parts = [steps * (s + 1) // splits - steps * s // splits for s in range(splits)]
        assert sum(parts) == steps
        assert min(parts) >= 1
        needed = configs.workspace_bytes(config, m, n, k, num_sms)
        assert needed == (
            0 if splits == 1 else tiles * splits * config.block_m * config.block_n * 4
        )
        assert configs.semaphore_bytes(config, m, n) == 4 * tiles


def test_few_tiles_are_split_and_many_are_not() -> None:
    small = next(c for c in GEMM_CONFIGS if c.block_m == 8)
    assert configs.num_splits(small, 1, 1024, 8192, 128) > 1
    assert configs.num_splits(small, 1, 262144, 8192, 128) == 1
    assert configs.num_splits(small, 1, 64, 64, 128) == 1
