# SPDX-License-Identifier: Apache-2.0
"""The kernels of routed experts on the emulated GPU (csrc/host/), launched as on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from vllm_nvfp4.kernels.cuda import moe_configs
from vllm_nvfp4.kernels.cuda.moe_configs import (
    COMBINE_CONFIGS,
    ROUTE_CONFIG,
    CombineParams,
    MoeConfig,
    MoeParams,
    RouteParams,
)
from vllm_nvfp4.kernels.layout import PackedWeight
from vllm_nvfp4.numerics.activation import KernelActivation
from vllm_nvfp4.testing.host_gemm import DTYPES, build_host
from vllm_nvfp4.testing.host_kernel import HostMachine, HostModule


@dataclass(frozen=True)
class Routing:
    """Who chose what.

    ids:        [M, k] int32
    expert_map: [all experts] int32 or None
    num_experts: on this rank
    """

    ids: torch.Tensor
    expert_map: torch.Tensor | None
    num_experts: int

    @property
    def num_ids(self) -> int:
        return self.num_experts if self.expert_map is None else len(self.expert_map)

    def buffers(self) -> dict[str, torch.Tensor]:
        found = {"ids": self.ids}
        if self.expert_map is not None:
            found["expert_map"] = self.expert_map
        return found


def run_route(
    module: HostModule,
    routing: Routing,
    machine: HostMachine | None = None,
    largest_tile: int = moe_configs.TILE_SIZES[-1],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(schedule, sorted choices) of one launch, as int32; what it did not write is -7."""
    num_choices = routing.ids.numel()
    size = moe_configs.schedule_bytes(num_choices, routing.num_experts, largest_tile) // 4
    schedule = torch.full((size,), -7, dtype=torch.int32)
    order = torch.full((num_choices,), -7, dtype=torch.int32)
    buffers = {**routing.buffers(), "schedule": schedule, "sorted": order}
    params = RouteParams(
        **{name: tensor.data_ptr() for name, tensor in buffers.items()},
        num_choices=num_choices,
        num_experts=routing.num_experts,
        num_ids=routing.num_ids,
        largest_tile=largest_tile,
    )
    module.launch(
        ROUTE_CONFIG.symbol,
        params,
        grid=(routing.num_experts, 1, 1),
        block=(ROUTE_CONFIG.threads, 1, 1),
        smem_bytes=ROUTE_CONFIG.smem_bytes,
        buffers=buffers,
        outputs={"schedule", "sorted"},
        machine=machine,
    )
    return schedule, order


def run_product(
    module: HostModule,
    config: MoeConfig,
    a: torch.Tensor,
    stack: PackedWeight,
    schedule: torch.Tensor,
    choices: torch.Tensor,
    *,
    choices_per_row: int,
    activation: KernelActivation,
    bias: torch.Tensor | None = None,
    a_scale: torch.Tensor | None = None,
    num_blocks: int = 3,
    machine: HostMachine | None = None,
) -> torch.Tensor:
    """y [choices, N or N/2] of one launch; rows that no expert wrote are NaN.

    a: [rows, K], contiguous; bias: [experts, N]
    a_scale: float32, [rows] (w4a8) or [rows, ceil(K / 64)] (w4i8)
    stack: the experts' weights, a leading dimension on each tensor
    """
    n = stack.num_rows
    columns = n // 2 if activation.is_gated else n
    y = torch.full((len(choices), columns), torch.nan, dtype=DTYPES[config.dtype])
    buffers = {
        "a": a,
        "codes": stack.codes,
        "block_scale": stack.block_scale,
        "global_scale": stack.global_scale,
        "y": y,
        "schedule": schedule,
        "choices": choices,
    }
    if bias is not None:
        buffers["bias"] = bias
    if a_scale is not None:
        buffers["a_scale"] = a_scale
    params = MoeParams(
        **{name: tensor.data_ptr() for name, tensor in buffers.items()},
        n=n,
        k=stack.num_cols,
        a_stride=a.stride(0),
        y_stride=columns,
        choices_per_row=choices_per_row,
        is_gated=activation.is_gated,
        function=moe_configs.FUNCTIONS.index(activation.function),
        limit=activation.limit,
        alpha=activation.alpha,
        beta=activation.beta,
    )
    module.launch(
        config.symbol,
        params,
        grid=(num_blocks, 1, 1),
        block=(config.threads, 1, 1),
        smem_bytes=config.smem_bytes,
        buffers=buffers,
        outputs={"y"},
        machine=machine,
    )
    return y


def run_combine(
    module: HostModule,
    x: torch.Tensor,
    weights: torch.Tensor | None,
    routing: Routing,
    machine: HostMachine | None = None,
) -> torch.Tensor:
    """y [M, H] of one launch. x: [M, k, H]; weights: [M, k] float32 or None."""
    num_tokens, num_choices, hidden_size = x.shape
    config = next(c for c in COMBINE_CONFIGS if DTYPES[c.dtype] == x.dtype)
    y = torch.full((num_tokens, hidden_size), torch.nan, dtype=x.dtype)
    buffers = {**routing.buffers(), "x": x, "y": y}
    if weights is not None:
        buffers["weights"] = weights
    params = CombineParams(
        **{name: tensor.data_ptr() for name, tensor in buffers.items()},
        num_tokens=num_tokens,
        num_choices=num_choices,
        hidden_size=hidden_size,
        num_experts=routing.num_experts,
        num_ids=routing.num_ids,
    )
    module.launch(
        config.symbol,
        params,
        grid=(num_tokens, -(-hidden_size // config.columns), 1),
        block=(config.threads, 1, 1),
        smem_bytes=config.smem_bytes,
        buffers=buffers,
        outputs={"y"},
        machine=machine,
    )
    return y


@lru_cache
def shipped(stem: str, fmt_name: str = "") -> HostModule:
    """The module of one family of kernels: compiled at its first use."""
    kernels = [c for c in moe_configs.ALL_MOE_CONFIGS if c.stem == stem]
    return build_host([c for c in kernels if getattr(c, "fmt_name", "") == fmt_name])
