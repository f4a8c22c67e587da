# SPDX-License-Identifier: Apache-2.0
"""What one rank of several is told about the others, without the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def first_of_many(parallel_config: Any) -> Iterator[None]:
    """vLLM's parallel groups, as the first rank of such an engine finds them.

    A model's constructor asks them for sizes and ranks. Nothing is sent: no process group is made.
    """
    from vllm.distributed import parallel_state

    tp = parallel_config.tensor_parallel_size
    pp = parallel_config.pipeline_parallel_size
    dp = parallel_config.data_parallel_size
    pcp = getattr(parallel_config, "prefill_context_parallel_size", 1)
    sizes = {
        "_WORLD": tp * pp * pcp,
        "_TP": tp,
        "_ETP": tp,
        "_DCP": getattr(parallel_config, "decode_context_parallel_size", 1),
        "_PCP": pcp,
        "_PP": pp,
        "_DP": dp,
        "_EP": tp * dp * pcp,
        "_EPLB": tp * dp * pcp,
    }
    before = {
        name: getattr(parallel_state, name) for name in sizes if hasattr(parallel_state, name)
    }
    try:
        for name in before:
            setattr(parallel_state, name, _group(parallel_state, name, sizes[name]))
        yield
    finally:
        for name, group in before.items():
            setattr(parallel_state, name, group)


class _Ranks:
    """In place of torch's process group: what can be asked without sending anything."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


def _group(parallel_state: Any, name: str, size: int) -> Any:
    group = object.__new__(parallel_state.GroupCoordinator)
    group.unique_name = f"check{name.lower()}"
    group.rank = group.local_rank = group.rank_in_group = group.device_index = 0
    group.ranks, group.world_size = list(range(size)), size
    group.group_ranks = [group.ranks]
    group.device = torch.device("meta")
    group.cpu_group = group.device_group = _Ranks(size)
    group.device_communicator = group.mq_broadcaster = None
    group.use_device_communicator = group.use_custom_op_call = False
    group.use_cpu_custom_send_recv = False
    return group
