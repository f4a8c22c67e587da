# SPDX-License-Identifier: Apache-2.0
"""Linear layers: create what the checkpoint stores, turn it into kernel order, multiply."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)

from vllm_nvfp4 import compat
from vllm_nvfp4.checkpoints.convert import fp8_to_rows, to_weight
from vllm_nvfp4.checkpoints.spec import CheckpointError, LayerKind, LayerSpec, Role, TensorSpec
from vllm_nvfp4.kernels import ops
from vllm_nvfp4.layout import PackedWeight
from vllm_nvfp4.numerics.formats import FORMATS, MXFP4
from vllm_nvfp4.numerics.hadamard import rotate_blocks
from vllm_nvfp4.numerics.quantize import nvfp4_scale_from_amax, quantize_mxfp4, quantize_nvfp4
from vllm_nvfp4.numerics.weight import BlockScaledWeight

if TYPE_CHECKING:
    from vllm_nvfp4.config import NvFp4Config

logger = init_logger(f"vllm.{__name__}")

ACTIVATION_BITS = {"auto": 0, "16": 16, "8": 8}


class ShardVectorParameter(BasevLLMParameter):
    """[num_shards, ...]: one vector or matrix for each shard of a fused layer.

    Loads the tensors of which vLLM's own parameter classes have no kind: a vector along K
    (``input_dim=0``: cut under row parallelism) or a small matrix that every rank holds whole.
    """

    def __init__(self, input_dim: int | None = None, **kwargs: Any) -> None:
        self._cut_dim = input_dim
        super().__init__(**kwargs)

    def _store(self, index: int | slice, loaded_weight: torch.Tensor) -> None:
        self.data[index].copy_(loaded_weight)

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self._store(slice(None), loaded_weight)

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        if self._cut_dim is not None:
            size = self.data.shape[1 + self._cut_dim]
            loaded_weight = loaded_weight.narrow(self._cut_dim, self.tp_rank * size, size)
        self._store(slice(None), loaded_weight)

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        self._store(kwargs["shard_id"], loaded_weight)

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        self._store(self._shard_id_as_int(kwargs["shard_id"]), loaded_weight)


class UnusedParameter(BasevLLMParameter):
    """Takes a tensor that the tool stores and that has no use here, and keeps nothing of it."""

    def _drop(self, *args: Any, **kwargs: Any) -> None:
        pass

    load_column_parallel_weight = load_row_parallel_weight = _drop
    load_merged_column_weight = load_qkv_weight = _drop


def linear_method(config: NvFp4Config, spec: LayerSpec, prefix: str) -> LinearMethodBase:
    """The method for a layer that is stored, or to be quantised, as ``spec`` says."""
    if spec.kind is LayerKind.FP8:
        return NvFp4Fp8LinearMethod(config, spec, prefix)
    if spec.kind is LayerKind.ONLINE:
        return NvFp4OnlineLinearMethod(config, spec, prefix)
    return NvFp4LinearMethod(config, spec, prefix)


class _CheckpointLinearMethod(LinearMethodBase):
    """What both stored kinds share: parameters from the spec, and their way into kernel order."""

    def __init__(self, config: NvFp4Config, spec: LayerSpec, prefix: str) -> None:
        self.config, self.spec, self.prefix = config, spec, prefix

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register one parameter for each tensor of the spec; vLLM's loader fills them."""
        if self.spec.fmt is not None:
            check_block_cut(
                self.prefix, input_size, input_size_per_partition, self.spec.scale_block
            )
        layer.logical_widths = output_partition_sizes
        shape = (sum(output_partition_sizes), input_size_per_partition)
        loader = extra_weight_attrs.get("weight_loader")
        for tensor in self.spec.tensors:
            parameter: Any = _parameter(
                tensor, self.spec, shape, len(output_partition_sizes), loader
            )
            parameter.nvfp4_role = tensor.role
            layer.register_parameter(tensor.name, parameter)

    def take_tensors(self, layer: Any) -> dict[Role, torch.Tensor] | None:
        """Take the loaded tensors off the layer; None if they were taken before."""
        tensors = {}
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if role := getattr(parameter, "nvfp4_role", None):
                tensors[role] = parameter.data
                delattr(layer, name)
        return tensors or None


@register_weight_loader_v2_supported_method
class NvFp4LinearMethod(_CheckpointLinearMethod):
    """NVFP4 and MXFP4 weights from a checkpoint."""

    def process_weights_after_loading(self, layer: Any) -> None:
        if (tensors := self.take_tensors(layer)) is None:
            return
        weight = to_weight(self.spec, tensors, layer.logical_widths, self.prefix)
        attach_weight(layer, weight)
        if (pre_scale := tensors.get(Role.PRE_SCALE)) is not None:
            layer.pre_scale = _frozen(_agreed(pre_scale, self.prefix, "pre_quant_scale"))
        if (hadamard := tensors.get(Role.HADAMARD)) is not None:
            layer.hadamard = _frozen(_agreed(hadamard, self.prefix, "forward_hadamard_matrix"))
        log_path(self.spec, layer.weight_packed.device, self.config.options.activation)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.spec.tensor(Role.PRE_SCALE) is not None:
            x = x * layer.pre_scale.to(x.dtype)
        if self.spec.hadamard_size:
            x = rotate_blocks(x, layer.hadamard)
        return apply_weight(layer, x, bias, self.config.options.activation)

    def dequantize_weight(self, layer: Any) -> torch.Tensor:
        return unpack_weight(layer).dequantize(torch.get_default_dtype())


@register_weight_loader_v2_supported_method
class NvFp4Fp8LinearMethod(_CheckpointLinearMethod):
    """The FP8 layers of a mixed-precision checkpoint."""

    def process_weights_after_loading(self, layer: Any) -> None:
        if (tensors := self.take_tensors(layer)) is None:
            return
        weight, row_scale = fp8_to_rows(self.spec, tensors, layer.logical_widths, self.prefix)
        attach_fp8_weight(layer, weight, row_scale)
        log_path(self.spec, weight.device, self.config.options.activation)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.ops.vllm_nvfp4.fp8_linear(x, layer.weight, layer.row_scale, bias)


@register_weight_loader_v2_supported_method
class NvFp4OnlineLinearMethod(LinearMethodBase):
    """A 16-bit layer that becomes NVFP4 or MXFP4 as soon as its last shard is loaded.

    The weight lives on the meta device until then, so the peak is the quantised model and the
    16-bit weights of the layers in flight.
    """

    uses_meta_device = True

    def __init__(self, config: NvFp4Config, spec: LayerSpec, prefix: str) -> None:
        self.config, self.spec, self.prefix = config, spec, prefix

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        fmt = FORMATS[self.config.options.online_format]
        check_block_cut(self.prefix, input_size, input_size_per_partition, fmt.block_size)
        layer.logical_widths = output_partition_sizes
        weight: Any = ModelWeightParameter(
            data=torch.empty(
                sum(output_partition_sizes),
                input_size_per_partition,
                dtype=params_dtype,
                device="meta",
            ),
            input_dim=1,
            output_dim=0,
            weight_loader=extra_weight_attrs.get("weight_loader"),
        )
        weight.nvfp4_role = Role.WEIGHT
        layer.register_parameter("weight", weight)
        compat.initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        weight: Any = getattr(layer, "weight", None)
        if getattr(weight, "nvfp4_role", None) is not Role.WEIGHT:
            return
        del layer.weight
        options = self.config.options
        quantized = quantize_online(
            weight.data, layer.logical_widths, options.online_format, options.online_method
        )
        attach_weight(layer, quantized)
        log_path(self.spec, layer.weight_packed.device, options.activation, quantized.fmt.name)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return apply_weight(layer, x, bias, self.config.options.activation)

    def dequantize_weight(self, layer: Any) -> torch.Tensor:
        return unpack_weight(layer).dequantize(torch.get_default_dtype())


def quantize_online(
    weight: torch.Tensor, shard_rows: list[int], fmt: str, method: str
) -> BlockScaledWeight:
    """Quantise [N, K]; each shard of a fused layer gets a global scale of its own.

    Under tensor parallelism the global scale is that of the whole weight, the maximum over the
    ranks, so that the result does not depend on how the weight is cut.
    """
    if fmt == MXFP4.name:
        return quantize_mxfp4(weight)
    shards = weight.split(shard_rows)
    amax = torch.stack([shard.abs().amax().float() for shard in shards])
    scales = nvfp4_scale_from_amax(_maximum_over_ranks(amax))
    parts = [quantize_nvfp4(s, method, g) for s, g in zip(shards, scales, strict=True)]
    return BlockScaledWeight(
        torch.cat([p.codes for p in parts]),
        torch.cat([p.block_scale for p in parts]),
        torch.cat([p.global_scale for p in parts]),
        parts[0].fmt,
    )


def _maximum_over_ranks(amax: torch.Tensor) -> torch.Tensor:
    from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group

    if get_tensor_model_parallel_world_size() > 1:
        torch.distributed.all_reduce(
            amax, op=torch.distributed.ReduceOp.MAX, group=get_tp_group().device_group
        )
    return amax


def check_block_cut(prefix: str, k: int, k_per_rank: int, block_size: int) -> None:
    """Refuse a K, or a cut of K over the tensor-parallel ranks, that splits a block."""
    if k_per_rank % block_size == 0:
        return
    ranks = k // k_per_rank
    if k % block_size:
        found, todo = f"K={k}", "Leave this layer out of quantization."
    else:
        found = f"K={k} cut over {ranks} ranks, {k_per_rank} each"
        todo = f"Use a tensor-parallel size that divides {k // block_size}."
    raise CheckpointError(
        prefix, "input size", found, f"a multiple of the block of {block_size} on each rank", todo
    )


def attach_weight(layer: Any, weight: BlockScaledWeight) -> None:
    """Register the weight on the layer in kernel order.

    The parameter is called ``weight_packed`` because vLLM's LoRA finds a layer's device by it.
    """
    packed = ops.backend(weight.codes.device.type).pack_weight(weight)
    layer.weight_packed = _frozen(packed.codes)
    layer.weight_block_scale = _frozen(packed.block_scale)
    layer.weight_global_scale = _frozen(packed.global_scale)
    layer.nvfp4_shape = (packed.num_rows, packed.num_cols)
    layer.nvfp4_format = packed.fmt.name


def attach_fp8_weight(layer: Any, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """Register an FP8 weight [N, K] and its row scale [N] on the layer."""
    layer.weight = _frozen(weight)
    layer.row_scale = _frozen(scale)


def apply_weight(
    layer: Any, x: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """y = x W^T + bias with the weight that :func:`attach_weight` registered."""
    return torch.ops.vllm_nvfp4.linear(
        x,
        layer.weight_packed,
        layer.weight_block_scale,
        layer.weight_global_scale,
        bias,
        *layer.nvfp4_shape,
        layer.nvfp4_format,
        ACTIVATION_BITS[activation],
    )


def unpack_weight(layer: Any) -> BlockScaledWeight:
    """The inverse of :func:`attach_weight`."""
    num_rows, num_cols = layer.nvfp4_shape
    packed = PackedWeight(
        layer.weight_packed.data,
        layer.weight_block_scale.data,
        layer.weight_global_scale.data,
        num_rows,
        num_cols,
        FORMATS[layer.nvfp4_format],
    )
    return ops.backend(packed.codes.device.type).unpack_weight(packed)


def log_path(
    spec: LayerSpec, device: torch.device, activation: str, fmt: str | None = None
) -> None:
    """One line for each kind of layer: what was found and which path runs it."""
    found = spec.algo or spec.kind.value
    if spec.kind is LayerKind.ONLINE:
        found = f"16-bit layers, quantised to {fmt} while loading"
    path = ops.describe_path(device.type, spec.kind is LayerKind.FP8, ACTIVATION_BITS[activation])
    logger.info_once("nvfp4: %s: %s", found, path)


def _frozen(tensor: torch.Tensor) -> Parameter:
    return Parameter(tensor.contiguous(), requires_grad=False)


def _agreed(stacked: torch.Tensor, prefix: str, name: str) -> torch.Tensor:
    """One tensor for all shards of a fused layer: they share the activations."""
    if not all(torch.equal(stacked[0], other) for other in stacked[1:]):
        raise CheckpointError(
            prefix,
            name,
            "different values in the shards of a fused layer",
            "one value for all",
            "Quantise again with the fused layers' inputs scaled alike.",
        )
    return stacked[0].clone()


_TORCH_DTYPES = {
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}


def _parameter(
    tensor: TensorSpec, spec: LayerSpec, shape: tuple[int, int], num_shards: int, loader: Any
) -> BasevLLMParameter:
    """The vLLM parameter that loads a tensor of this role. shape: [N, K] on this rank."""
    n, k = shape
    dtype = _TORCH_DTYPES[tensor.dtypes[0]]
    if tensor.role in (Role.CODES, Role.BLOCK_SCALE, Role.WEIGHT):
        divisor = {
            Role.CODES: 2,
            Role.BLOCK_SCALE: spec.scale_block,
            Role.WEIGHT: 1,
        }
        data = torch.empty(n, k // divisor[tensor.role], dtype=dtype)
        if tensor.role is Role.BLOCK_SCALE:
            data.view(torch.uint8).fill_(255)  # NaN in E4M3 and E8M0: unloaded scales show
        return ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
    if tensor.role is Role.ROW_SCALE:
        data = torch.full((n, 1), torch.nan, dtype=torch.float32)
        return ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
    if tensor.role is Role.UNUSED:
        return UnusedParameter(data=torch.empty(0), weight_loader=loader)
    if tensor.role is Role.PRE_SCALE:
        data = torch.ones(num_shards, k, dtype=torch.float32)
        return ShardVectorParameter(data=data, input_dim=0, weight_loader=loader)
    if tensor.role is Role.HADAMARD:
        size = spec.hadamard_size
        data = torch.full((num_shards, size, size), torch.nan, dtype=torch.float32)
        return ShardVectorParameter(data=data, weight_loader=loader)
    data = torch.full((num_shards,), torch.nan, dtype=torch.float32)
    return PerTensorScaleParameter(data=data, weight_loader=loader)
