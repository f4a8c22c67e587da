# SPDX-License-Identifier: Apache-2.0
"""What vLLM's data-parallel experts ask of the ranks and its CPU communicator lacks.

Tokens go to all ranks by ``all_gatherv``, and the sums come back by ``reduce_scatterv``; on a CPU
vLLM 0.32 raises NotImplementedError for both, so that no mixture of experts runs data-parallel.
Ranks may have different numbers of tokens; gloo's own collectives want equal ones.
"""

from __future__ import annotations

from typing import Any

import torch


def install() -> None:
    """Give them to the communicator, where it has not its own."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    communicator: Any = CpuCommunicator
    for function in (all_gatherv, reduce_scatterv):
        if function.__name__ not in vars(communicator):
            setattr(communicator, function.__name__, function)


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """The rows of all ranks, one rank's after the other; of each tensor where there is a list.

    sizes: rows of each rank, None where they are equal. dim is 0: vLLM asks for no other.
    """
    if isinstance(input_, list):
        return [all_gatherv(self, tensor, dim, sizes) for tensor in input_]
    _check(dim)
    sizes = sizes or [len(input_)] * self.world_size
    padded = input_.new_zeros(max(sizes), *input_.shape[1:])
    padded[: len(input_)] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatterv(
    self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
) -> torch.Tensor:
    """This rank's rows of the sum over the ranks. sizes, dim: as in :func:`all_gatherv`."""
    _check(dim)
    total = input_.clone()
    torch.distributed.all_reduce(total, group=self.device_group)
    sizes = sizes or [len(total) // self.world_size] * self.world_size
    return total.split(sizes)[self.rank_in_group]


def _check(dim: int) -> None:
    if dim != 0:
        raise ValueError(f"CPU communicator: rows are gathered along dim 0, found dim {dim}")
