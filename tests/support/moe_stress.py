# SPDX-License-Identifier: Apache-2.0
"""Numbers at the edges through the kernels of routed experts, on the emulated GPU."""

from __future__ import annotations

import itertools

import torch
from stress_cases import every_pair, legal_scales

from vllm_nvfp4.kernels.cuda.configs import QUANTIZE_CONFIGS
from vllm_nvfp4.kernels.cuda.moe_configs import (
    COMBINE_CONFIGS,
    ROUTE_CONFIG,
    TILE_SIZES,
    MoeConfig,
    schedule_bytes,
)
from vllm_nvfp4.numerics.activation import ExpertActivation, KernelActivation
from vllm_nvfp4.numerics.formats import FORMATS
from vllm_nvfp4.testing import host_gemm, host_moe
from vllm_nvfp4.testing.host_gemm import DTYPES
from vllm_nvfp4.testing.host_moe import Routing
from vllm_nvfp4.testing.moe_cases import Experts, expected_schedule, random_experts

NUM_COLUMNS = 512  # of a weight with all pairs: one token picks one column
_SILU = ExpertActivation("silu").for_kernel()
_LINEAR = KernelActivation()


def schedule_of(
    local: torch.Tensor, num_experts: int, largest_tile: int = TILE_SIZES[-1]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the routing kernel makes, as the product takes it."""
    entries, order = expected_schedule(local, num_experts, largest_tile)
    size = schedule_bytes(local.numel(), num_experts, largest_tile) // 4
    schedule = torch.full((size,), -7, dtype=torch.int32)
    words = [len(entries), 0, 0, 0] + [word for entry in entries for word in entry]
    schedule[: len(words)] = torch.tensor(words, dtype=torch.int32)
    choices = torch.full((local.numel(),), -7, dtype=torch.int32)
    choices[: len(order)] = torch.tensor(order, dtype=torch.int32)
    return schedule, choices


def check_pairs(config: MoeConfig, columns: torch.Tensor, tiles: list[int]) -> int:
    """Tokens with a one in one of ``columns`` give that column of the weight with all pairs, bit
    for bit. Experts get as many tokens as ``tiles`` say, in turn, so that the kernel takes those
    tiles. Returns the number of products."""
    fmt = FORMATS[config.fmt_name]
    scales = legal_scales(fmt)
    # The kernels take whole blocks of rows.
    weight = every_pair(fmt, [*scales, scales[-1]])
    turns = itertools.cycle(tiles)
    experts = itertools.chain.from_iterable([e] * next(turns) for e in itertools.count())
    local = torch.tensor(list(itertools.islice(experts, len(columns))), dtype=torch.int32)[:, None]
    num_experts = int(local.max()) + 1
    stack = Experts([weight] * num_experts, None).stack
    tokens = torch.nn.functional.one_hot(columns, NUM_COLUMNS)
    element, scales = {
        "moe_w4a16": (DTYPES[config.dtype], None),
        "moe_w4a8": (torch.float8_e4m3fn, torch.ones(len(tokens))),
        "moe_w4i8": (torch.int8, torch.ones(len(tokens), -(-NUM_COLUMNS // 64))),
    }[config.stem]
    y = host_moe.run_product(
        host_moe.shipped(config.stem, config.fmt_name),
        config,
        tokens.to(element),
        stack,
        *schedule_of(local, num_experts),
        choices_per_row=1,
        activation=_LINEAR,
        a_scale=scales,
    )
    expected = weight.dequantize(torch.float64).T[columns].to(y.dtype)
    if not torch.equal(y, expected):
        token, row = (y != expected).nonzero()[0].tolist()
        size = int((local == local[token]).sum())
        found, wanted = y[token, row], expected[token, row]
        raise AssertionError(
            f"{config.symbol}, {size} tokens: column {columns[token]} of row {row} is {found}, "
            f"not {wanted}"
        )
    return y.numel()


def tile_sizes(config: MoeConfig) -> list[int]:
    return [tile.block_m for tile in config.tiles]


class StressLayer:
    """A layer of three experts and nine tokens, each of which has two of them."""

    def __init__(self, config: MoeConfig) -> None:
        self.config = config
        dtype = DTYPES[config.dtype]
        generator = torch.Generator().manual_seed(3)
        self.a = torch.randn(9, 96, generator=generator).to(dtype)
        self.weights = torch.rand(9, 2, generator=generator)
        ids = torch.tensor([[0, 1], [1, 2], [2, 0]] * 3, dtype=torch.int32)
        self.routing = Routing(ids, None, 3)
        self.w13 = random_experts(3, 128, 96, config.fmt_name)
        self.w2 = random_experts(3, 96, 64, config.fmt_name, seed=1)
        self.schedule = host_moe.run_route(host_moe.shipped(ROUTE_CONFIG.stem), self.routing)

    def __call__(self, a: torch.Tensor) -> torch.Tensor:
        """As it is launched: product and activation, product, weighted sum."""
        h = self._product(a, self.w13, 2, _SILU)
        x = self._product(h, self.w2, 1, _LINEAR)
        combine = host_moe.shipped(COMBINE_CONFIGS[0].stem)
        return host_moe.run_combine(combine, x.view(9, 2, -1), self.weights, self.routing)

    def _product(
        self, a: torch.Tensor, experts: Experts, choices_per_row: int, activation: KernelActivation
    ) -> torch.Tensor:
        a_scale = None
        if self.config.stem != "moe_w4a16":
            stem = self.config.stem.replace("moe_w4", "quantize_")
            wanted = (stem, self.config.dtype)
            quantize = next(c for c in QUANTIZE_CONFIGS if (c.stem, c.dtype) == wanted)
            a, a_scale = host_gemm.run_quantize(host_gemm.shipped(quantize), quantize, a)
        return host_moe.run_product(
            host_moe.shipped(self.config.stem, self.config.fmt_name),
            self.config,
            a,
            experts.stack,
            *self.schedule,
            choices_per_row=choices_per_row,
            activation=activation,
            bias=experts.bias,
            a_scale=a_scale,
        )
