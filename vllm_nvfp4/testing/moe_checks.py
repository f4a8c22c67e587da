# SPDX-License-Identifier: Apache-2.0
"""What the kernels of routed experts must get right on a real GPU: cases, and the check of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_nvfp4.kernels.cuda import moe as cuda_moe
from vllm_nvfp4.kernels.cuda.devices import INT8_QUANTIZERS, Device, current_stream
from vllm_nvfp4.kernels.cuda.moe import Launch
from vllm_nvfp4.kernels.cuda.moe_configs import DECODE_TOKENS, MoeConfig
from vllm_nvfp4.numerics.activation import ExpertActivation, KernelActivation
from vllm_nvfp4.testing.kernel_cases import DATA, TORCH_DTYPES
from vllm_nvfp4.testing.metrics import UNIT_ROUNDOFF, Comparison, compare
from vllm_nvfp4.testing.moe_cases import (
    Experts,
    expected_schedule,
    random_experts,
    reference_product,
    route,
)

_ACTIVATION = ExpertActivation("silu", 7.0, 1.702, 1.0)

# (tokens, choices, all experts, hidden, intermediate): the last is a multiple of the block alone.
SHAPES = (
    (1, 2, 4, 256, 96),
    (5, 8, 40, 320, 160),
    (16, 1, 3, 2048, 768),
    (17, 3, 5, 96, 32),
    (300, 4, 12, 512, 352),
    (700, 1, 2, 160, 1408),
)
SMALL_SHAPES = ((3, 2, 4, 96, 96), (20, 2, 3, 160, 64))


@dataclass(frozen=True)
class MoeCase:
    """One kernel on one layer, of which every third expert is on another rank if is_parallel."""

    config: MoeConfig
    num_tokens: int
    num_choices: int
    num_ids: int
    hidden: int
    inner: int
    data: str
    is_parallel: bool

    def __str__(self) -> str:
        ranks = "-parallel" if self.is_parallel else ""
        return (
            f"{self.config.symbol}-{self.num_tokens}x{self.num_choices}of{self.num_ids}"
            f"-{self.hidden}x{self.inner}-{self.data}{ranks}"
        )


def moe_cases_of(
    config: MoeConfig, shapes: tuple[tuple[int, int, int, int, int], ...] = SHAPES
) -> list[MoeCase]:
    """A configuration on all shapes that it may get; kinds of data and the ranks take turns."""
    kinds = list(DATA)
    return [
        MoeCase(config, *shape, kinds[turn % len(kinds)], turn % 2 == 1)
        for turn, shape in enumerate(shapes)
        if config.family == "prefill" or shape[0] <= DECODE_TOKENS
    ]


def check_moe_case(case: MoeCase, device: torch.device) -> Comparison:
    """Run a case twice, compare every step with float64 and the runs bit for bit. The outcome is
    that of the worst step."""
    dtype = TORCH_DTYPES[case.config.dtype]
    loaded = cuda_moe.prepare_moe(device, case.config.fmt_name, (dtype,))
    # Of the 8-bit kernels that loads those of the variant that is in force alone.
    quantizers = [INT8_QUANTIZERS[case.config.dtype]] * (case.config.stem == "moe_w4i8")
    with torch.cuda.device(device):
        loaded.load([case.config, *quantizers])
    layer = make_layer(case, device)
    outcomes: list[Comparison] = []
    y = run_layer(loaded, current_stream(device.index), case.config, layer, outcomes)
    again = run_layer(loaded, current_stream(device.index), case.config, layer, outcomes)
    if not torch.equal(y.view(torch.int16), again.view(torch.int16)):
        differing = int((y != again).sum())
        outcomes.append(Comparison(0.0, torch.inf, differing, f"two runs differ in {differing}"))
    return max(outcomes, key=lambda outcome: (outcome.num_wrong, outcome.worst))


@dataclass(frozen=True)
class MoeLayer:
    """A layer and its input; routing: weights, ids, expert_map."""

    a: torch.Tensor
    w13: Experts
    w2: Experts
    routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def make_layer(case: MoeCase, device: torch.device) -> MoeLayer:
    """The operands of a case."""
    dtype = TORCH_DTYPES[case.config.dtype]
    generator = torch.Generator(device).manual_seed(case.num_tokens)
    a = DATA[case.data]((case.num_tokens, case.hidden), generator).to(dtype)
    scores = torch.rand(case.num_tokens, case.num_ids, generator=generator, device=device)
    scores *= torch.linspace(1.0, 0.4, case.num_ids, device=device)
    weights, ids = scores.topk(case.num_choices, dim=-1)
    expert_map, num_experts = None, case.num_ids
    if case.is_parallel:
        here = torch.arange(case.num_ids, device=device) % 3 != 2
        num_experts = int(here.sum())
        expert_map = torch.where(here, here.cumsum(0) - 1, -1).int()
    fmt_name = case.config.fmt_name
    w13 = random_experts(
        num_experts, 2 * case.inner, case.hidden, fmt_name, bias=dtype, device=device
    )
    w2 = random_experts(
        num_experts, case.hidden, case.inner, fmt_name, bias=dtype, seed=1, device=device
    )
    return MoeLayer(a, w13, w2, (weights, ids.int(), expert_map))


def run_layer(
    device: Device, stream: int, config: MoeConfig, layer: MoeLayer, outcomes: list[Comparison]
) -> torch.Tensor:
    """Run a layer by one given kernel; what each step is compared with goes to ``outcomes``."""
    weights, ids, expert_map = layer.routing
    num_experts, num_choices = len(layer.w13.weights), ids.shape[1]
    local = route(ids, expert_map, num_experts)
    routed = cuda_moe.route(
        device, stream, weights, ids, expert_map, num_experts, config.largest_tile
    )  # fmt: skip
    outcomes.append(_check_schedule(routed, local, num_experts, config.largest_tile))
    launch = Launch(device, stream, config, routed)
    first = (layer.a, layer.w13.stack, layer.w13.bias, num_choices)
    h = launch.product(*first, _ACTIVATION.for_kernel())
    x = launch.product(h, layer.w2.stack, layer.w2.bias, 1, KernelActivation())
    y = cuda_moe.combine(device, stream, x, routed, torch.empty_like(layer.a))
    bits = (16, "exact") if config.stem == "moe_w4a16" else (8, config.tiles[0].variant)
    outcomes += _check_product(layer.a, h, layer.w13, local, num_choices, _ACTIVATION, bits)
    outcomes += _check_product(h, x, layer.w2, local, 1, None, bits)
    outcomes.append(_check_sum(x, y, weights, local))
    return y


def _check_schedule(
    routed: cuda_moe.Routed, local: torch.Tensor, num_experts: int, largest_tile: int
) -> Comparison:
    entries, order = expected_schedule(local, num_experts, largest_tile)
    words = [word for entry in entries for word in entry]
    found = [*routed.schedule[:1].tolist(), *routed.schedule[4 : 4 + len(words)].tolist()]
    is_right = found == [len(entries), *words] and routed.order[: len(order)].tolist() == order
    report = "schedule as expected" if is_right else f"schedule {found}, expected {entries}"
    return Comparison(0.0, 0.0, 0 if is_right else 1, report)


def _check_product(
    a: torch.Tensor, y: torch.Tensor, experts: Experts, local: torch.Tensor, choices_per_row: int,
    activation: ExpertActivation | None, bits: tuple[int, str],
) -> list[Comparison]:  # fmt: skip
    outcomes = []
    for e, weight in enumerate(experts.weights):
        choice = (local.flatten() == e).nonzero()[:, 0]
        bias = None if experts.bias is None else experts.bias[e]
        x = a[choice // choices_per_row]
        expected, off = reference_product(x, weight, bias, activation, *bits)
        outcomes.append(compare(y[choice], expected, off))
    return outcomes


def _check_sum(
    x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, local: torch.Tensor
) -> Comparison:
    is_here = (local >= 0)[..., None]
    terms = torch.where(is_here, x.view(*local.shape, -1).double() * weights.double()[..., None], 0)
    expected = terms.sum(1)
    smallest = torch.finfo(x.dtype).smallest_normal
    off = UNIT_ROUNDOFF[x.dtype] * expected.abs() + 2.0**-21 * terms.abs().sum(1) + smallest
    return compare(y, expected, off)
