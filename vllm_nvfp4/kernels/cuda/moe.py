# SPDX-License-Identifier: Apache-2.0
"""Routed experts on CUDA: route, multiply, combine, on torch's current stream.

Four launches with 16-bit activations, six with 8-bit ones, whose sizes follow from the shapes
alone: nothing waits for the GPU, so that a CUDA graph can hold them. Which tokens an expert gets,
and with what tile, the GPU decides (csrc/moe_route.cuh). Every result has its place whatever the
order of thread blocks, and sums have a fixed order: the same input gives the same bits.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from vllm_nvfp4.kernels.cuda import moe_configs
from vllm_nvfp4.kernels.cuda.configs import QuantizeParams
from vllm_nvfp4.kernels.cuda.devices import (
    DTYPE_NAMES,
    INT8_QUANTIZERS,
    QUANTIZERS,
    Device,
    current_stream,
    loaded_device,
    prepare,
)
from vllm_nvfp4.kernels.cuda.linear import params_layout
from vllm_nvfp4.kernels.cuda.moe_configs import (
    COMBINE_CONFIGS,
    FUNCTIONS,
    MAX_EXPERTS,
    ROUTE_CONFIG,
    CombineParams,
    MoeConfig,
    MoeParams,
    RouteParams,
)
from vllm_nvfp4.kernels.cuda.moe_dispatch import MoeShape, choose_moe, moe_variant
from vllm_nvfp4.kernels.layout import TILE_K, TILE_N, PackedWeight, check_stack
from vllm_nvfp4.numerics.activation import ExpertActivation, KernelActivation
from vllm_nvfp4.numerics.formats import INT8_GROUP

_ROUTE_LAYOUT = params_layout(RouteParams)
_MOE_LAYOUT = params_layout(MoeParams)
_COMBINE_LAYOUT = params_layout(CombineParams)
_QUANTIZE_LAYOUT = params_layout(QuantizeParams)
_COMBINERS = {config.dtype: config for config in COMBINE_CONFIGS}
_ACTIVATIONS = {0: "auto", 16: "16", 8: "8"}
# A thread of the kernels finds its token's row by a 32-bit offset.
_MAX_BYTES = 1 << 32


@dataclass(frozen=True)
class Routed:
    """The choices of M tokens, as the kernels take them; k choices each."""

    weights: torch.Tensor | None
    ids: torch.Tensor
    expert_map: torch.Tensor | None
    schedule: torch.Tensor
    order: torch.Tensor
    num_experts: int

    @property
    def num_ids(self) -> int:
        return self.num_experts if self.expert_map is None else len(self.expert_map)

    @property
    def who(self) -> tuple[int, int]:
        """Addresses of ids and expert_map."""
        return self.ids.data_ptr(), 0 if self.expert_map is None else self.expert_map.data_ptr()


def prepare_moe(
    device: torch.device, fmt_name: str, dtypes: tuple[torch.dtype, ...] | None = None
) -> Device:
    """Load the kernels of routed experts besides those of the dense layers; see ``prepare``."""
    loaded = prepare(device, fmt_name, dtypes)
    if dtypes is None:
        default = torch.get_default_dtype()
        dtypes = (default,) if default in DTYPE_NAMES else tuple(DTYPE_NAMES)
    with torch.cuda.device(device):
        variant = moe_variant(*loaded.figures)
        loaded.load(wanted_kernels(loaded.gpu.arch, fmt_name, dtypes, variant))
    return loaded


def wanted_kernels(
    arch: int, fmt_name: str, dtypes: tuple[torch.dtype, ...], variant: str = "exact"
) -> list[moe_configs.AnyMoeConfig]:
    """Everything that experts of this format can need on an architecture, but the quantiser."""
    names = {DTYPE_NAMES[dtype] for dtype in dtypes}
    wanted: list[moe_configs.AnyMoeConfig] = [ROUTE_CONFIG]
    wanted += [_COMBINERS[name] for name in sorted(names)]
    stems = ("moe_w4a16", "moe_w4i8" if variant == "int8" else "moe_w4a8")
    wanted += [
        c
        for c in moe_configs.MOE_CONFIGS
        if c.fmt_name == fmt_name and c.dtype in names and c.stem in stems
    ]
    return [config for config in wanted if arch >= config.min_arch]


def moe(
    a: torch.Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    activation: ExpertActivation,
    is_weight_on_input: bool,
    activation_bits: int,
    biases: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[m] = sum_j weight[m, j] * (w2[e] act(w13[e] a[m] + b13[e]) + b2[e]),  e = expert[m, j]

    a:       [M, H] bf16 or fp16 on a CUDA device
    w13, w2: the packed weights of all local experts, stacked: a leading dimension E on each tensor;
             num_rows and num_cols are those of one expert
    routing: weight [M, k] float; expert [M, k] integer, of all ranks' experts; expert_map [all
             experts] int32, number here or -1, or None where all are here. A choice outside of
             these numbers adds nothing, as a check would have to wait for the GPU.
    is_weight_on_input: the weight multiplies a instead; k is 1
    activation_bits: 16, 8, or 0 to let the tokens per expert decide
    biases:  b13 [E, 2 I] and b2 [E, H] of a's dtype, or None
    y:       [M, H] of a's dtype, contiguous and at a multiple of 16 bytes, to write into; None
             for a new tensor
    Returns y. Sums are formed in float32; what the activation makes is rounded to a's dtype (and
    for 8 bits to E4M3 with one scale per row, or INT8 with one per row and 64 columns). Raises
    ValueError for what does not fit.
    """
    _check(a, w13, w2, routing, activation, is_weight_on_input, activation_bits, biases)
    y = a.new_empty(a.shape) if y is None else y
    if tuple(y.shape) != tuple(a.shape) or y.dtype != a.dtype or not y.is_contiguous():
        raise ValueError(
            f"moe: y is {y.dtype} {list(y.shape)} with strides {list(y.stride())}; needs {a.dtype} "
            f"{list(a.shape)}, contiguous"
        )
    if y.data_ptr() % 16:
        raise ValueError(
            f"moe: y begins {y.data_ptr() % 16} bytes beyond a multiple of 16; its rows are "
            "written 16 bytes at a time. Give a tensor of its own, or a slice of whole rows"
        )
    if routing[1].numel() == 0:
        return y.zero_()
    index = a.device.index
    with torch.cuda.device(index) if index != torch.cuda.current_device() else nullcontext():
        device, stream = loaded_device(index, w13.fmt.name), current_stream(index)
        return run(
            device, stream, a, (w13, w2), routing, activation, is_weight_on_input,
            _ACTIVATIONS[activation_bits], biases, y,
        )  # fmt: skip


def rows(
    a: torch.Tensor,
    stack: PackedWeight,
    choices: tuple[torch.Tensor, torch.Tensor | None],
    choices_per_row: int,
    activation_bits: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[c] = w[e] a[c // choices_per_row] + bias[e],  e = expert[c]; 0 where another rank has e

    choices: expert and expert_map, as in :func:`moe`; 8 activation_bits, or else 16
    Returns [choices, num_rows] of a's dtype. Raises ValueError for what does not fit.
    """
    ids = choices[0]
    _check_rows(a, stack.num_cols, len(stack.codes), ids.numel() * stack.num_rows)
    _check_stack("the weight", stack, bias, a.dtype, False)
    if ids.numel() == 0:
        return a.new_empty((0, stack.num_rows))
    index = a.device.index
    with torch.cuda.device(index) if index != torch.cuda.current_device() else nullcontext():
        device, stream = loaded_device(index, stack.fmt.name), current_stream(index)
        return run_rows(device, stream, a, stack, choices, choices_per_row, activation_bits, bias)


def run_rows(
    device: Device, stream: int, a: torch.Tensor, stack: PackedWeight,
    choices: tuple[torch.Tensor, torch.Tensor | None], choices_per_row: int, activation_bits: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """:func:`rows` of one choice or more on a given device and stream, its arguments checked."""
    ids, expert_map = choices
    num_ids = len(stack.codes) if expert_map is None else len(expert_map)
    shape = MoeShape(num_ids, ids.shape[1], stack.num_cols, stack.num_rows, False)
    bits = "8" if activation_bits == 8 else "16"
    gpu, variant = device.figures
    dtype = DTYPE_NAMES[a.dtype]
    config = choose_moe(gpu, len(ids), shape, stack.fmt.name, dtype, bits, variant)
    routed = route(device, stream, None, ids, expert_map, len(stack.codes), config.largest_tile)
    launch = Launch(device, stream, config, routed)
    return launch.product(_aligned(a), stack, bias, choices_per_row, KernelActivation(), True)


def run(
    device: Device, stream: int, a: torch.Tensor, stacks: tuple[PackedWeight, PackedWeight],
    routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], activation: ExpertActivation,
    is_weight_on_input: bool, bits: str,
    biases: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    y: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """:func:`moe` of one token or more on a given device and stream, its arguments checked.

    stacks: w13, w2; bits: as ``moe_dispatch.choose_moe``'s activation
    """
    (w13, w2), (weights, ids, expert_map) = stacks, routing
    if is_weight_on_input:
        a = (a * weights).to(a.dtype)
    a = _aligned(a)
    factors = None if is_weight_on_input else weights
    num_ids = len(w13.codes) if expert_map is None else len(expert_map)
    shape = MoeShape(num_ids, ids.shape[1], w13.num_cols, w2.num_cols, activation.is_gated)
    gpu, variant = device.figures
    config = choose_moe(gpu, len(a), shape, w13.fmt.name, DTYPE_NAMES[a.dtype], bits, variant)
    routed = route(device, stream, factors, ids, expert_map, len(w13.codes), config.largest_tile)
    launch = Launch(device, stream, config, routed)
    h = launch.product(a, w13, biases[0], ids.shape[1], activation.for_kernel())
    x = launch.product(h, w2, biases[1], 1, KernelActivation())
    return combine(device, stream, x, routed, a.new_empty(a.shape) if y is None else y)


def route(
    device: Device, stream: int, weights: torch.Tensor | None, ids: torch.Tensor,
    expert_map: torch.Tensor | None, num_experts: int, largest_tile: int,
) -> Routed:  # fmt: skip
    """Sort the choices by expert and cut them into tiles, of at most so many, on the GPU."""
    ids = ids.to(torch.int32).contiguous()
    words = moe_configs.schedule_bytes(ids.numel(), num_experts, largest_tile) // 4
    # One allocation, the schedule first: its entries are loaded 16 bytes at a time.
    both = ids.new_empty(words + ids.numel())
    routed = Routed(
        None if weights is None else weights.float().contiguous(),
        ids,
        None if expert_map is None else expert_map.to(torch.int32).contiguous(),
        both[:words],
        both[words:],
        num_experts,
    )
    params = (
        *routed.who, routed.schedule.data_ptr(), routed.order.data_ptr(), ids.numel(), num_experts,
        routed.num_ids, largest_tile,
    )  # fmt: skip
    device.launch(ROUTE_CONFIG, (num_experts, 1, 1), stream, _ROUTE_LAYOUT, params)
    return routed


@dataclass(frozen=True)
class Launch:
    """Where and with which kernel the products of one call run."""

    device: Device
    stream: int
    config: MoeConfig
    routed: Routed

    def product(
        self, a: torch.Tensor, stack: PackedWeight, bias: torch.Tensor | None,
        choices_per_row: int, activation: KernelActivation, is_whole: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """y [choices, columns]; the rows of choices that are not served here hold anything, or
        zeros if is_whole."""
        num_choices = self.routed.ids.numel()
        columns = stack.num_rows // (2 if activation.is_gated else 1)
        # Between the products the quantiser reads all rows, other ranks' too.
        is_8_bit = self.config.stem != "moe_w4a16"
        reads_all = is_8_bit and self.routed.expert_map is not None
        y = (a.new_zeros if reads_all or is_whole else a.new_empty)((num_choices, columns))
        rows, k = a.shape
        a_ptr, a_scale, a_stride = a.data_ptr(), 0, a.stride(0)
        if is_8_bit:
            is_int8 = self.config.stem == "moe_w4i8"
            num_scales = -(-k // INT8_GROUP) if is_int8 else 1
            scratch = torch.empty(rows * (k + 4 * num_scales), dtype=torch.uint8, device=a.device)
            q, a_scale = scratch.data_ptr(), scratch.data_ptr() + rows * k
            params = (a_ptr, q, a_scale, rows, k, a_stride, k)
            quantizer = (INT8_QUANTIZERS if is_int8 else QUANTIZERS)[self.config.dtype]
            self.device.launch(quantizer, (rows, 1, 1), self.stream, _QUANTIZE_LAYOUT, params)
            a_ptr, a_stride = q, k
        grid = moe_configs.moe_grid(
            self.config, num_choices, self.routed.num_experts, columns, activation.is_gated,
            self.device.gpu.num_sms,
        )  # fmt: skip
        self.device.launch(
            self.config, grid, self.stream, _MOE_LAYOUT,
            (
                a_ptr, a_scale, stack.codes.data_ptr(), stack.block_scale.data_ptr(),
                stack.global_scale.data_ptr(), 0 if bias is None else bias.data_ptr(),
                y.data_ptr(), self.routed.schedule.data_ptr(), self.routed.order.data_ptr(),
                stack.num_rows, k, a_stride, columns, choices_per_row, int(activation.is_gated),
                FUNCTIONS.index(activation.function), activation.limit, activation.alpha,
                activation.beta,
            ),
        )  # fmt: skip
        return y


def combine(
    device: Device, stream: int, x: torch.Tensor, routed: Routed, y: torch.Tensor
) -> torch.Tensor:
    """y[m] = sum_j weight[m, j] * x[m k + j] over the choices served here, in the order of j."""
    num_tokens, hidden_size = y.shape
    config = _COMBINERS[DTYPE_NAMES[x.dtype]]
    weights = 0 if routed.weights is None else routed.weights.data_ptr()
    params = (
        x.data_ptr(), weights, *routed.who, y.data_ptr(), num_tokens, routed.ids.shape[1],
        hidden_size, routed.num_experts, routed.num_ids,
    )  # fmt: skip
    grid = (num_tokens, -(-hidden_size // config.columns), 1)
    device.launch(config, grid, stream, _COMBINE_LAYOUT, params)
    return y


def _aligned(a: torch.Tensor) -> torch.Tensor:
    """a itself where its rows can be copied 16 bytes at a time, else a copy."""
    if a.stride(1) != 1 or a.stride(0) * a.element_size() % 16 or a.data_ptr() % 16:
        return a.clone(memory_format=torch.contiguous_format)
    return a


def _check(a, w13, w2, routing, activation, is_weight_on_input, activation_bits, biases) -> None:
    weights, ids, _ = routing
    _check_rows(a, w13.num_cols, len(w13.codes), ids.numel() * w2.num_cols)
    if ids.shape != weights.shape or ids.dim() != 2 or len(ids) != len(a):
        raise ValueError(
            f"moe: topk_ids is {list(ids.shape)} and topk_weights {list(weights.shape)}; each "
            f"needs [{len(a)}, k]"
        )
    if is_weight_on_input and ids.shape[1] != 1:
        raise ValueError(
            f"moe: router weights on the input with {ids.shape[1]} choices a token; needs 1"
        )
    if activation_bits not in _ACTIVATIONS:
        raise ValueError(f"moe: activation_bits is {activation_bits}; needs 16, 8 or 0 (auto)")
    if len(w2.codes) != len(w13.codes):
        raise ValueError(
            f"moe: w13 holds {len(w13.codes)} experts and w2 {len(w2.codes)}; needs as many of both"
        )
    for name, stack, bias in (("w13", w13, biases[0]), ("w2", w2, biases[1])):
        _check_stack(name, stack, bias, a.dtype, name == "w13" and activation.is_gated)


def _check_rows(a: torch.Tensor, num_cols: int, num_experts: int, num_elements: int) -> None:
    """num_elements: of the rows that a product makes."""
    if a.dtype not in DTYPE_NAMES:
        raise ValueError(f"moe: a is {a.dtype}; the CUDA kernels take bfloat16 or float16")
    if a.dim() != 2 or a.shape[1] != num_cols:
        raise ValueError(f"moe: a is {list(a.shape)}; needs [M, {num_cols}]")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"moe: {num_experts} experts; needs 1 to {MAX_EXPERTS}")
    if max(num_elements * 2, a.shape[0] * a.stride(0) * 2) >= _MAX_BYTES:
        raise ValueError(
            f"moe: the choices of {len(a)} tokens need rows beyond 4 GiB; "
            "use a smaller --max-num-batched-tokens"
        )


def _check_stack(
    name: str, stack: PackedWeight, bias: torch.Tensor | None, dtype: torch.dtype, is_gated: bool
) -> None:
    multiple = 2 * TILE_N if is_gated else TILE_N
    if stack.num_rows % multiple:
        raise ValueError(
            f"moe: {name} has {stack.num_rows} rows an expert; needs a multiple of {multiple}"
        )
    check_stack(name, stack, stack.num_rows, -(-stack.num_cols // TILE_K) * TILE_K)
    shape = (len(stack.codes), stack.num_rows)
    if tuple(stack.global_scale.shape) != shape:
        raise ValueError(
            f"moe: {name}'s global_scale is {list(stack.global_scale.shape)}; needs {list(shape)}"
        )
    if bias is not None and (tuple(bias.shape) != shape or bias.dtype != dtype):
        raise ValueError(
            f"moe: {name}'s bias is {bias.dtype} {list(bias.shape)}; needs {dtype} {list(shape)}"
        )
