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

from vllm_nvfp4.kernels.dispatch import has_fp8_mma
from vllm_nvfp4.layout import PackedWeight
from vllm_nvfp4.numerics.activation import ExpertActivation
from vllm_nvfp4.numerics.formats import FORMATS
from vllm_nvfp4.options import Options

_LIBRARY = torch.library.Library("vllm_nvfp4", "DEF")
_LIBRARY.define(
    "linear(Tensor a, Tensor codes, Tensor block_scale, Tensor global_scale, Tensor? bias, "
    "int num_rows, int num_cols, str fmt, int activation_bits) -> Tensor"
)
_LIBRARY.define(
    "linear_a8(Tensor q, Tensor a_scale, Tensor codes, Tensor block_scale, Tensor global_scale, "
    "Tensor? bias, int num_rows, int num_cols, str fmt, ScalarType dtype) -> Tensor"
)
_LIBRARY.define(
    "fp8_linear(Tensor a, Tensor weight, Tensor row_scale, Tensor? bias, int activation_bits) "
    "-> Tensor"
)
_LIBRARY.define(
    "gather_rows(Tensor ids, Tensor codes, Tensor block_scale, Tensor global_scale, "
    "int num_rows, int num_cols, str fmt, ScalarType dtype) -> Tensor"
)
_LIBRARY.define(
    "moe(Tensor a, Tensor[] w13, Tensor[] w2, Tensor topk_weights, Tensor topk_ids, "
    "Tensor? expert_map, int intermediate_size, str fmt, str activation, float[] swiglu, "
    "bool is_weight_on_input, int activation_bits, "
    "Tensor? w13_bias=None, Tensor? w2_bias=None) -> Tensor"
)
_LIBRARY.define(
    "moe_into(Tensor(a!) y, Tensor a, Tensor[] w13, Tensor[] w2, Tensor topk_weights, "
    "Tensor topk_ids, Tensor? expert_map, int intermediate_size, str fmt, str activation, "
    "float[] swiglu, bool is_weight_on_input, int activation_bits, "
    "Tensor? w13_bias=None, Tensor? w2_bias=None) -> ()"
)
_LIBRARY.define(
    "moe_rows(Tensor a, Tensor[] weight, Tensor topk_ids, Tensor? expert_map, int num_rows, "
    "str fmt, int activation_bits, Tensor? bias=None) -> Tensor"
)
_LIBRARY.define(
    "gather_fp8_rows(Tensor ids, Tensor weight, Tensor row_scale, ScalarType dtype) -> Tensor"
)


@functools.cache
def backend(device_type: str) -> ModuleType:
    """The kernel module of a device: ``kernels.cpu`` or ``kernels.cuda``."""
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"vllm_nvfp4: there are kernels for cpu and cuda, not for {device_type}")
    return importlib.import_module(f"vllm_nvfp4.kernels.{device_type}")


@functools.cache
def experts_backend(device_type: str) -> ModuleType:
    """The same for routed experts: ``kernels.cpu_moe`` or ``kernels.cuda_moe``."""
    return importlib.import_module(f"{backend(device_type).__name__}_moe")


def configure(options: Options) -> None:
    """Hand the options that concern CUDA kernels to them, before weights load."""
    from vllm_nvfp4.kernels import cubins, devices

    if "cache_dir" in options.non_default():
        cubins.use_cache_dir(options.cache_dir)
    devices.use_variant(options.a8_variant)


def warm_up(device: torch.device, fmt: str | None, activation_bits: int) -> None:
    """Compile the CPU kernels of a format (None: FP8) for torch's default type, at load time.

    CUDA kernels are loaded by ``pack_weight``.
    """
    if device.type != "cpu":
        return
    dtype = torch.get_default_dtype()
    if fmt is None:
        backend("cpu").warm_up_fp8(dtype)
    else:
        backend("cpu").warm_up(FORMATS[fmt], dtype, activation_bits or 16)


def warm_up_experts(device: torch.device, fmt: str, activation_bits: int) -> None:
    """Have the kernels of routed experts of a format ready, at load time."""
    if device.type == "cuda":
        experts_backend("cuda").prepare_moe(device, fmt)
    else:
        warm_up(device, fmt, activation_bits)


def check_activation(device: torch.device, activation: str) -> None:
    """Raise ValueError where the device cannot do what the option ``activation`` asks for."""
    if device.type == "cuda":
        backend("cuda").check_activation(device, activation)


def describe_path(device_type: str, arch: int | None, is_fp8: bool, activation_bits: int) -> str:
    """In a few words, for the log and ``doctor``: which kernel runs a layer on this device.

    arch: compute capability times ten; None on a CPU
    activation_bits: 16, 8, or 0 where the batch size decides
    """
    if device_type == "cpu" or arch is None:
        return "CPU kernel, W8A16" if is_fp8 else f"CPU kernel, W4A{activation_bits or 16}"
    if is_fp8:
        return {
            16: "Triton kernel, W8A16",
            8: "torch's library product, W8A8",
            0: "Triton kernel, W8A16, or torch's library product, W8A8, by the batch size",
        }[activation_bits]
    if not activation_bits and not has_fp8_mma(arch):
        return "CUDA kernel, W4A16 (no FP8 mma.sync here)"
    if activation_bits == 8 and not has_fp8_mma(arch):
        return "CUDA kernel, W4A8 (slow: FP8 mma.sync is emulated here)"
    by_size = "W4A16 or W4A8 by the batch size"
    return f"CUDA kernel, {f'W4A{activation_bits}' if activation_bits else by_size}"


def describe_experts_path(device_type: str, activation_bits: int) -> str:
    """In a few words, for the log: which kernel runs routed experts on this device."""
    if device_type == "cpu":
        return f"CPU kernel, W4A{activation_bits or 16}, one expert after another"
    if activation_bits:
        return f"grouped CUDA kernel, W4A{activation_bits}"
    return "grouped CUDA kernel, W4A16 or W4A8 by the tokens per expert"


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

    q:       [..., K] float8_e4m3fn
    a_scale: [..., 1] float32, one scale per token
    dtype:   of the result and of bias
    Other arguments as in :func:`linear`. Returns [..., N].
    """
    packed = PackedWeight(codes, block_scale, global_scale, num_rows, num_cols, FORMATS[fmt])
    product = backend(q.device.type).linear_a8
    y = product(q.reshape(-1, num_cols), a_scale.reshape(-1), packed, bias, dtype)
    return y.view(*q.shape[:-1], num_rows)


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
    """How :func:`fp8_linear` is to take a layer's activations: ``wanted``, or 16 where the device
    or the shape can do no other.

    weight: [N, K] float8_e4m3fn, on its device; dtype: of the activations
    wanted: 16, 8 or 0, what the checkpoint and the option ``activation`` ask for
    """
    if wanted == 16 or weight.device.type != "cuda":
        return 16
    # With scales per token and row, torch's product gives bf16 alone.
    can_do = dtype == torch.bfloat16 and not any(size % 16 for size in weight.shape)
    return wanted if can_do and backend("cuda").has_fp8(weight.device) else 16


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


def moe(
    a: torch.Tensor,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    intermediate_size: int,
    fmt: str,
    activation: str,
    swiglu: list[float],
    is_weight_on_input: bool,
    activation_bits: int,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[m] = sum_j topk_weights[m, j] * (w2[e] act(w13[e] a[m] + w13_bias[e]) + w2_bias[e]),
    e = topk_ids[m, j]

    a:            [M, H] bf16 or fp16 (float32 on the CPU)
    w13, w2:      codes, block_scale and global_scale of PackedWeight, each with a leading dimension
                  of local experts: [2 I, H] per expert (gate rows before up rows; [I, H] for an
                  activation without a gate), and [H, I]
    topk_weights: [M, k] float; topk_ids: [M, k] integer, numbers of all ranks' experts
    expert_map:   [all experts] integer, number on this rank or -1; None where all are here
    intermediate_size: I on this rank
    activation, swiglu: name and (limit, alpha, beta), see numerics.activation
    is_weight_on_input: topk_weights multiply a instead of the expert's output
    activation_bits: as in :func:`linear`
    w13_bias, w2_bias: [E, rows of the weight] of a's dtype, or None
    y:            [M, H] of a's dtype, contiguous, to write into, or None for a new tensor
    Returns y; sums are formed in float32.
    """
    act = ExpertActivation(activation, *swiglu)
    rows, hidden_size = intermediate_size * (2 if act.is_gated else 1), a.shape[1]
    first = PackedWeight(w13[0], w13[1], w13[2], rows, hidden_size, FORMATS[fmt])
    second = PackedWeight(w2[0], w2[1], w2[2], hidden_size, intermediate_size, FORMATS[fmt])
    found: torch.Tensor = experts_backend(a.device.type).moe(
        a, first, second, (topk_weights, topk_ids, expert_map), act, is_weight_on_input,
        activation_bits, (w13_bias, w2_bias), y,
    )  # fmt: skip
    return found


def moe_into(y: torch.Tensor, *arguments) -> None:
    """:func:`moe` into y [M, H]; torch leaves out biases that are None."""
    operands = [*arguments[:12], *[*arguments[12:], None, None][:2], y]
    moe(*operands)


def moe_rows(
    a: torch.Tensor,
    weight: list[torch.Tensor],
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_rows: int,
    fmt: str,
    activation_bits: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[m, j] = w[e] a[m] + bias[e],  e = topk_ids[m, j]: one product of :func:`moe` alone.

    a:      [M, K], or [M, k, K] where each choice has a row of its own
    weight: codes, block_scale and global_scale of PackedWeight, with a leading dimension of local
            experts, of [num_rows, K] each
    The other operands are those of :func:`moe`. Returns [M, k, num_rows] of a's dtype; 0 where
    another rank has the expert.
    """
    num_tokens, num_choices = topk_ids.shape
    stack = PackedWeight(weight[0], weight[1], weight[2], num_rows, a.shape[-1], FORMATS[fmt])
    rows, per_row = a.reshape(-1, a.shape[-1]), 1 if a.dim() == 3 else num_choices
    choices = (topk_ids, expert_map)
    y = experts_backend(a.device.type).rows(rows, stack, choices, per_row, activation_bits, bias)
    return y.view(num_tokens, num_choices, num_rows)


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


def _fake_moe(a, *others):
    return torch.empty_like(a, memory_format=torch.contiguous_format)


def _fake_moe_into(y, *others):
    return None


def _fake_moe_rows(a, weight, topk_ids, expert_map, num_rows, *others):
    return a.new_empty(*topk_ids.shape, num_rows)


for _name, _implementation, _fake in (
    ("linear", linear, _fake_linear),
    ("linear_a8", linear_a8, _fake_linear_a8),
    ("fp8_linear", fp8_linear, _fake_fp8_linear),
    ("gather_rows", gather_rows, _fake_gather_rows),
    ("gather_fp8_rows", gather_fp8_rows, _fake_gather_fp8_rows),
    ("moe", moe, _fake_moe),
    ("moe_into", moe_into, _fake_moe_into),
    ("moe_rows", moe_rows, _fake_moe_rows),
):
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _implementation, _key)
    torch.library.register_fake(f"vllm_nvfp4::{_name}", _fake, lib=_LIBRARY)
