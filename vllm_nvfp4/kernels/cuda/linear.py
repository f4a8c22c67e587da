# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: a product on torch's current stream, with the machine code of ``cubins``.

Everything is loaded by :func:`prepare`, which :func:`pack_weight` calls while weights load; a
launch compiles and loads nothing. Importing this file does not initialise CUDA.

CUDA graphs: a launch allocates its outputs and its split-K scratch with torch, whose allocator
keeps what a capture allocates for the graph's own pool; the semaphores are persistent, one set per
stream, in memory that :func:`prepare` takes from the driver. Every launch leaves its semaphores
zero. Two graphs that were captured on one stream share a set, so they must not be replayed at the
same time (torch asks the same of graphs that share a memory pool).
"""

from __future__ import annotations

import ctypes
import struct

import torch

from vllm_nvfp4.kernels.cuda import dispatch
from vllm_nvfp4.kernels.cuda.configs import GemmParams, QuantizeParams
from vllm_nvfp4.kernels.cuda.devices import (
    DTYPE_NAMES,
    INT8_QUANTIZERS,
    QUANTIZERS,
    Device,
    current_stream,
    loaded_device,
    prepare,
)
from vllm_nvfp4.kernels.cuda.dispatch import Choice
from vllm_nvfp4.kernels.cuda.triton import fp8_linear, gather_rows, warm_up_fp8, warm_up_gather
from vllm_nvfp4.kernels.layout import PackedWeight, unpack_weight
from vllm_nvfp4.kernels.layout import pack_weight as reorder_weight
from vllm_nvfp4.numerics.formats import INT8_GROUP, NVFP4
from vllm_nvfp4.numerics.weight import BlockScaledWeight, raise_block_scales

__all__ = [
    "a8_variant",
    "check_activation",
    "fp8_linear",
    "fp8_takes_8_bits",
    "gather_fp8_rows",
    "gather_rows",
    "has_fp8",
    "linear",
    "linear_a8",
    "pack_weight",
    "prepare",
    "quantize",
    "run",
    "run_a8",
    "takes_8_bits",
    "unpack_weight",
    "warm_up_fp8",
    "warm_up_gather",
]

_ACTIVATIONS = {0: "auto", 16: "16", 8: "8"}
# cp.async and the vector loads of the activations move 16 bytes.
_ROW_ALIGNMENT = 16


def pack_weight(weight: BlockScaledWeight) -> PackedWeight:
    """The weight in kernel order, on its own device; loads the kernels that will read it. For the
    variant "folded" its block scales are raised first, so that few are lost to E4M3's subnormals.

    Raises CompileError where no cubin can be had for the device, ValueError for a shape that the
    kernels do not take.
    """
    if weight.codes.is_cuda:
        _, variant = prepare(weight.codes.device, weight.fmt.name).figures
        if variant == "folded" and weight.fmt == NVFP4:
            weight = raise_block_scales(weight)
    return reorder_weight(weight)


def linear(
    a: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, activation_bits: int
) -> torch.Tensor:
    """y[m, n] = sum_k a[m, k] * w[n, k] + bias[n]

    a:               [M, K] bf16 or fp16 on a CUDA device; rows may be strided
    bias:            [N] of a's dtype, or None
    activation_bits: 16; 8 rounds a to E4M3 with one scale per row, or to INT8 with one per row and
                     64 columns, as the variant in force has it; 0 lets the batch size decide
    Returns [M, N] of a's dtype. Sums are formed in float32, in an order that depends on the shape
    alone. Raises ValueError for a dtype, device or shape that does not fit.
    """
    _check_operands("linear", a, a.dtype, packed, bias)
    if activation_bits not in _ACTIVATIONS:
        raise ValueError(f"linear: activation_bits is {activation_bits}; needs 16, 8 or 0 (auto)")
    m, n, k = len(a), packed.num_rows, packed.num_cols
    y = a.new_empty(m, n)  # a tuple would cost half a microsecond more
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


def linear_a8(
    q: torch.Tensor,
    a_scale: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y[m, n] = a_scale[m] * sum_k q[m, k] * w[n, k] + bias[n]

    The 8-bit product of activations that are quantised already (by :func:`quantize`, or by what a
    compiled graph made of numerics' quantize_fp8_per_row).

    q:       [M, K] on a CUDA device: float8_e4m3fn, or int8 where the variant in force is "int8"
    a_scale: [M] or [M, 1] float32; for int8 [M, ceil(K / 64)]
    bias:    [N] of ``dtype``, or None
    dtype:   of the result: bfloat16 or float16
    Returns [M, N]. Raises ValueError for a dtype, device or shape that does not fit.
    """
    m, n, k = q.shape[0], packed.num_rows, packed.num_cols
    num_scales = m * -(-k // INT8_GROUP) if q.dtype == torch.int8 else m
    if (
        q.dtype not in (torch.float8_e4m3fn, torch.int8)
        or a_scale.dtype != torch.float32
        or a_scale.numel() != num_scales
    ):
        raise ValueError(
            f"linear_a8: q is {q.dtype}, a_scale {a_scale.dtype} {list(a_scale.shape)}; needs "
            f"float8_e4m3fn and float32 [{m}], or int8 and float32 [{m}, {-(-k // INT8_GROUP)}]"
        )
    _check_operands("linear_a8", q, dtype, packed, bias)
    y = torch.empty((m, n), dtype=dtype, device=q.device)
    if m == 0:
        return y
    device_idx = q.device.index
    if device_idx != torch.cuda.current_device():
        with torch.cuda.device(device_idx):
            return linear_a8(q, a_scale, packed, bias, dtype)
    device = loaded_device(device_idx, packed.fmt.name)
    choice = device.choose(m, n, k, packed.fmt.name, DTYPE_NAMES[dtype], "8")
    if (choice.config.stem == "gemm_w4i8") != (q.dtype == torch.int8):
        raise ValueError(
            f"linear_a8: q is {q.dtype}, and the variant in force is {device.figures[1]!r}"
        )
    run_a8(device, choice, q, a_scale, packed, bias, y, current_stream(device_idx))
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
    """Launch one choice into y [M, N], contiguous. For tests and benchmarks that pick the kernel
    themselves."""
    a = _aligned_rows(a)
    if choice.activation_bits == 16:
        _launch(device, choice, (a.data_ptr(), a.stride(0), 0), packed, bias, y, stream)
        return
    # One allocation for all scratch memory: partial sums, then q and a_scale.
    m, k = a.shape
    is_int8 = choice.config.stem == "gemm_w4i8"
    num_scales = -(-k // INT8_GROUP) if is_int8 else 1
    scratch = packed.codes.new_empty(choice.workspace_bytes + m * (k + 4 * num_scales))
    partials = scratch.data_ptr()
    q = partials + choice.workspace_bytes
    a_scale = q + m * k  # K is a multiple of 16, so q and a_scale are aligned
    _quantize(device, a, q, a_scale, stream, is_int8)
    _launch(device, choice, (q, k, a_scale), packed, bias, y, stream, partials)


def run_a8(
    device: Device,
    choice: Choice,
    q: torch.Tensor,
    a_scale: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    stream: int,
) -> None:
    """Launch an 8-bit choice on quantised activations into y."""
    q, a_scale = _aligned_rows(q), a_scale.contiguous()
    operand = (q.data_ptr(), q.stride(0), a_scale.data_ptr())
    _launch(device, choice, operand, packed, bias, y, stream)


def _aligned_rows(a: torch.Tensor) -> torch.Tensor:
    """a, or a copy where its rows cannot be read in pieces of 16 bytes."""
    # The usual case first: K is a multiple of 16, so contiguous rows are aligned if the first is.
    if a.is_contiguous() and a.data_ptr() % _ROW_ALIGNMENT == 0:
        return a
    if (
        a.stride(1) != 1
        or a.stride(0) * a.element_size() % _ROW_ALIGNMENT
        or a.data_ptr() % _ROW_ALIGNMENT
    ):
        # Not contiguous(): that returns a contiguous view as it is, wherever it starts.
        return a.clone(memory_format=torch.contiguous_format)
    return a


def _launch(
    device: Device,
    choice: Choice,
    a: tuple[int, int, int],
    packed: PackedWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    stream: int,
    partials: int = 0,
) -> None:
    """a: (address, elements from row to row, address of a_scale or 0); partials: scratch memory of
    choice.workspace_bytes, allocated here unless given."""
    if choice.workspace_bytes and not partials:
        scratch = packed.codes.new_empty(choice.workspace_bytes)
        partials = scratch.data_ptr()
    params = (
        a[0],
        a[2],
        packed.codes.data_ptr(),
        packed.block_scale.data_ptr(),
        packed.global_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        partials if choice.workspace_bytes else 0,
        device.semaphores(stream),
        len(y),
        packed.num_rows,
        packed.num_cols,
        a[1],
        packed.num_rows,  # y is contiguous
        choice.num_splits,
    )
    device.launch(choice.config, choice.grid, stream, _GEMM_LAYOUT, params)


def check_activation(device: torch.device, activation: str) -> None:
    """Raise ValueError where the device cannot do what the option ``activation`` asks for.

    For the time when weights load: a launch would say the same, but only then.
    """
    gpu, variant = prepare(device, "nvfp4").figures
    dispatch.choose_activation_bits(gpu, 1, 64, 64, "nvfp4", activation, variant)


def a8_variant(device: torch.device) -> str:
    """The variant of 8-bit activations in force, "auto" resolved."""
    return loaded_device(device.index, "nvfp4").figures[1]


def takes_8_bits(device: torch.device, m: int, n: int, k: int, fmt_name: str) -> bool:
    """Whether the batch size M, and every larger one, gets 8-bit activations."""
    gpu, variant = loaded_device(device.index, fmt_name).figures
    return dispatch.choose_activation_bits(gpu, m, n, k, fmt_name, "auto", variant) == 8


def has_fp8(device: torch.device) -> bool:
    """Whether the device has FP8 tensor cores; loads what quantises activations for them."""
    return prepare(device, "nvfp4").gpu.fp8_f32_tflops > 0


def fp8_takes_8_bits(device: torch.device, m: int, n: int, k: int) -> bool:
    """Whether the batch size M, and every larger one, meets a weight in FP8 with 8 bits."""
    gpu, _ = loaded_device(device.index, "nvfp4").figures
    return m >= dispatch.fp8_activation_switch(gpu, n, k)


def gather_fp8_rows(
    weight: torch.Tensor, row_scale: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of an FP8 weight by number: row_scale[id] * weight[id].

    weight: [N, K] float8_e4m3fn; row_scale: [N] float32; ids: any shape. Returns [*ids.shape, K].
    """
    rows = ids.reshape(-1).long()
    # Indexing by way of the bits: torch indexes uint8 on every device and architecture.
    values = weight.view(torch.uint8)[rows].view(torch.float8_e4m3fn).float()
    values *= row_scale[rows][:, None]
    return values.to(dtype).view(*ids.shape, weight.shape[1])


def quantize(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q[m, k] = e4m3(a[m, k] / a_scale[m]), a_scale[m] = amax(|a[m]|) / 448 (1 for a row of zeros).

    a: [M, K] bf16 or fp16, K a multiple of 16. Returns q [M, K] float8_e4m3fn and
    a_scale [M] float32. :func:`linear` does this itself, in memory of its own.
    """
    a = _aligned_rows(a)
    q = torch.empty(a.shape, dtype=torch.float8_e4m3fn, device=a.device)
    a_scale = torch.empty(a.shape[0], dtype=torch.float32, device=a.device)
    if a.shape[0]:
        device = loaded_device(a.device.index, "nvfp4")
        stream = current_stream(a.device.index)
        _quantize(device, a, q.data_ptr(), a_scale.data_ptr(), stream)
    return q, a_scale


def _quantize(
    device: Device, a: torch.Tensor, q: int, a_scale: int, stream: int, is_int8: bool = False
) -> None:
    m, k = a.shape
    params = (a.data_ptr(), q, a_scale, m, k, a.stride(0), k)
    quantizers = INT8_QUANTIZERS if is_int8 else QUANTIZERS
    device.launch(quantizers[DTYPE_NAMES[a.dtype]], (m, 1, 1), stream, _QUANTIZE_LAYOUT, params)


# --- arguments -----------------------------------------------------------------------------------

_CODES = {ctypes.c_void_p: "Q", ctypes.c_int32: "i", ctypes.c_float: "f"}


def params_layout(params: type[ctypes.Structure]) -> struct.Struct:
    """The byte layout of a kernel's one argument, so that a launch makes no ctypes object."""
    codes = "".join(_CODES[field[1]] for field in params._fields_)
    padding = ctypes.sizeof(params) - struct.calcsize(codes)
    return struct.Struct(f"{codes}{padding}x")


_GEMM_LAYOUT = params_layout(GemmParams)
_QUANTIZE_LAYOUT = params_layout(QuantizeParams)


def _check_operands(
    name: str,
    a: torch.Tensor,
    dtype: torch.dtype,
    packed: PackedWeight,
    bias: torch.Tensor | None,
) -> None:
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"{name}: a is {dtype}; the CUDA kernels take bfloat16 or float16")
    if a.dim() != 2 or a.shape[1] != packed.num_cols:
        raise ValueError(f"{name}: a is {list(a.shape)}; needs [M, {packed.num_cols}]")
    if a.device != packed.codes.device:
        raise ValueError(f"{name}: a is on {a.device}, the weight on {packed.codes.device}")
    if bias is not None and (bias.dtype != dtype or bias.shape != (packed.num_rows,)):
        raise ValueError(
            f"{name}: bias is {bias.dtype} {list(bias.shape)}; needs {dtype} [{packed.num_rows}]"
        )
    if bias is not None and not bias.is_contiguous():
        raise ValueError(f"{name}: bias is strided; needs to be contiguous")
