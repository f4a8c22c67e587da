# SPDX-License-Identifier: Apache-2.0
"""Whether loading filled a layer: each parameter made here counts the elements written into it.

Parameters start as memory of any content, so that one which the files left out, in whole or in
part, would multiply by chance. Values cannot show it: every byte is a legal pair of codes.
"""

from __future__ import annotations

import functools
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.parameter import ModelWeightParameter

from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.compat import versions

_WRITES = (torch.ops.aten.copy_.default, torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)


class _Writes(TorchDispatchMode):
    """Notes which parts of one tensor's memory are written."""

    def __init__(self, tensor: torch.Tensor, parts: set[Any]) -> None:
        super().__init__()
        self._start = tensor.untyped_storage().data_ptr()
        self._parts = parts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WRITES and args[0].untyped_storage().data_ptr() == self._start:
            target = args[0]
            self._parts.add((target.storage_offset(), tuple(target.shape), target.stride()))
        return func(*args, **(kwargs or {}))


def counted(loader: Any) -> Any:
    """The weight loader, which then notes what it writes. Nothing is noted on the meta device."""
    if loader is None or getattr(loader, "nvfp4_counts", False):
        return loader

    @functools.wraps(loader)
    def load(param: Any, *args: Any, **kwargs: Any) -> Any:
        if param.is_meta or not param.numel():
            return loader(param, *args, **kwargs)
        if not hasattr(param, "nvfp4_parts"):
            param.nvfp4_parts = set()
        with _Writes(param.data, param.nvfp4_parts):
            return loader(param, *args, **kwargs)

    load.nvfp4_counts = True  # type: ignore[attr-defined]
    return load


def expect_all(parameter: Any) -> None:
    """Have :func:`check_filled` ask for every element of the parameter."""
    parameter.nvfp4_is_expected = versions.loads_through_parameters()


def check_filled(layer: Any, prefix: str) -> None:
    """Raise CheckpointError for a parameter of the layer that was not filled whole."""
    for name, parameter in layer.named_parameters(recurse=False):
        if not getattr(parameter, "nvfp4_is_expected", False):
            continue
        parts = getattr(parameter, "nvfp4_parts", ())
        num_filled = sum(prod(shape) for _, shape, _ in parts)
        if num_filled < parameter.numel():
            raise CheckpointError(
                "checkpoint",
                f"{prefix}.{name}",
                f"{num_filled} of {parameter.numel()} elements on this rank",
                "all of them: the tensor, or one of a fused layer's, is not in the files under any "
                "name that the model loads",
                "Download the missing files, or quantise the model again.",
            )


def cut_bias(layer: Any, loader: Any) -> None:
    """Have a layer's bias cut by the loader that a model puts in place of its weight's."""
    if (bias := getattr(layer, "bias", None)) is not None:
        bias.weight_loader = loader


class OnlineWeightParameter(ModelWeightParameter):
    """A 16-bit weight without memory whose loading waits until all of the layer is there.

    Some models put a loader of their own in place of the layer's once it is built (Mamba-2 cuts its
    projection by groups). It would write into a tensor without memory, and the layer would be made
    of what the memory held; so whatever is put here waits like the layer's own.
    """

    nvfp4_layer: Any = None

    def _find_loader(self) -> Any:
        if self._weight_loader is None:  # a model deletes it before it puts its own here
            raise AttributeError("weight_loader")
        return counted(self._weight_loader)

    def _put_loader(self, loader: Any) -> None:
        self._weight_loader = loader
        layer = self.nvfp4_layer() if self.nvfp4_layer is not None else None
        is_waiting = getattr(loader, "__name__", "") == versions.ONLINE_LOADER
        if layer is not None and self.is_meta and not is_waiting:
            # Ranks have the parts of the weight, each with its scale, as one rank alone has them.
            if (parts := versions.rows_of_parts(loader)) is not None:
                layer.logical_widths = parts
                cut_bias(layer, loader)
            versions.initialize_online_processing(layer)

    def _delete_loader(self) -> None:
        self._weight_loader: Any = None

    weight_loader = property(_find_loader, _put_loader, _delete_loader)
