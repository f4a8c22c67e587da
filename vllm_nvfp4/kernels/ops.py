# SPDX-License-Identifier: Apache-2.0
"""The only door to the kernels: torch.library ops with CPU, CUDA and fake implementations.

vLLM's layers call ``torch.ops.vllm_nvfp4.*``; torch.compile sees them as opaque nodes with known
output shapes. Which kernel answers is decided by the device of the activations.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from vllm_nvfp4.layout import PackedWeight
from vllm_nvfp4.numerics.formats import FORMATS
from vllm_nvfp4.options import Options

_LIBRARY = torch.library.Library("vllm_nvfp4", "DEF")
_LIBRARY.define(
    "linear(Tensor a, Tensor codes, Tensor block_scale, Tensor global_scale, Tensor? bias, "
    "int num_rows, int num_cols, str fmt, int activation_bits) -> Tensor"
)
_LIBRARY.define("fp8_linear(Tensor a, Tensor weight, Tensor row_scale, Tensor? bias) -> Tensor")
_LIBRARY.define(
    "gather_rows(Tensor ids, Tensor codes, Tensor block_scale, Tensor global_scale, "
    "int num_rows, int num_cols, str fmt, ScalarType dtype) -> Tensor"
)


@functools.cache
def backend(device_type: str) -> ModuleType:
    """The kernel module of a device: ``kernels.cpu`` or ``kernels.cuda``."""
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"vllm_nvfp4: there are kernels for cpu and cuda, not for {device_type}")
    return importlib.import_module(f"vllm_nvfp4.kernels.{device_type}")


def configure(options: Options) -> None:
    """Hand the options that concern CUDA kernels to them, before weights load."""
    from vllm_nvfp4.kernels import cubins, devices

    if "cache_dir" in options.non_default():
        cubins.use_cache_dir(options.cache_dir)
    devices.use_variant("f16_partials" if options.a8_partials == "f16" else "exact")


def check_activation(device: torch.device, activation: str) -> None:
    """Raise ValueError where the device cannot do what the option ``activation`` asks for."""
    if device.type == "cuda":
        backend("cuda").check_activation(device, activation)


def describe_path(device_type: str, is_fp8: bool, activation_bits: int) -> str:
    """In a few words, for the log and ``doctor``: which kernel runs a layer on this device."""
    if device_type == "cpu":
        return "CPU kernel, W8A16" if is_fp8 else f"CPU kernel, W4A{activation_bits or 16}"
    if is_fp8:
        return "Triton kernel, W8A16"
    by_size = "W4A16 or W4A8 by the batch size"
    return f"CUDA kernel, {f'W4A{activation_bits}' if activation_bits else by_size}"


def linear(
    a: torch.Tensor,
    codes: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    bias: torch.Tensor | None,
    num_rows: int,
    num_cols: int,
    fmt: str,
    activation_bits: int,
) -> torch.Tensor:
    """y[..., n] = sum_k a[..., k] * w[n, k] + bias[n], w microscaled and in kernel order.

    a:            [..., K] bf16 or fp16 (float32 on the CPU)
    codes, block_scale, global_scale, num_rows (N), num_cols (K), fmt: the fields of PackedWeight
    bias:         [N] of a's dtype, or None
    activation_bits: 16, 8, or 0 to let the kernel dispatch decide by the batch size
    Returns [..., N] of a's dtype; sums are formed in float32.
    """
    if a.shape[-1] != num_cols:
        raise ValueError(f"vllm_nvfp4.linear: a has K={a.shape[-1]}, the weight has K={num_cols}")
    packed = PackedWeight(codes, block_scale, global_scale, num_rows, num_cols, FORMATS[fmt])
    if a.device.type == "cpu":
        activation_bits = activation_bits or 16
    y = backend(a.device.type).linear(a.reshape(-1, num_cols), packed, bias, activation_bits)
    return y.view(*a.shape[:-1], num_rows)


def fp8_linear(
    a: torch.Tensor, weight: torch.Tensor, row_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """y[..., n] = row_scale[n] * sum_k a[..., k] * weight[n, k] + bias[n].

    a: [..., K] bf16 or fp16 (float32 on the CPU); weight: [N, K] float8_e4m3fn; row_scale: [N] f32.
    """
    y = backend(a.device.type).fp8_linear(a.reshape(-1, a.shape[-1]), weight, row_scale, bias)
    return y.view(*a.shape[:-1], weight.shape[0])


def gather_rows(
    ids: torch.Tensor,
    codes: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    num_rows: int,
    num_cols: int,
    fmt: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y[..., :] = w[ids[...], :], dequantised to ``dtype``. ids: integer, each in [0, N)."""
    packed = PackedWeight(codes, block_scale, global_scale, num_rows, num_cols, FORMATS[fmt])
    rows = backend(ids.device.type).gather_rows(packed, ids.reshape(-1), dtype)
    return rows.view(*ids.shape, num_cols)


def _fake_linear(a, codes, block_scale, global_scale, bias, num_rows, num_cols, fmt, bits):
    return a.new_empty(*a.shape[:-1], num_rows)


def _fake_fp8_linear(a, weight, row_scale, bias):
    return a.new_empty(*a.shape[:-1], weight.shape[0])


def _fake_gather_rows(ids, codes, block_scale, global_scale, num_rows, num_cols, fmt, dtype):
    return torch.empty(*ids.shape, num_cols, dtype=dtype, device=ids.device)


for _name, _implementation, _fake in (
    ("linear", linear, _fake_linear),
    ("fp8_linear", fp8_linear, _fake_fp8_linear),
    ("gather_rows", gather_rows, _fake_gather_rows),
):
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _implementation, _key)
    torch.library.register_fake(f"vllm_nvfp4::{_name}", _fake, lib=_LIBRARY)
