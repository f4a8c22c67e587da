# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of routed experts, run on the emulated GPU, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gemm_cases import DISTRIBUTIONS
from moe_stress import schedule_of

from vllm_nvfp4.kernels.cuda import moe_configs
from vllm_nvfp4.kernels.cuda.moe_configs import MOE_CONFIGS, ROUTE_CONFIG, MoeConfig
from vllm_nvfp4.numerics.activation import SUPPORTED, ExpertActivation, KernelActivation
from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row, quantize_int8_per_group
from vllm_nvfp4.testing.host_gemm import DTYPES, build_host
from vllm_nvfp4.testing.host_kernel import HostKernelError, HostMachine
from vllm_nvfp4.testing.host_moe import Routing, run_combine, run_product, run_route, shipped
from vllm_nvfp4.testing.metrics import compare
from vllm_nvfp4.testing.moe_cases import (
    Experts,
    expected_schedule,
    random_experts,
    reference_product,
    route,
)

LINEAR = KernelActivation()
SILU = ExpertActivation("silu")


def choose(num_tokens: int, num_choices: int, num_ids: int, seed: int = 0) -> torch.Tensor:
    """[M, k] int32, a token's choices all different; lower numbers are chosen more often."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_ids, generator=generator)
    scores *= torch.linspace(1.0, 0.3, num_ids)
    return scores.topk(num_choices, dim=-1).indices.int()


def tokens(num: int, k: int, dtype: torch.dtype, distribution: str = "gaussian") -> torch.Tensor:
    torch.manual_seed(num)
    a = torch.randn(num, k)
    if distribution == "heavy_tailed":
        a = torch.distributions.StudentT(2.5).sample((num, k))
    elif distribution == "outlier_channels":
        a[:, :: max(k // 4, 1)] *= 40
    elif distribution == "all_positive":
        a = a.abs() + 0.5
    return a.to(dtype)


def check_product(
    config: MoeConfig,
    a: torch.Tensor,
    experts: Experts,
    local: torch.Tensor,
    activation: ExpertActivation | None = None,
    *,
    choices_per_row: int = 1,
    **options,
) -> torch.Tensor:
    """Run one product and compare each expert's choices with float64. Returns y."""
    bits, variant, q = 16, "exact", a
    if config.stem != "moe_w4a16":
        bits, variant = 8, config.tiles[0].variant
        quantize = quantize_int8_per_group if variant == "int8" else quantize_fp8_per_row
        q, options["a_scale"] = quantize(a)
    y = run_product(
        options.pop("module", None) or shipped(config.stem, config.fmt_name),
        config,
        q,
        experts.stack,
        *schedule_of(local, len(experts.weights), config.largest_tile),
        choices_per_row=choices_per_row,
        activation=activation.for_kernel() if activation else LINEAR,
        bias=experts.bias,
        **options,
    )
    flat = local.flatten()
    assert y[flat < 0].isnan().all(), "rows of choices that are not served here were written"
    for e, weight in enumerate(experts.weights):
        choice = (flat == e).nonzero()[:, 0]
        bias = None if experts.bias is None else experts.bias[e]
        x = a[choice // choices_per_row]
        expected, off = reference_product(x, weight, bias, activation, bits, variant)
        found = compare(y[choice], expected, off)
        assert found.is_match, f"{config.symbol} expert {e}: {found.report}"
    return y


# --- routing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "num_choices", "num_experts"),
    [(1, 1, 1), (1, 8, 40), (3, 2, 5), (130, 3, 7), (70, 8, 128), (300, 1, 2)],
)
def test_the_schedule(num_tokens: int, num_choices: int, num_experts: int) -> None:
    ids = choose(num_tokens, num_choices, num_experts)
    check_schedule(Routing(ids, None, num_experts))


def test_more_choices_than_the_kernel_marks_in_one_go() -> None:
    few = replace(ROUTE_CONFIG, mark_words=16)
    ids = choose(350, 4, 6)
    assert ids.numel() > 2 * 32 * few.mark_words
    check_schedule(Routing(ids, None, 6), module=build_host([few]))


def check_schedule(routing: Routing, largest_tile: int = 64, module=None) -> None:
    local = route(routing.ids, routing.expert_map, routing.num_experts)
    entries, order = expected_schedule(local, routing.num_experts, largest_tile)
    for seed in range(2):
        schedule, choices = run_route(
            module or shipped(ROUTE_CONFIG.stem), routing, HostMachine(seed=seed), largest_tile
        )
        assert schedule[0] == len(entries)
        assert schedule[4 : 4 + 4 * len(entries)].view(-1, 4).tolist() == entries
        assert choices[: len(order)].tolist() == order
        assert (schedule[4 + 4 * len(entries) :] == -7).all()
        assert (choices[len(order) :] == -7).all()


def test_all_tokens_to_one_expert() -> None:
    check_schedule(Routing(torch.full((200, 1), 3, dtype=torch.int32), None, 6))


def test_tiles_are_no_larger_than_the_kernel_has() -> None:
    check_schedule(Routing(torch.full((16, 3), 3, dtype=torch.int32), None, 6), largest_tile=16)


@pytest.mark.parametrize("config", MOE_CONFIGS[::4], ids=lambda c: c.symbol)
def test_an_expert_that_tokens_name_twice(config: MoeConfig) -> None:
    """More choices of one expert than there are tokens: the decode kernels have no tile for them
    all at once, and none may be dropped."""
    assert {c.family for c in MOE_CONFIGS[::4]} == {"decode", "prefill"}
    local = torch.zeros(11, 2, dtype=torch.int32)
    local[3, 1] = 1
    a = tokens(11, 128, DTYPES[config.dtype])
    experts = random_experts(2, 64, 128, config.fmt_name)
    y = check_product(config, a, experts, local, choices_per_row=2)
    assert y.isfinite().all()


def test_experts_of_other_ranks_and_nobodys() -> None:
    ids = choose(50, 3, 8)
    ids[7], ids[8] = -1, 999  # vLLM pads with -1
    expert_map = torch.tensor([-1, 2, -1, 0, 1, -1, -1, 3], dtype=torch.int32)
    check_schedule(Routing(ids, expert_map, 4))
    check_schedule(Routing(ids, torch.full((8,), -1, dtype=torch.int32), 4))
    check_schedule(Routing(ids, None, 8))


def test_no_schedule_is_longer_than_its_buffer() -> None:
    for num_experts, num_choices in ((1, 1), (3, 64), (3, 65), (3, 200), (8, 129), (200, 150)):
        worst = 0
        for hit in range(1, min(num_experts, num_choices) + 1):
            # One choice for each expert that is hit, then whole tiles and one choice more.
            left, entries = num_choices - hit, hit
            entries += left // 64
            worst = max(worst, entries)
        assert worst <= moe_configs.max_entries(num_choices, num_experts)


# --- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", MOE_CONFIGS, ids=lambda c: c.symbol)
def test_every_kernel_and_tile_size(config: MoeConfig) -> None:
    """One expert for each size of tile, one with more than the largest, one without tokens; an
    intermediate size that is a multiple of the block and of nothing else, w1 and w3 unlike."""
    sizes = [tile.block_m for tile in config.tiles]
    counts = [size - 1 for size in sizes] + [1, 0]
    counts += [sizes[-1] + 3] if config.family == "prefill" else []
    flat = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).int()
    torch.manual_seed(3)
    flat = torch.cat([flat, torch.tensor([-1], dtype=torch.int32)])[torch.randperm(len(flat) + 1)]
    local = flat[:, None]
    block = config.tiles[0].fmt.block_size
    hidden, inner = 3 * block + 64, 5 * block
    dtype = DTYPES[config.dtype]
    a = tokens(len(flat), hidden, dtype)
    w13 = random_experts(len(counts), 2 * inner, hidden, config.fmt_name, bias=dtype)
    h = check_product(config, a, w13, local, SILU)
    w2 = random_experts(len(counts), hidden, inner, config.fmt_name)
    check_product(config, h.nan_to_num(), w2, local)


@pytest.mark.parametrize("config", MOE_CONFIGS[::2], ids=lambda c: c.symbol)
def test_tokens_are_gathered_by_choice(config: MoeConfig) -> None:
    """Three choices a token: each reads the token's one row; K runs over several steps."""
    local = choose(7, 3, 5)
    k = 2 * config.tiles[0].block_k + config.tiles[0].fmt.block_size
    a = tokens(7, k, DTYPES[config.dtype])
    experts = random_experts(5, 160, k, config.fmt_name)
    check_product(config, a, experts, local, choices_per_row=3, num_blocks=2)


@pytest.mark.parametrize("name", sorted(set(SUPPORTED) - {"swigluoai"}))
def test_activations(name: str) -> None:
    activation = ExpertActivation(name)
    if name.startswith(("silu", "swiglu")) and activation.is_gated:
        activation = ExpertActivation(name, 2.0, 1.702, 1.0)
    config = MOE_CONFIGS[0]
    a = tokens(9, 96, DTYPES[config.dtype]) * 4
    rows = 2 * 48 if activation.is_gated else 48
    experts = random_experts(3, rows, 96, config.fmt_name)
    check_product(config, a, experts, choose(9, 2, 3), activation, choices_per_row=2)


def test_interleaved_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="swigluoai takes interleaved rows"):
        ExpertActivation("swigluoai").for_kernel()
    activation = ExpertActivation("swigluoai").uninterleaved()
    h = torch.randn(3, 8)
    rows = torch.cat([h[:, ::2], h[:, 1::2]], dim=1)
    assert torch.equal(activation(rows), ExpertActivation("swigluoai")(h))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("config", MOE_CONFIGS[::2], ids=lambda c: c.symbol)
def test_data_of_every_kind(config: MoeConfig, distribution: str) -> None:
    a = tokens(6, 512, DTYPES[config.dtype], distribution)
    experts = random_experts(2, 64, 512, config.fmt_name)
    local = torch.tensor([[0], [1], [1], [0], [1], [1]], dtype=torch.int32)
    check_product(config, a, experts, local, SILU)


def test_nan_and_infinity_stay_in_their_token() -> None:
    config = MOE_CONFIGS[0]
    a = tokens(4, 96, DTYPES[config.dtype])
    experts = random_experts(1, 64, 96, config.fmt_name).stack
    routed = schedule_of(torch.zeros(4, 1, dtype=torch.int32), 1)
    options = {"choices_per_row": 1, "activation": ExpertActivation("silu", 7.0).for_kernel()}
    module = shipped(config.stem, config.fmt_name)
    clean = run_product(module, config, a, experts, *routed, **options)
    a[1, 5] = torch.nan
    y = run_product(module, config, a, experts, *routed, **options)
    assert torch.equal(y[[0, 2, 3]], clean[[0, 2, 3]])
    assert y[1].isnan().all()


@pytest.mark.parametrize("config", MOE_CONFIGS[::3], ids=lambda c: c.symbol)
def test_the_same_bits_whatever_runs_first(config: MoeConfig) -> None:
    a = tokens(20, 160, DTYPES[config.dtype])
    experts = random_experts(4, 128, 160, config.fmt_name).stack
    scale = None
    if config.stem != "moe_w4a16":
        is_int8 = config.stem == "moe_w4i8"
        a, scale = (quantize_int8_per_group if is_int8 else quantize_fp8_per_row)(a)
    routed = schedule_of(choose(20, 2, 4) if config.family == "prefill" else choose(8, 2, 4), 4)
    results = [
        run_product(
            shipped(config.stem, config.fmt_name), config, a, experts, *routed,
            choices_per_row=2, activation=SILU.for_kernel(), num_blocks=blocks,
            a_scale=scale,
            machine=HostMachine(seed=seed),
        ).view(torch.int16)
        for seed, blocks in ((0, 1), (1, 3), (2, 7))
    ]  # fmt: skip
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# --- combining -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
@pytest.mark.parametrize("is_weighted", [True, False])
def test_combining(dtype: torch.dtype, is_weighted: bool) -> None:
    """Rows of other ranks' experts hold NaN: they are not to be looked at."""
    ids = choose(9, 5, 8)
    expert_map = torch.tensor([-1, 2, -1, 0, 1, -1, -1, 3], dtype=torch.int32)
    local = route(ids, expert_map, 4)
    x = tokens(9 * 5, 1048, dtype).view(9, 5, 1048)
    x[local < 0] = torch.nan
    weights = torch.rand(9, 5)
    module = shipped("moe_combine")
    y = run_combine(module, x, weights if is_weighted else None, Routing(ids, expert_map, 4))
    factor = weights.double() if is_weighted else torch.ones(9, 5, dtype=torch.float64)
    terms = torch.where((local < 0)[..., None], 0.0, x.double() * factor[..., None])
    expected = terms.sum(1)
    unit = torch.finfo(dtype).eps / 2
    off = unit * expected.abs() + 2.0**-21 * terms.abs().sum(1) + 1e-7
    found = compare(y, expected, off)
    assert found.is_match, found.report
    assert not y[(local < 0).all(1)].any()


# --- planted faults ------------------------------------------------------------------------------

# (what, text, replacement): each has to be noticed, by the emulator or by the numbers.
FAULTS = [
    (
        "no barrier between tiles",
        "    // The next tile's copies go where this one's sums lie.\n    __syncthreads();",
        "",
    ),
    ("up rows in the gates' place", "return is_up ? num_row_tiles_ + tile : tile;", "return tile;"),
    ("rows beyond the expert's last", ", num_row_tiles_ - 1);", ", 1 << 20);"),
    ("tokens beyond the expert's last", "return i < num_tokens_;", "return true;"),
    (
        "the first expert's weight for all",
        "fragments::kTileK) * expert;",
        "fragments::kTileK) * 0;",
    ),
    ("the first expert's scale for all", "int64_t{entry.expert} * p.n + column", "column"),
    ("every choice its own row", "choice(i) / choices_per_row_", "choice(i)"),
    ("gate and up swapped", "apply_gated(p, v.x, up.x)", "apply_gated(p, up.x, v.x)"),
    ("gate's scale for up", "kIsGated ? row + p.n / 2 : row", "row"),
    ("a tile left out", "i < num_tiles; i += static", "i < num_tiles - 1; i += static"),
    (
        "no barrier between the warps' sums",
        "epilogue::store_accumulators<Config>(smem, accumulators);\n  __syncthreads();\n  if (p.is",
        "epilogue::store_accumulators<Config>(smem, accumulators);\n  if (p.is",
    ),
]


@pytest.mark.parametrize(("what", "text", "replacement"), FAULTS, ids=[f[0] for f in FAULTS])
def test_planted_faults_are_noticed(what: str, text: str, replacement: str) -> None:
    config = MOE_CONFIGS[0]
    module = build_host([config], edits=[(text, replacement)])
    a = tokens(5, 400, DTYPES[config.dtype])
    experts = random_experts(3, 2 * 80, 400, config.fmt_name)
    local = torch.tensor([[0, 2], [2, 0], [0, 1], [2, 1], [2, 0]], dtype=torch.int32)

    def is_right(seed: int) -> bool:
        try:
            check_product(
                config, a, experts, local, SILU, choices_per_row=2, num_blocks=2,
                module=module, machine=HostMachine(seed=seed),
            )  # fmt: skip
        except (HostKernelError, AssertionError):
            return False
        return True

    assert not all(is_right(seed) for seed in range(3)), f"{what} was not noticed"


ROUTE_FAULTS = [
    ("counters not cleared together", "counts[e] = 0;\n  __syncthreads();", "counts[e] = 0;"),
    (
        "counted too early",
        "marks, counts);\n  }\n  __syncthreads();",
        "marks, counts);\n  }",
    ),
    ("lanes out of order", "lane >= distance) at", "lane < distance) at"),
    ("warps out of order", "w < warp ?", "w > warp ?"),
    ("warps' sums read too early", "= at;\n  __syncthreads();", "= at;"),
    ("another expert's choices", "e == expert", "e <= expert"),
    ("bits of a word in another order", "left &= left - 1", "left ^= 1u << (31 - __clz(left))"),
    ("tiles of one expert over another's", "tiles += num_tiles(p, count);\n    }", "}"),
    ("remote experts counted", "nullptr && e >= 0) atomicAdd", "nullptr) atomicAdd"),
]


@pytest.mark.parametrize(
    ("what", "text", "replacement"), ROUTE_FAULTS, ids=[f[0] for f in ROUTE_FAULTS]
)
def test_planted_faults_of_the_routing(what: str, text: str, replacement: str) -> None:
    module = build_host([ROUTE_CONFIG], edits=[(text, replacement)])
    ids = choose(600, 3, 8)  # the marks of more than one warp
    expert_map = torch.tensor([-1, 2, -1, 0, 1, -1, -1, 3], dtype=torch.int32)
    local = route(ids, expert_map, 4)
    entries, order = expected_schedule(local, 4)

    def is_right(seed: int) -> bool:
        try:
            schedule, choices = run_route(
                module, Routing(ids, expert_map, 4), HostMachine(seed=seed)
            )
        except HostKernelError:
            return False
        found = schedule[4 : 4 + 4 * len(entries)].view(-1, 4).tolist()
        return found == entries and choices[: len(order)].tolist() == order

    assert not all(is_right(seed) for seed in range(3)), f"{what} was not noticed"
