# SPDX-License-Identifier: Apache-2.0
"""The door to the kernels: torch.library ops with CPU, CUDA and fake implementations. Those of
routed experts are in moe_ops.py.

vLLM's layers call ``torch.ops.vllm_nvfp4.*``; torch.compile sees them as opaque nodes with known
output shapes. Which kernel answers is decided by the device of the activations.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from vllm_nvfp4.kernels.layout import PackedWeight
from vllm_nvfp4.numerics.formats import FORMATS
from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row, quantize_int8_per_group
from vllm_nvfp4.options import Options

# Under vLLM's logger, so that its handlers print it.
logger = logging.getLogger(f"vllm.{__name__}")

# Batch sizes at which torch's FP8 product is tried: the library chooses its kernel by them.
_TRIED_TOKENS = (1, 16, 32, 64, 128, 256, 512)

LIBRARY = torch.library.Library("vllm_nvfp4", "DEF")
LIBRARY.define(
    "linear(Tensor a, Tensor codes, Tensor block_scale, Tensor global_scale, Tensor? bias, "
    "int num_rows, int num_cols, str fmt, int activation_bits) -> Tensor"
)
LIBRARY.define(
    "linear_a8(Tensor q, Tensor a_scale, Tensor codes, Tensor block_scale, Tensor global_scale, "
    "Tensor? bias, int num_rows, int num_cols, str fmt, ScalarType dtype) -> Tensor"
)
LIBRARY.define(
    "fp8_linear(Tensor a, Tensor weight, Tensor row_scale, Tensor? bias, int activation_bits) "
    "-> Tensor"
)
LIBRARY.define(
    "gather_rows(Tensor ids, Tensor codes, Tensor block_scale, Tensor global_scale, "
    "int num_rows, int num_cols, str fmt, ScalarType dtype) -> Tensor"
)
LIBRARY.define(
    "gather_fp8_rows(Tensor ids, Tensor weight, Tensor row_scale, ScalarType dtype) -> Tensor"
)


def register(name: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Give a defined op its implementation for CPU and CUDA, and the one for shapes alone."""
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"vllm_nvfp4::{name}", fake, lib=LIBRARY)


@functools.cache
def backend(device_type: str, layer: str = "linear") -> ModuleType:
    """The kernel module of a device for a kind of layer: ``kernels.cpu.linear`` and its like."""
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"vllm_nvfp4: there are kernels for cpu and cuda, not for {device_type}")
    return importlib.import_module(f"vllm_nvfp4.kernels.{device_type}.{layer}")


def configure(options: Options, device_type: str) -> None:
    """Hand the options that concern a device's kernels to them, before weights load."""
    if device_type == "cpu":
        backend("cpu").use_variant(options.a8_variant)
        return
    from vllm_nvfp4.kernels.cuda import cubins, devices

    if "cache_dir" in options.non_default():
        cubins.use_cache_dir(options.cache_dir)
    devices.use_variant(options.a8_variant)


def warm_up(device: torch.device, fmt: str, activation_bits: int) -> None:
    """Compile the CPU kernels of a format for torch's default type, at load time.

    CUDA kernels are loaded by ``pack_weight``.
    """
    if device.type == "cpu":
        dtype = torch.get_default_dtype()
        kernels = backend("cpu")
        variant = kernels.a8_variant(device)
        kernels.warm_up(FORMATS[fmt], dtype, activation_bits or 16, variant)


def warm_up_fp8(weight: torch.Tensor, row_scale: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Compile what :func:`fp8_linear` needs for a layer and torch's default type, at load time."""
    dtype = torch.get_default_dtype()
    if weight.device.type == "cpu":
        backend("cpu").warm_up_fp8(dtype)
    else:
        backend("cuda").warm_up_fp8(weight, row_scale, bias, dtype)


def warm_up_gather(packed: PackedWeight, dtype: torch.dtype) -> None:
    """Compile what :func:`gather_rows` needs for an embedding, at load time."""
    if packed.codes.device.type == "cuda":
        backend("cuda").warm_up_gather(packed, dtype)


def check_activation(device: torch.device, activation: str) -> None:
    """Raise ValueError where the device cannot do what the option ``activation`` asks for."""
    if device.type == "cuda":
        backend("cuda").check_activation(device, activation)


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
    packed = PackedWeight(codes, block_scale, global_scale, num_rows, num_cols, FORMATS[fmt])
    return multiply(a, packed, bias, activation_bits)


def multiply(
    a: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, activation_bits: int
) -> torch.Tensor:
    """:func:`linear` for eager mode, where the dispatcher of torch.ops costs 4 us of a call."""
    if a.is_cpu:
        activation_bits = activation_bits or 16
    product = backend(a.device.type).linear
    if a.dim() == 2:  # vLLM's case; a reshape and a view cost as much as a small product
        return product(a, packed, bias, activation_bits)
    k = packed.num_cols
    if a.shape[-1] != k:
        raise ValueError(f"vllm_nvfp4.linear: a has K={a.shape[-1]}, the weight has K={k}")
    y = product(a.reshape(-1, k), packed, bias, activation_bits)
    return y.view(*a.shape[:-1], packed.num_rows)


def linear_a8(
    q: torch.Tensor,
    a_scale: torch.Tensor,
    codes: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    bias: torch.Tensor | None,
    num_rows: int,
    num_cols: int,
    fmt: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y[..., n] = a_scale[...] * sum_k q[..., k] * w[n, k] + bias[n]

    :func:`linear` with 8-bit activations that are quantised already. A compiled graph takes it in
    the place of ``linear`` (fusion.py), so that what computes the activations quantises them.

    q, a_scale: of the :func:`activation_quantizer`: [..., K] float8_e4m3fn and [..., 1] float32,
             one scale per token; or [..., K] int8 and [..., ceil(K / 64)] float32
    dtype:   of the result and of bias
    Other arguments as in :func:`linear`. Returns [..., N].
    """
    packed = PackedWeight(codes, block_scale, global_scale, num_rows, num_cols, FORMATS[fmt])
    product = backend(q.device.type).linear_a8
    scales = a_scale.reshape(-1, a_scale.shape[-1])
    y = product(q.reshape(-1, num_cols), scales, packed, bias, dtype)
    return y.view(*q.shape[:-1], num_rows)


def activation_quantizer(
    device: torch.device,
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """numerics' rule by which :func:`linear` rounds activations to 8 bits on a device."""
    is_int8 = backend(device.type).a8_variant(device) == "int8"
    return quantize_int8_per_group if is_int8 else quantize_fp8_per_row


def takes_8_bits(
    device: torch.device,
    num_tokens: int,
    num_rows: int,
    num_cols: int,
    fmt: str,
    activation_bits: int,
) -> bool:
    """Whether :func:`linear` rounds that many tokens to 8 bits, and more tokens as well."""
    if activation_bits or device.type == "cpu":
        return activation_bits == 8
    return backend("cuda").takes_8_bits(device, num_tokens, num_rows, num_cols, fmt)


def fp8_linear(
    a: torch.Tensor,
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation_bits: int,
) -> torch.Tensor:
    """y[..., n] = row_scale[n] * sum_k a[..., k] * weight[n, k] + bias[n].

    a: [..., K] bf16 or fp16 (float32 on the CPU); weight: [N, K] float8_e4m3fn; row_scale: [N] f32.
    activation_bits: of :func:`fp8_activation_bits`: 16; 8 rounds a to E4M3 with one scale per
    token; 0 lets the batch size decide
    """
    flat = a.reshape(-1, a.shape[-1])
    n, k = weight.shape
    if len(flat) and fp8_takes_8_bits(a.device, len(flat), n, k, activation_bits):
        q, a_scale = backend(a.device.type).quantize(flat)
        y = multiply_fp8_a8(q, a_scale.view(-1, 1), weight, row_scale, bias, a.dtype)
    else:
        y = backend(a.device.type).fp8_linear(flat, weight, row_scale, bias)
    return y.view(*a.shape[:-1], n)


def multiply_fp8_a8(
    q: torch.Tensor,
    a_scale: torch.Tensor,
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y[m, n] = a_scale[m] * row_scale[n] * sum_k q[m, k] * weight[n, k] + bias[n]

    By torch's library product, which uses FP8 tensor cores from sm_89 on.

    q: [M, K] float8_e4m3fn; a_scale: [M, 1] float32; dtype: of the result and of bias
    """
    return torch._scaled_mm(
        q, weight.t(), scale_a=a_scale, scale_b=row_scale.view(1, -1), bias=bias, out_dtype=dtype
    )


def fp8_activation_bits(weight: torch.Tensor, dtype: torch.dtype, wanted: int) -> int:
    """How :func:`fp8_linear` is to take a layer's activations: ``wanted``, or 16 where the device,
    the shape or torch's library can do no other. For the time when weights load: it may multiply.

    weight: [N, K] float8_e4m3fn, on its device; dtype: of the activations
    wanted: 16, 8 or 0, what the checkpoint and the option ``activation`` ask for
    """
    if wanted == 16 or weight.device.type != "cuda":
        return 16
    # With scales per token and row, torch's product gives bf16 alone.
    can_do = dtype == torch.bfloat16 and not any(size % 16 for size in weight.shape)
    if not can_do or not backend("cuda").has_fp8(weight.device):
        return 16
    n, k = weight.shape
    refusal = _refusals.get(key := (weight.device, n, k, wanted))
    if refusal is None:
        refusal = _refusals[key] = library_refusal(weight, dtype, wanted)
        if refusal:
            logger.warning("nvfp4: FP8 layers of [%d, %d] run in W8A16: %s", n, k, refusal)
    return 16 if refusal else wanted


_refusals: dict[tuple[torch.device, int, int, int], str] = {}


def library_refusal(weight: torch.Tensor, dtype: torch.dtype, activation_bits: int) -> str:
    """What torch's product with 8-bit activations says for this weight, empty where it runs.

    On some GPUs cuBLASLt has no kernel for scales per row and few tokens. Tried with and without
    a bias, at batch sizes that :func:`fp8_linear` would give it.
    """
    n, k = weight.shape
    row_scale = weight.new_ones(n, dtype=torch.float32)
    bias = weight.new_zeros(n, dtype=dtype)
    for m in _TRIED_TOKENS:
        if not fp8_takes_8_bits(weight.device, m, n, k, activation_bits):
            continue
        q, a_scale = weight.new_zeros(m, k), weight.new_ones(m, 1, dtype=torch.float32)
        try:
            for maybe_bias in (None, bias):
                multiply_fp8_a8(q, a_scale, weight, row_scale, maybe_bias, dtype)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return f"torch._scaled_mm refuses {m} tokens: {' '.join(str(error).split())[:200]}"
    return ""


def fp8_takes_8_bits(
    device: torch.device, num_tokens: int, num_rows: int, num_cols: int, activation_bits: int
) -> bool:
    """Whether :func:`fp8_linear` rounds that many tokens to 8 bits, and more tokens as well."""
    if activation_bits or device.type == "cpu":
        return activation_bits == 8
    return backend("cuda").fp8_takes_8_bits(device, num_tokens, num_rows, num_cols)


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


def gather_fp8_rows(
    ids: torch.Tensor, weight: torch.Tensor, row_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """y[..., :] = row_scale[ids[...]] * weight[ids[...], :]; operands as in :func:`fp8_linear`."""
    return backend(ids.device.type).gather_fp8_rows(weight, row_scale, ids, dtype)


def _fake_linear(a, codes, block_scale, global_scale, bias, num_rows, num_cols, fmt, bits):
    return a.new_empty(*a.shape[:-1], num_rows)


def _fake_linear_a8(q, a_scale, codes, block_scale, global_scale, bias, num_rows, k, fmt, dtype):
    return q.new_empty(*q.shape[:-1], num_rows, dtype=dtype)


def _fake_fp8_linear(a, weight, row_scale, bias, activation_bits):
    return a.new_empty(*a.shape[:-1], weight.shape[0])


def _fake_gather_rows(ids, codes, block_scale, global_scale, num_rows, num_cols, fmt, dtype):
    return torch.empty(*ids.shape, num_cols, dtype=dtype, device=ids.device)


def _fake_gather_fp8_rows(ids, weight, row_scale, dtype):
    return torch.empty(*ids.shape, weight.shape[1], dtype=dtype, device=ids.device)


for _name, _implementation, _fake in (
    ("linear", linear, _fake_linear),
    ("linear_a8", linear_a8, _fake_linear_a8),
    ("fp8_linear", fp8_linear, _fake_fp8_linear),
    ("gather_rows", gather_rows, _fake_gather_rows),
    ("gather_fp8_rows", gather_fp8_rows, _fake_gather_fp8_rows),
):
    register(_name, _implementation, _fake)
