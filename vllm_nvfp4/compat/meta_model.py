# SPDX-License-Identifier: Apache-2.0
"""vLLM's model on the meta device, as the first rank of an engine would build it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from vllm_nvfp4.compat import versions
from vllm_nvfp4.compat.first_rank import first_of_many

_aten = torch.ops.aten
_COPY = _aten.copy_.default
_TO = _aten._to_copy.default
ITEM = _aten._local_scalar_dense.default

_COUNTS = (torch.int32, torch.int64, torch.bool)


@contextlib.contextmanager
def frame_of(config: Any) -> Iterator[None]:
    """What :func:`build_model` of a vLLM config, and a load into the model, are called in."""
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(config), first_of_many(config.parallel_config):
        yield


def build_model(config: Any, model_config: Any = None) -> Any:
    """The model of a vLLM config, or of another model's config within it, as a draft's."""
    from vllm.model_executor.model_loader import base_loader

    versions.forget_layers(config)
    with meta_device((model_config or config.model_config).dtype), _OneDevice():
        # Of the loader: see compat.model_weights.
        return base_loader.initialize_model(config, model_config=model_config)


@contextlib.contextmanager
def meta_device(dtype: torch.dtype) -> Iterator[None]:
    """As vLLM's loader sets torch up, but without memory; nothing is quantised while it loads."""
    before = torch.get_default_dtype()
    initialize = versions.initialize_online_processing
    versions.initialize_online_processing = lambda layer: None
    torch.set_default_dtype(dtype)
    try:
        with _WithoutMemory():
            yield
    finally:
        torch.set_default_dtype(before)
        versions.initialize_online_processing = initialize


class _WithoutMemory(TorchFunctionMode):
    """Puts new tensors on the meta device. Tables of whole numbers keep their values: a model asks
    them which experts are here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None:
            is_table = kwargs.get("dtype") in _COUNTS
            kwargs = {**kwargs, "device": "cpu" if is_table else "meta"}
        return func(*args, **kwargs)


class _OneDevice(TorchDispatchMode):
    """Lets tensors with and without memory meet: what comes out has none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_op(func, args, kwargs or {})


def run_op(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation, with all of its tensors on the meta device where one of them is."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if func is ITEM and args[0].is_meta:
        return _some_value(args[0])
    if not any(t.is_meta for t in tensors) or all(t.is_meta for t in tensors):
        if func is _TO and tensors[0].is_meta:
            kwargs = {**kwargs, "device": torch.device("meta")}
        return func(*args, **kwargs)
    if func is _COPY:
        if args[0].is_meta:
            return func(*args, **kwargs)
        torch.broadcast_shapes(args[0].shape, args[1].shape)
        return args[0]

    def to_meta(value: Any) -> Any:
        is_data = isinstance(value, torch.Tensor) and not value.is_meta
        return torch.empty_like(value, device="meta") if is_data else value

    return func(*tree_map(to_meta, args), **tree_map(to_meta, kwargs))


def _some_value(tensor: torch.Tensor) -> Any:
    """In place of a value that is not read: no question about values is answered by yes."""
    if tensor.dtype is torch.bool:
        return False
    return 1.0 if tensor.is_floating_point() else 1
