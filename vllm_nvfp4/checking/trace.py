# SPDX-License-Identifier: Apache-2.0
"""A load without data: which stored tensor is written into which parameter, and how much of it.

Stored tensors are stand-ins on the meta device, which have a shape and a type and no memory, and so
are the parameters. The model's own code loads them. What it makes of a tensor (a part, another
type, a stack) is known by its storage, so that names play no part.
"""

from __future__ import annotations

from collections import defaultdict
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_nvfp4.compat.meta_model import ITEM, run_op

Region = tuple[int, tuple[int, ...], tuple[int, ...]]


class LoadTrace(TorchDispatchMode):
    """Follows stored tensors through the operations of a load.

    written: storage of a tensor -> the parts of it that were written, as offset, shape and strides
    used:    names of the stored tensors that were written somewhere, or whose value was asked for
    read:    stored tensor -> the parts of it that something was made of
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[int, set[Region]] = defaultdict(set)
        self.used: set[str] = set()
        self.read: dict[str, set[Region]] = defaultdict(set)
        self._names: dict[int, str] = {}
        self._origins: dict[int, frozenset[str]] = {}
        self._alive: list[Any] = []  # a storage's address names it for as long as it lives

    def stand_in(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor that stands for the stored one of this name."""
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        self._names[_storage(tensor)] = name
        self._remember(tensor, frozenset((name,)))
        return tensor

    def origins(self, tensor: torch.Tensor) -> frozenset[str]:
        """The stored tensors that this one was made of."""
        return self._origins.get(_storage(tensor), frozenset())

    def parts(self, tensor: torch.Tensor) -> set[Region]:
        """The parts of the tensor's storage that were written."""
        return self.written.get(_storage(tensor), set())

    def _remember(self, tensor: torch.Tensor, origins: frozenset[str]) -> None:
        self._alive.append(tensor)
        key = _storage(tensor)
        self._origins[key] = self._origins.get(key, frozenset()) | origins

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        origins = frozenset().union(*(self.origins(t) for t in tensors))
        if func is ITEM:
            self.used |= origins
            return run_op(func, args, kwargs)
        if func._schema.is_mutable:
            target = next((t for t in (kwargs.get("out"), *args) if _is_tensor(t)), None)
            if target is not None:
                self._note_write(target, origins)
        result = run_op(func, args, kwargs)
        if origins:
            self._note_reads(tensors, result)
            for made in tree_leaves(result):
                if isinstance(made, torch.Tensor):
                    self._remember(made, origins)
        return result

    def _note_reads(self, tensors: list[torch.Tensor], result: Any) -> None:
        """A view is no read yet."""
        made = {_storage(t) for t in tree_leaves(result) if _is_tensor(t)}
        for tensor in tensors:
            name = self._names.get(_storage(tensor))
            if name is not None and _storage(tensor) not in made:
                self.read[name].add(_region(tensor))

    def _note_write(self, target: torch.Tensor, origins: frozenset[str]) -> None:
        self._alive.append(target)
        self.written[_storage(target)].add(_region(target))
        self.used |= origins


def num_elements(parts: set[Region]) -> int:
    """Elements of parts that do not overlap."""
    return sum(prod(shape) for _, shape, _ in parts)


def _region(tensor: torch.Tensor) -> Region:
    return int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
