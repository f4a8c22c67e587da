# SPDX-License-Identifier: Apache-2.0
"""A GPU's place taken by the emulated one: kernels.cuda_moe runs as it does on a GPU, above the
driver; only the launch itself goes to csrc/host/."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_nvfp4.gpus import find_gpu
from vllm_nvfp4.kernels import layout, moe_ops, ops
from vllm_nvfp4.kernels.cuda import moe as cuda_moe
from vllm_nvfp4.layers import experts as moe
from vllm_nvfp4.layers import weights
from vllm_nvfp4.testing.host_driver import emulate


class EmulatedDevice(TorchDispatchMode):
    """A Device whose launches run on the emulated GPU, with every tensor that torch has made."""

    gpu: Any = find_gpu("RTX 4090")
    variant = "exact"

    @property
    def figures(self) -> tuple[Any, str]:
        return self.gpu, self.variant

    def __init__(self, *tensors: torch.Tensor | None) -> None:
        super().__init__()
        self.tensors = [t for t in tensors if t is not None]
        self.launches: list[tuple[str, tuple[int, int, int]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.tensors += [t for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
        return made

    def launch(self, config, grid, stream, layout: struct.Struct, params) -> None:
        self.launches.append((config.symbol, grid))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in self.tensors}
        pieces = [torch.tensor([], dtype=torch.uint8).set_(s) for s in storages.values()]
        emulate(config.symbol, grid, layout.pack(*params), pieces)


@contextmanager
def emulated_experts() -> Iterator[list[str]]:
    """Within it, routed experts on the CPU are packed and multiplied as on a GPU.

    Yields the kernels launched so far.
    """
    launched: list[str] = []
    attach, steps = weights.attach_experts, (cuda_moe.run, cuda_moe.run_rows)

    def attach_as_on_a_gpu(*args: Any) -> None:
        with mock.patch.object(ops, "backend", return_value=layout):
            attach(*args)

    def emulated(step: Any) -> Any:
        def run(device: Any, stream: int, *args: Any) -> torch.Tensor:
            found = EmulatedDevice(*tensors_in(args))
            with found:
                y: torch.Tensor = step(found, stream, *args)
            launched.extend(symbol for symbol, _ in found.launches)
            return y

        return run

    with (
        mock.patch.object(moe, "attach_experts", attach_as_on_a_gpu),
        mock.patch.object(moe_ops, "experts_backend", return_value=cuda_moe),
        mock.patch.object(cuda_moe, "loaded_device", return_value=None),
        mock.patch.object(cuda_moe, "current_stream", return_value=0),
        mock.patch.object(torch.cuda, "current_device", return_value=None),
        mock.patch.object(cuda_moe, "run", emulated(steps[0])),
        mock.patch.object(cuda_moe, "run_rows", emulated(steps[1])),
    ):
        yield launched


def tensors_in(found: Any) -> list[torch.Tensor]:
    """The tensors among arguments, those of packed weights too."""
    if isinstance(found, layout.PackedWeight):
        return [found.codes, found.block_scale, found.global_scale]
    if isinstance(found, tuple | list):
        return [tensor for item in found for tensor in tensors_in(item)]
    return [found] if isinstance(found, torch.Tensor) else []
