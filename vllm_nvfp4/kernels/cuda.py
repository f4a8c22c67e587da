# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: a product on torch's current stream, with the machine code of ``cubins``.

Everything is loaded by :func:`prepare`, which :func:`pack_weight` calls while weights load; a
launch compiles and loads nothing. Importing this file does not initialise CUDA.

CUDA graphs: a launch allocates its outputs and its split-K scratch with torch, whose allocator
keeps what a capture allocates for the graph's own pool; the semaphores are persistent, one set per
stream, allocated by :func:`prepare`. Every launch leaves its semaphores zero. Two graphs that were
captured on one stream share a set, so they must not be replayed at the same time (torch asks the
same of graphs that share a memory pool).
"""

from __future__ import annotations

import ctypes
import struct

import torch

from vllm_nvfp4.kernels.configs import GemmParams, QuantizeParams
from vllm_nvfp4.kernels.devices import (
    DTYPE_NAMES,
    QUANTIZERS,
    Device,
    current_stream,
    loaded_device,
    prepare,
)
from vllm_nvfp4.kernels.dispatch import Choice
from vllm_nvfp4.kernels.triton import fp8_linear, gather_rows
from vllm_nvfp4.layout import PackedWeight, unpack_weight
from vllm_nvfp4.layout import pack_weight as reorder_weight
from vllm_nvfp4.numerics.weight import BlockScaledWeight

__all__ = [
    "fp8_linear",
    "gather_rows",
    "linear",
    "pack_weight",
    "prepare",
    "quantize",
    "run",
    "unpack_weight",
]

_ACTIVATIONS = {0: "auto", 16: "16", 8: "8"}
# cp.async and the vector loads of the activations move 16 bytes.
_ROW_ALIGNMENT = 16


def pack_weight(weight: BlockScaledWeight) -> PackedWeight:
    """The weight in kernel order, on its own device; loads the kernels that will read it.

    Raises CompileError where no cubin can be had for the device, ValueError for a shape that the
    kernels do not take.
    """
    if weight.codes.is_cuda:
        prepare(weight.codes.device, weight.fmt.name)
    return reorder_weight(weight)


def linear(
    a: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, activation_bits: int
) -> torch.Tensor:
    """y[m, n] = sum_k a[m, k] * w[n, k] + bias[n]

    a:               [M, K] bf16 or fp16 on a CUDA device; rows may be strided
    bias:            [N] of a's dtype, or None
    activation_bits: 16; 8 rounds a to E4M3 with one scale per row; 0 lets the batch size decide
    Returns [M, N] of a's dtype. Sums are formed in float32, in an order that depends on the shape
    alone. Raises ValueError for a dtype, device or shape that does not fit.
    """
    _check_operands(a, packed, bias, activation_bits)
    m, n, k = a.shape[0], packed.num_rows, packed.num_cols
    y = torch.empty((m, n), dtype=a.dtype, device=a.device)
    if m == 0:
        return y
    dtype, activation = DTYPE_NAMES[a.dtype], _ACTIVATIONS[activation_bits]
    device_idx = a.device.index
    if device_idx != torch.cuda.current_device():
        with torch.cuda.device(device_idx):
            return linear(a, packed, bias, activation_bits)
    device = loaded_device(device_idx, packed.fmt.name)
    choice = device.choose(m, n, k, packed.fmt.name, dtype, activation)
    run(device, choice, a, packed, bias, y, current_stream(device_idx))
    return y


def run(
    device: Device,
    choice: Choice,
    a: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    stream: int,
) -> None:
    """Launch one choice into y. For tests and benchmarks that pick the kernel themselves."""
    if (
        a.stride(1) != 1
        or a.stride(0) * a.element_size() % _ROW_ALIGNMENT
        or (a.data_ptr() % _ROW_ALIGNMENT)
    ):
        a = a.contiguous()
    a_scale = None
    if choice.activation_bits == 8:
        a, a_scale = quantize(device, a, stream)
    partials = None
    if choice.workspace_bytes:
        partials = torch.empty(choice.workspace_bytes, dtype=torch.uint8, device=a.device)
    params = (
        a.data_ptr(),
        0 if a_scale is None else a_scale.data_ptr(),
        packed.codes.data_ptr(),
        packed.block_scale.data_ptr(),
        packed.global_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        0 if partials is None else partials.data_ptr(),
        device.semaphores(stream),
        a.shape[0],
        packed.num_rows,
        packed.num_cols,
        a.stride(0),
        y.stride(0),
        choice.num_splits,
    )
    device.launch(choice.config, choice.grid, stream, _GEMM_LAYOUT, params)


def quantize(device: Device, a: torch.Tensor, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
    """q[m, k] = e4m3(a[m, k] / a_scale[m]), a_scale[m] = amax(|a[m]|) / 448 (1 for a row of zeros).

    a: [M, K] bf16 or fp16, rows 16-byte aligned. Returns q [M, K] float8_e4m3fn, a_scale [M] f32.
    """
    m, k = a.shape
    # Rows of q are read in 16-byte pieces; K is a multiple of 16, so that K bytes are aligned.
    q = torch.empty((m, k), dtype=torch.float8_e4m3fn, device=a.device)
    a_scale = torch.empty(m, dtype=torch.float32, device=a.device)
    config = QUANTIZERS[DTYPE_NAMES[a.dtype]]
    params = (a.data_ptr(), q.data_ptr(), a_scale.data_ptr(), m, k, a.stride(0), q.stride(0))
    device.launch(config, (m, 1, 1), stream, _QUANTIZE_LAYOUT, params)
    return q, a_scale


# --- arguments -----------------------------------------------------------------------------------

_CODES = {ctypes.c_void_p: "Q", ctypes.c_int32: "i"}


def params_layout(params: type[ctypes.Structure]) -> struct.Struct:
    """The byte layout of a kernel's one argument, so that a launch makes no ctypes object."""
    codes = "".join(_CODES[field[1]] for field in params._fields_)
    padding = ctypes.sizeof(params) - struct.calcsize(codes)
    return struct.Struct(f"{codes}{padding}x")


_GEMM_LAYOUT = params_layout(GemmParams)
_QUANTIZE_LAYOUT = params_layout(QuantizeParams)


def _check_operands(
    a: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, activation_bits: int
) -> None:
    if a.dtype not in DTYPE_NAMES:
        raise ValueError(f"linear: a is {a.dtype}; the CUDA kernels take bfloat16 or float16")
    if a.dim() != 2 or a.shape[1] != packed.num_cols:
        raise ValueError(f"linear: a is {list(a.shape)}; needs [M, {packed.num_cols}]")
    if a.device != packed.codes.device:
        raise ValueError(f"linear: a is on {a.device}, the weight on {packed.codes.device}")
    if activation_bits not in _ACTIVATIONS:
        raise ValueError(f"linear: activation_bits is {activation_bits}; needs 16, 8 or 0 (auto)")
    if bias is not None and (bias.dtype != a.dtype or bias.shape != (packed.num_rows,)):
        raise ValueError(
            f"linear: bias is {bias.dtype} {list(bias.shape)}; needs {a.dtype} [{packed.num_rows}]"
        )
    if bias is not None and not bias.is_contiguous():
        raise ValueError("linear: bias is strided; needs to be contiguous")
