# SPDX-License-Identifier: Apache-2.0
"""The W4A16 kernel's own text, run on the emulated GPU, against float64 products."""

from __future__ import annotations

import pytest
import torch
from gemm_cases import (
    DISTRIBUTIONS,
    check_the_order_of_the_splits,
    configs_of,
    make_activations,
    make_weight,
    odd_shapes,
    smallest,
)

from vllm_nvfp4.kernels.cuda.configs import GEMM_CONFIGS, GemmConfig
from vllm_nvfp4.kernels.layout import pack_weight
from vllm_nvfp4.numerics.codes import pack_codes
from vllm_nvfp4.numerics.formats import E2M1_VALUES, FORMATS, MXFP4
from vllm_nvfp4.numerics.reference import reference_linear
from vllm_nvfp4.numerics.weight import BlockScaledWeight, decode_block_scale
from vllm_nvfp4.testing.host_gemm import DTYPES, SemaphoreError, build_host, run_gemm, shipped
from vllm_nvfp4.testing.host_kernel import HostKernelError, HostMachine
from vllm_nvfp4.testing.metrics import compare_linear

CONFIGS = configs_of("gemm_w4a16")


def test_every_configuration_is_covered() -> None:
    others = [c for c in GEMM_CONFIGS if c not in CONFIGS]
    assert {c.stem for c in others} == {"gemm_w4a8", "gemm_w4i8"}
    assert len(CONFIGS) + len(others) == len(GEMM_CONFIGS)
    assert len({c.symbol for c in GEMM_CONFIGS}) == len(GEMM_CONFIGS)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.symbol)
def test_odd_shapes_match_float64(config: GemmConfig) -> None:
    for m, n, k, splits in odd_shapes(config):
        weight = make_weight(config, n, k)
        a = make_activations(config, m, k)
        bias = make_activations(config, 1, n, seed=2)[0] if n % 8 else None
        y = run_gemm(shipped(config), config, a, pack_weight(weight), bias=bias, splits=splits)
        found = compare_linear(y, a, weight, bias)
        assert found.is_match, f"{config.symbol} M={m} N={n} K={k} splits={splits}: {found.report}"


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt_name", FORMATS)
@pytest.mark.parametrize("accumulator", ["exact", "ada"])
def test_data_of_every_kind(fmt_name: str, dtype: str, distribution: str, accumulator: str) -> None:
    config = smallest("gemm_w4a16", fmt_name, dtype)
    weight = make_weight(config, 64, 1024)
    a = make_activations(config, 5, 1024, distribution)
    machine = HostMachine(half_accumulator=accumulator)
    y = run_gemm(shipped(config), config, a, pack_weight(weight), splits=2, machine=machine)
    found = compare_linear(y, a, weight)
    assert found.is_match, found.report


def test_nan_and_infinity_stay_in_their_token() -> None:
    config = smallest("gemm_w4a16", "nvfp4", "bf16")
    packed = pack_weight(make_weight(config, 40, 96))
    a = make_activations(config, 4, 96)
    clean = run_gemm(shipped(config), config, a, packed)
    a[1, 5], a[3, 50] = torch.nan, torch.inf
    y = run_gemm(shipped(config), config, a, packed)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert y[1].isnan().all()
    assert not y[3].isfinite().any()


@pytest.mark.parametrize("block_m", [8, 32])
def test_rows_of_a_wider_matrix(block_m: int) -> None:
    """a is a slice of columns: what lies beside it is NaN and must not be read into a product."""
    config = next(c for c in CONFIGS if c.block_m == block_m)
    k = 5 * config.fmt.block_size
    wide = torch.full((3, k + 24), torch.nan, dtype=DTYPES[config.dtype])
    a = wide[:, 8 : 8 + k]
    a.copy_(make_activations(config, 3, k))
    weight = make_weight(config, 40, k)
    y = run_gemm(shipped(config), config, a, pack_weight(weight))
    found = compare_linear(y, a, weight)
    assert found.is_match, found.report


@pytest.mark.parametrize("block_m", [8, 32])
def test_a_single_token_of_any_stride(block_m: int) -> None:
    """PyTorch calls [1, K] contiguous whatever its stride: that must not reach a copy's source."""
    config = next(c for c in CONFIGS if c.block_m == block_m)
    k = 3 * config.fmt.block_size
    a = make_activations(config, 1, k).as_strided((1, k), (k + 1, 1))
    assert a.is_contiguous()
    weight = make_weight(config, 40, k)
    y = run_gemm(shipped(config), config, a, pack_weight(weight))
    assert compare_linear(y, a, weight).is_match


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt_name", FORMATS)
def test_every_code_times_every_block_scale(fmt_name: str, dtype: str) -> None:
    """Row n has scale byte n and all codes; a one-hot token picks one code. Nothing but the last
    rounding may happen, from the least subnormal to beyond the output's range."""
    config = smallest("gemm_w4a16", fmt_name, dtype)
    fmt = FORMATS[fmt_name]
    rows = 127 if fmt.scale_type == "e4m3" else 255
    codes = (torch.arange(fmt.block_size, dtype=torch.uint8) % 16).expand(rows, -1)
    scale = torch.arange(rows, dtype=torch.uint8)[:, None]
    scale = scale.view(torch.float8_e4m3fn) if fmt.scale_type == "e4m3" else scale
    weight = BlockScaledWeight(pack_codes(codes), scale, torch.ones(rows), fmt)
    a = torch.eye(fmt.block_size, dtype=DTYPES[dtype])
    y = run_gemm(shipped(config), config, a, pack_weight(weight))
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    table = torch.cat([values, -values])
    expected = table[codes[0].long()][:, None] * decode_block_scale(scale, fmt, torch.float64).T
    assert torch.equal(y, expected.to(y.dtype))


def test_mxfp4_scales_at_both_ends_keep_their_sums() -> None:
    """Blocks of scale 2^127 that cancel, and one of 2^-127 that the activations bring back."""
    config = smallest("gemm_w4a16", "mxfp4", "bf16")
    codes = torch.tensor([7, 15, 7], dtype=torch.uint8).repeat_interleave(32).expand(8, -1)
    scale = torch.tensor([[254, 254, 0]], dtype=torch.uint8).expand(8, -1).contiguous()
    weight = BlockScaledWeight(pack_codes(codes), scale, torch.ones(8), MXFP4)
    a = torch.ones(2, 96, dtype=torch.bfloat16)
    a[:, :64] = 2.0**-40
    a[:, 64:] = 2.0**100
    y = run_gemm(shipped(config), config, a, pack_weight(weight))
    assert torch.equal(y.double(), reference_linear(a, weight))


@pytest.mark.parametrize("config", CONFIGS[::4], ids=lambda c: c.symbol)
def test_the_same_input_gives_the_same_bits(config: GemmConfig) -> None:
    """Whatever the order in which blocks, warps and lanes run."""
    k = 3 * config.block_k + config.fmt.block_size
    packed = pack_weight(make_weight(config, 40, k))
    a = make_activations(config, 9, k)
    results = [
        run_gemm(shipped(config), config, a, packed, splits=4, machine=HostMachine(seed=seed))
        for seed in range(3)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("splits", [5, 9, 16])
@pytest.mark.parametrize("block_m", [8, 16, 32])
def test_splits_are_added_in_their_order(block_m: int, splits: int) -> None:
    """Whether a round of the tail's loads takes all of them or not."""
    config = next(c for c in CONFIGS if c.block_m == block_m and c.dtype == "bf16")
    check_the_order_of_the_splits(config, splits, undo=2.0**7)


# (what, text, replacement): each has to be noticed, by the emulator or by the numbers.
FAULTS = [
    ("wait one stage too late", "cp_async_wait<kStages - 2>()", "cp_async_wait<kStages - 1>()"),
    (
        "no barrier in the K loop",
        "      __syncthreads();\n      if (steps_to_load-- > 0) loader",
        "      if (steps_to_load-- > 0) loader",
    ),
    (
        "no barrier before the epilogue",
        "  ptx::cp_async_wait<0>();\n  __syncthreads();",
        "  ptx::cp_async_wait<0>();",
    ),
    (
        "no barrier between the warps' sums",
        "store_accumulators<Config>(smem, accumulators);\n  __syncthreads();",
        "store_accumulators<Config>(smem, accumulators);",
    ),
    (
        "partial sums released before all are written",
        "  __syncthreads();  // every thread's partial",
        "  // every thread's partial",
    ),
    ("semaphore left as it is", "if (is_last) ptx::st_relaxed_gpu(semaphore, 0);", ""),
    ("semaphore left at 1", "st_relaxed_gpu(semaphore, 0)", "st_relaxed_gpu(semaphore, 1)"),
    ("the first split left out", "i) sum[i] = add(sum[i],", "i) if (s + j) sum[i] = add(sum[i],"),
    ("the first split's sums for all", "        from += next_split;\n", ""),
    ("tokens read past the last one", "return i < num_tokens; }", "return true; }"),
    ("weights read past the last row", "return min(i, num_row_tiles - 1);", "return i;"),
    ("weights read past the last tile", "if (i * Config::kWarpsK >= tiles_left_) return;", ""),
    ("weights of two steps before", "    weights.load_next(phase, i);\n", ""),
    (
        "weights loaded over those of the next step",
        "    weights.load_next(phase, i);\n",
        "    weights.load_next(phase ^ 1, i);\n",
    ),
    ("columns read past the last one", "= column < columns_left;", "= true;"),
    ("lane map of the groups", "return lane() / 4; }", "return lane() % 8; }"),
    ("fragment registers swapped", "a[2] = e2m1_pair<kDtype>(q);", "a[1] = e2m1_pair<kDtype>(q);"),
    ("bytes of a word in memory order", "0x3120", "0x3210"),
    ("scale of the wrong block", "(word & kOddBytes) >> 4", "(word & kEvenBytes) << 4"),
    ("scale of the wrong row", "a[3] = dequant::scale_row_g8", "a[3] = dequant::scale_row_g"),
    ("every block takes itself for the last", "ptx::atom_acq_rel_gpu_add(semaphore, 1) ==", "0 !="),
]


# Only where the weights pass through shared memory.
SHARED_FAULTS = [
    (
        "shared weights read past the last row",
        "return min(i, num_row_tiles - 1);",
        "return i;",
    ),
    ("weights used before they land", "cp_async_wait<kStages - 2>()", "cp_async_wait<3>()"),
    (
        "tile of the wrong row",
        "return kCodes + (tile_n * kTilesK + tile_k)",
        "return kCodes + (tile_k)",
    ),
]


@pytest.mark.parametrize(
    ("what", "text", "replacement"),
    FAULTS + SHARED_FAULTS,
    ids=[f[0] for f in FAULTS + SHARED_FAULTS],
)
def test_planted_faults_are_noticed(what: str, text: str, replacement: str) -> None:
    streams = (what, text, replacement) in FAULTS
    config = next(
        c for c in CONFIGS if (c.fmt_name, c.dtype, c.streams_weights) == ("nvfp4", "bf16", streams)
    )
    module = build_host([config], edits=[(text, replacement)])
    # Four K steps a split: the last one lies where the epilogue puts its tile.
    weight = make_weight(config, 72, 7 * config.block_k + 16)
    a = make_activations(config, 3, weight.num_cols)
    packed = pack_weight(weight)

    def is_right(seed: int) -> bool:
        try:
            y = run_gemm(module, config, a, packed, splits=2, machine=HostMachine(seed=seed))
        except (HostKernelError, SemaphoreError):
            return False
        return compare_linear(y, a, weight).is_match

    assert not all(is_right(seed) for seed in range(3)), f"{what} was not noticed"
