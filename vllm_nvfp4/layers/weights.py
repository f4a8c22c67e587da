# SPDX-License-Identifier: Apache-2.0
"""A layer's weight in memory: how a 16-bit one is quantised, held in kernel order, and applied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn import Parameter

from vllm_nvfp4.checkpoints.convert import check_dense
from vllm_nvfp4.checkpoints.spec import CheckpointError, Role
from vllm_nvfp4.compat import versions
from vllm_nvfp4.kernels import ops
from vllm_nvfp4.kernels.layout import PackedWeight
from vllm_nvfp4.numerics.formats import FORMATS, MXFP4, BlockFormat
from vllm_nvfp4.numerics.quantize import (
    largest_magnitude,
    nvfp4_scale_from_amax,
    quantize_mxfp4,
    quantize_nvfp4_shards,
)
from vllm_nvfp4.numerics.weight import BlockScaledWeight
from vllm_nvfp4.options import ACTIVATION_BITS

# The first is what vLLM's modular kernel takes as w13_weight and w2_weight.
EXPERT_TENSORS = ("weight", "weight_block_scale", "weight_global_scale")


def quantize_online(
    weight: torch.Tensor,
    shard_rows: list[int],
    fmt: BlockFormat,
    method: str,
    amax: torch.Tensor | None = None,
    layer: str = "layer",
) -> BlockScaledWeight:
    """Quantise [N, K]; each shard of a fused layer gets a global scale of its own.

    Under tensor parallelism the global scale is that of the whole weight, the maximum over the
    ranks, so that the result does not depend on how the weight is cut.

    amax:  largest magnitude of each shard over the ranks, float32; None to find it here
    layer: name for messages
    Raises CheckpointError for a weight that holds a NaN or an infinity.
    """
    check_dense(weight, f"{layer}.weight")
    if fmt == MXFP4:
        return quantize_mxfp4(weight)
    shards = weight.split(shard_rows)
    if amax is None:
        amax = _maximum_over_ranks(torch.stack([largest_magnitude(shard) for shard in shards]))
    return quantize_nvfp4_shards(shards, method, nvfp4_scale_from_amax(amax))


def _maximum_over_ranks(amax: torch.Tensor) -> torch.Tensor:
    from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group

    if get_tensor_model_parallel_world_size() > 1:
        torch.distributed.all_reduce(
            amax, op=torch.distributed.ReduceOp.MAX, group=get_tp_group().device_group
        )
    return amax


def attach_weight(layer: Any, weight: BlockScaledWeight) -> None:
    """Register the weight on the layer in kernel order.

    The parameter is called ``weight_packed`` because vLLM's LoRA finds a layer's device by it.
    """
    packed = ops.backend(weight.codes.device.type).pack_weight(weight)
    layer.nvfp4_weight = None  # of parameters that are replaced now
    layer.weight_packed = frozen(packed.codes)
    layer.weight_block_scale = frozen(packed.block_scale)
    layer.weight_global_scale = frozen(packed.global_scale)
    layer.nvfp4_shape = (packed.num_rows, packed.num_cols)
    layer.nvfp4_format = packed.fmt.name


def prepare_kernels(layer: Any, activation: str) -> None:
    """Have the kernels of the layer's weight ready, so that no request waits for a compiler.

    Raises ValueError where the device cannot do what the option ``activation`` asks for.
    """
    device = layer.weight_packed.device
    ops.check_activation(device, activation)
    ops.warm_up(device, layer.nvfp4_format, ACTIVATION_BITS[activation])


def attach_experts(
    layer: Any, stem: str, num_experts: int, weights: Iterable[BlockScaledWeight]
) -> None:
    """Register the experts' weights of one product, stacked in kernel order.

    stem:    "w13" or "w2"
    weights: one for each local expert, taken and packed one by one
    """
    stacked: list[torch.Tensor] = []
    packed: PackedWeight | None = None
    for e, weight in enumerate(weights):
        packed = ops.backend(weight.codes.device.type).pack_weight(weight)
        tensors = (packed.codes, packed.block_scale, packed.global_scale)
        stacked = stacked or [t.new_empty(num_experts, *t.shape) for t in tensors]
        for stack, tensor in zip(stacked, tensors, strict=True):
            stack[e] = tensor
    for name, stack in zip(EXPERT_TENSORS, stacked, strict=True):
        setattr(layer, f"{stem}_{name}", frozen(stack))
    layer.nvfp4_format = packed.fmt.name if packed else ""


def experts_of(layer: Any, stem: str) -> list[torch.Tensor]:
    """What :func:`attach_experts` registered, in the order that the op takes."""
    return [getattr(layer, f"{stem}_{name}") for name in EXPERT_TENSORS]


def attach_fp8_weight(layer: Any, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """Register an FP8 weight [N, K] and its row scale [N] on the layer."""
    layer.weight = frozen(weight)
    layer.row_scale = frozen(scale)
    ops.warm_up_fp8(layer.weight, layer.row_scale, getattr(layer, "bias", None))


def apply_weight(
    layer: Any, x: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """y = x W^T + bias with the weight that :func:`attach_weight` registered."""
    bits = ACTIVATION_BITS[activation]
    if not torch.compiler.is_compiling():
        return ops.multiply(x, packed_weight(layer), bias, bits)
    return torch.ops.vllm_nvfp4.linear(
        x,
        layer.weight_packed,
        layer.weight_block_scale,
        layer.weight_global_scale,
        bias,
        *layer.nvfp4_shape,
        layer.nvfp4_format,
        bits,
    )


def packed_weight(layer: Any) -> PackedWeight:
    """What :func:`attach_weight` registered, as one; made again after the layer's parameters were
    replaced."""
    tensors = layer._parameters
    codes, block_scale = tensors["weight_packed"], tensors["weight_block_scale"]
    global_scale = tensors["weight_global_scale"]
    found: PackedWeight | None = layer.__dict__.get("nvfp4_weight")
    if (
        found is None
        or found.codes is not codes
        or found.block_scale is not block_scale
        or found.global_scale is not global_scale
    ):
        num_rows, num_cols = layer.nvfp4_shape
        fmt = FORMATS[layer.nvfp4_format]
        found = PackedWeight(codes, block_scale, global_scale, num_rows, num_cols, fmt)
        layer.nvfp4_weight = found
    return found


def unpack_weight(layer: Any) -> BlockScaledWeight:
    """The inverse of :func:`attach_weight`."""
    packed = packed_weight(layer)
    return ops.backend(packed.codes.device.type).unpack_weight(packed)


# What becomes of a stored tensor of a linear layer.
LINEAR_NAMES = {
    Role.CODES: "weight_packed",
    Role.BLOCK_SCALE: "weight_block_scale",
    Role.GLOBAL_SCALE: "weight_global_scale",
    Role.GLOBAL_DIVISOR: "weight_global_scale",
    Role.PRE_SCALE: "pre_scale",
    Role.HADAMARD: "hadamard",
    Role.WEIGHT: "weight",
    Role.WEIGHT_SCALE: "row_scale",
    Role.ROW_SCALE: "row_scale",
}


# And of one of experts, after "w13_" or "w2_".
EXPERT_NAMES = {
    Role.CODES: EXPERT_TENSORS[0],
    Role.BLOCK_SCALE: EXPERT_TENSORS[1],
    Role.GLOBAL_SCALE: EXPERT_TENSORS[2],
    Role.GLOBAL_DIVISOR: EXPERT_TENSORS[2],
    Role.BIAS: "bias",
}


def keep_offloaded(layer: Any, stored: Mapping[Any, str], became: Mapping[Any, str]) -> None:
    """Let vLLM put a layer's parameters back to where it had offloaded their origins.

    All of its offloaders know a parameter by its name alone, and take one with a new name for one
    that belongs on the GPU. So each stands under the name of the stored tensor too, as one and the
    same parameter; what is saved of the layer names it once.

    stored: by role, names of the parameters that the checkpoint's tensors were loaded into
    became: by role, names of what was made of them
    """
    if not versions.offloads_parameters():
        return
    parameters, aliases = layer._parameters, set()
    for role, old in stored.items():
        new = became.get(role, old)
        if new not in parameters or old in parameters:
            continue
        # torch's walks give a parameter under the first of its names, here the old one.
        parameter = parameters.pop(new)
        parameters[old] = parameters[new] = parameter
        aliases.add(old)
    if not hasattr(layer, "nvfp4_aliases"):
        layer._register_state_dict_hook(_without_aliases)
    layer.nvfp4_aliases = aliases


def _without_aliases(layer: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in layer.nvfp4_aliases:
        state.pop(f"{prefix}{name}", None)


def refuse_offload(layer: str) -> None:
    """Raise CheckpointError where vLLM offloads parameters: those of a layer that is quantised
    while it loads have no memory yet when it does so."""
    if versions.offloads_parameters():
        raise CheckpointError(
            layer,
            "--cpu-offload-gb",
            "a 16-bit layer that is to be quantised while it loads",
            "a checkpoint in NVFP4, or all weights on the GPU",
            "Quantise it first (vllm-nvfp4 quantize), or leave the flag out.",
        )


def frozen(tensor: torch.Tensor) -> Parameter:
    return Parameter(tensor.contiguous(), requires_grad=False)
