# SPDX-License-Identifier: Apache-2.0
"""A GPU for programs, without one: torch's "cuda" tensors lie in this machine's memory, and what is
launched on them runs on the emulated GPU (csrc/host/), from the driver's functions up.

Within :func:`emulated_gpu` a program takes the road that it takes on a GPU: it asks torch for a
CUDA device, has kernels loaded by ``prepare`` and launches them through ``Driver``. What differs
between a GPU and a CPU is kept where a program can be wrong about it:

* A tensor is on the GPU or in the host's memory, and operators refuse to mix them.
* A kernel that no program loaded cannot be launched.
* torch divides by a Python number as CUDA does, by multiplying with its reciprocal.
* Bytes of tensors are counted for each device, now and at their peak.
* Memory of a pool that is put to sleep is gone: what is not restored comes back scrambled.

Not modelled: speed, torch.compile, more than one GPU.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_nvfp4.gpus import Gpu, find_gpu
from vllm_nvfp4.kernels import moe_ops, ops
from vllm_nvfp4.kernels.cuda import cubins, devices
from vllm_nvfp4.kernels.cuda import driver as driver_module
from vllm_nvfp4.kernels.cuda.driver import Driver
from vllm_nvfp4.testing.emulated_runtime import CudaRuntime
from vllm_nvfp4.testing.host_driver import HostLibcuda, image_of, untracked

DEVICE = torch.device("cuda", 0)
_HOST = torch.device("cpu")
_UNWRITTEN = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
# Operators that take tensors of both kinds on a real GPU, too.
_MIXING = ("copy_", "_to_copy", "index", "index_put_", "set_", "_local_scalar_dense", "set_data")


def storage_of(tensor: torch.Tensor) -> Any:
    """The tensor's memory; torch keeps one object for it, with its attributes, while it lives."""
    return torch._C.TensorBase.untyped_storage(tensor)


class EmulatedGpu:
    """What lies on the GPU, and what was done with it.

    gpu:        its figures
    launches:   (kernel, grid), in order
    live_bytes, peak_bytes: of tensors on the GPU
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.launches: list[tuple[str, tuple[int, ...]]] = []
        self.live_bytes = self.peak_bytes = 0
        self.pool: str | None = None  # where new tensors are allocated
        self.capture: list[Callable[[], None]] | None = None
        self.graph_memory: list[Any] = []  # what a capture allocates is its graph's own
        self._storages: dict[int, Any] = {}
        self._asleep: dict[int, torch.Tensor | None] = {}
        self.libcuda = HostLibcuda(self)

    # --- tensors

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on the GPU."""
        return hasattr(storage_of(tensor), "nvfp4_pool")

    def claim(self, found: Any, is_view_of_host: bool = False) -> Any:
        """Put every tensor of a structure on the GPU, as it lies.

        is_view_of_host: for memory of the host that the GPU reads in place: it counts for neither
        """
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and not self.has(tensor):
                self._claim_storage(storage_of(tensor), 0 if is_view_of_host else None)
        return found

    def _claim_storage(self, storage: Any, size: int | None) -> None:
        size = storage.nbytes() if size is None else size
        storage.nvfp4_pool = self.pool
        if self.capture is not None:
            self.graph_memory.append(storage)
        self._storages[storage._cdata] = weakref.ref(storage)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._drop, storage._cdata, size)

    def _drop(self, key: int, size: int) -> None:
        self.live_bytes -= size
        self._storages.pop(key, None)

    def reset_peak(self) -> None:
        self.peak_bytes = self.live_bytes

    def buffers(self) -> list[torch.Tensor]:
        """Every piece of memory on the GPU, as bytes."""
        storages = (reference() for reference in list(self._storages.values()))
        return [
            torch.tensor([], dtype=torch.uint8).set_(storage)
            for storage in storages
            if storage is not None and storage.nbytes()
        ]

    # --- sleep, as vLLM's CuMemAllocator has it

    @contextlib.contextmanager
    def memory_pool(self, tag: str) -> Iterator[None]:
        """Tensors made within it lie in the pool of that name."""
        before, self.pool = self.pool, tag
        try:
            yield
        finally:
            self.pool = before

    def sleep(self, level: int) -> None:
        """Level 1 keeps a copy of the pool "weights"; every other pool, and at level 2 that one
        too, loses what it holds."""
        with untracked():
            for key, reference in self._storages.items():
                storage = reference()
                if storage is None or storage.nvfp4_pool is None:
                    continue
                data = torch.tensor([], dtype=torch.uint8).set_(storage)
                is_kept = level == 1 and storage.nvfp4_pool == "weights"
                self._asleep[key] = data.clone() if is_kept else None

    def wake_up(self) -> None:
        """Memory that was dropped holds what others have left there."""
        with untracked():
            for key, kept in self._asleep.items():
                data = torch.tensor([], dtype=torch.uint8).set_(self._storages[key]())
                data.copy_(kept if kept is not None else torch.full_like(data, 0xA5))
        self._asleep.clear()


class _Dispatch(TorchDispatchMode):
    """Follows which tensors are on the GPU through torch's operators."""

    def __init__(self, gpu: EmulatedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        is_here = [self.gpu.has(t) for t in tensors]
        if not any(is_here):
            return func(*args, **kwargs)
        if name not in _MIXING:
            self._check(func, tensors, is_here)
        out = self._divide(name, args, kwargs) if name in ("div", "div_") else None
        if out is None:
            out = func(*args, **kwargs)
        if name not in ("_to_copy", "copy_") or is_here[0]:
            self.gpu.claim(out)
        if self.gpu.capture is not None and name not in _UNWRITTEN:
            self.gpu.capture.append(lambda: _again(func, args, kwargs, out))
        return out

    def _check(self, func: Any, tensors: list[torch.Tensor], is_here: list[bool]) -> None:
        if any(not here and t.dim() for t, here in zip(tensors, is_here, strict=True)):
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu"
            )

    def _divide(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """x / number as CUDA computes it: x * (1 / number), rounded twice."""
        x, by = args[:2]
        if isinstance(by, torch.Tensor) and (self.gpu.has(by) or by.dim()):
            return None
        is_float = isinstance(x, torch.Tensor) and x.dtype.is_floating_point
        if not is_float or kwargs.get("rounding_mode") is not None:
            return None
        work = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = (x.to(work) * (1.0 / torch.as_tensor(by, dtype=work))).to(x.dtype)
        return x.copy_(y) if name == "div_" else y


def _again(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Run a captured operator; its results go where they went when it was captured."""
    for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)


class _Functions(TorchFunctionMode):
    """What Python sees of a tensor: its device, and the functions that name one."""

    def __init__(self, gpu: EmulatedGpu) -> None:
        super().__init__()
        self.gpu = gpu
        tensor = cast(Any, torch.Tensor)
        self._attributes: dict[Any, Callable[[torch.Tensor], Any]] = {
            tensor.device.__get__: lambda t: DEVICE,
            tensor.is_cuda.__get__: lambda t: True,
            tensor.is_cpu.__get__: lambda t: False,
            tensor.get_device: lambda t: DEVICE.index,
            tensor.cpu: self._to_host,
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._attributes and self.gpu.has(args[0]):
            return self._attributes[func](args[0])
        if func is torch.Tensor.cuda:
            return self._move(args[0], DEVICE)
        if func is torch.Tensor.to:
            return self._to(args, kwargs)
        if (own := _own_op(func)) is not None:
            with self:
                return own(*args, **kwargs)
        if func is torch.Tensor.pin_memory:
            return args[0]
        kwargs.pop("pin_memory", None)
        if "device" not in kwargs or kwargs["device"] is None:
            return func(*args, **kwargs)
        device = torch.device(kwargs.pop("device"))
        if device.type != "cuda":
            with untracked() if self._holds_gpu(args) else contextlib.nullcontext():
                return func(*args, device=device, **kwargs)
        return self.gpu.claim(func(*args, device=_HOST, **kwargs))

    def _holds_gpu(self, args: tuple[Any, ...]) -> bool:
        return any(isinstance(a, torch.Tensor) and self.gpu.has(a) for a in args)

    def _to(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, rest = args[0], list(args[1:])
        device = kwargs.pop("device", None)
        if rest and isinstance(rest[0], str | int | torch.device):
            device = rest.pop(0)
        elif rest and isinstance(rest[0], torch.Tensor):
            other = rest.pop(0)
            device = DEVICE if self.gpu.has(other) else other.device
            kwargs["dtype"] = other.dtype
        if isinstance(device, int):
            device = torch.device("cuda", device)
        if rest or kwargs:
            x = torch.Tensor.to(x, *rest, **kwargs)
        return x if device is None else self._move(x, torch.device(device))

    def _move(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        if device.type == "cpu":
            return self._to_host(x) if self.gpu.has(x) else x
        if device.type != "cuda" or self.gpu.has(x):
            return x if device.type == "cuda" else torch.Tensor.to(x, device)
        with untracked():
            return self.gpu.claim(x.detach().clone())

    def _to_host(self, x: torch.Tensor) -> torch.Tensor:
        with untracked():
            return x.detach().clone()


def _own_op(func: Any) -> Callable[..., Any] | None:
    """The Python function of an op of this package: it looks at devices itself."""
    name = getattr(func, "_qualified_op_name", "") or getattr(func, "_name", "")
    space, _, name = str(name).partition("::")
    if space != "vllm_nvfp4":
        return None
    name = name.split(".")[0]
    return getattr(ops, name, None) or getattr(moe_ops, name)


@contextlib.contextmanager
def emulated_gpu(name: str = "RTX 4090") -> Iterator[EmulatedGpu]:
    """A machine with one GPU, for the code within. name: of a card in gpus.py

    Kernels that were loaded before are forgotten, and those of within afterwards.
    """
    figures = find_gpu(name)
    if figures is None:
        raise ValueError(f"{name} is not in the table of GPUs")
    gpu = EmulatedGpu(figures)

    def prepare(wanted: Sequence[Any], arch: int) -> dict[str, bytes]:
        return {config.symbol: image_of(config.symbol) for config in wanted}

    loaded: dict[int, Any] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(CudaRuntime(gpu).installed())
        stack.enter_context(mock.patch.object(cubins, "prepare", prepare))
        opened = Driver(gpu.libcuda)
        stack.enter_context(mock.patch.object(devices, "driver", return_value=opened))
        stack.enter_context(mock.patch.object(driver_module, "driver", return_value=opened))
        stack.enter_context(mock.patch.object(devices, "_devices", loaded))
        stack.enter_context(_Dispatch(gpu))
        stack.enter_context(_Functions(gpu))
        yield gpu
