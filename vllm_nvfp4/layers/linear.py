# SPDX-License-Identifier: Apache-2.0
"""Linear layers: create what the checkpoint stores, turn it into kernel order, multiply."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)

from vllm_nvfp4.checkpoints.convert import check_blocks, fp8_to_rows, to_weight
from vllm_nvfp4.checkpoints.spec import CheckpointError, LayerKind, LayerSpec, Role, TensorSpec
from vllm_nvfp4.compat import versions
from vllm_nvfp4.kernels import ops, paths
from vllm_nvfp4.layers.cut import RowCut
from vllm_nvfp4.layers.filling import (
    OnlineWeightParameter,
    check_filled,
    expect_all,
)
from vllm_nvfp4.layers.parameters import LinearCut, make_parameter
from vllm_nvfp4.layers.plain import WidenedLinearMethod
from vllm_nvfp4.layers.weights import (
    LINEAR_NAMES,
    apply_weight,
    attach_fp8_weight,
    attach_weight,
    frozen,
    keep_offloaded,
    prepare_kernels,
    quantize_online,
    refuse_offload,
    unpack_weight,
)
from vllm_nvfp4.numerics.formats import BlockFormat
from vllm_nvfp4.numerics.hadamard import rotate_blocks
from vllm_nvfp4.options import ACTIVATION_BITS, Options

logger = init_logger(f"vllm.{__name__}")

# The parameters on which vLLM's models put loaders of their own.
NAMES_OF_MODELS = ("weight", "weight_scale", "input_scale")


def linear_method(options: Options, spec: LayerSpec, prefix: str) -> LinearMethodBase:
    """The method for a layer that is stored, or to be quantised, as ``spec`` says."""
    if spec.kind is LayerKind.FP8:
        return NvFp4Fp8LinearMethod(options, spec, prefix)
    if spec.kind is LayerKind.ONLINE:
        return NvFp4OnlineLinearMethod(options, spec, prefix)
    if spec.kind is LayerKind.WIDENED:
        return WidenedLinearMethod(spec, prefix)
    return NvFp4LinearMethod(options, spec, prefix)


class PlacedMethod(LinearMethodBase):
    """The frame of vLLM's ``create_weights``: blocks fit, and the parameters are registered."""

    def __init__(self, options: Options, spec: LayerSpec, prefix: str) -> None:
        self.options, self.spec, self.prefix = options, spec, prefix

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
        check_blocks(self.prefix, self.spec, input_size_per_partition, input_size)
        layer.logical_widths = output_partition_sizes
        shape = (sum(output_partition_sizes), input_size_per_partition)
        self.add_parameters(layer, shape, params_dtype, extra_weight_attrs)

    def add_parameters(
        self, layer: Any, shape: tuple[int, int], dtype: torch.dtype, attrs: dict[str, Any]
    ) -> None:
        """Register what vLLM's loader fills.

        shape: [N, K] of this rank's part;  dtype: of 16-bit weights
        attrs: vLLM's ``weight_loader`` and what else it sets on a parameter
        """
        raise NotImplementedError


class CheckpointLinearMethod(PlacedMethod):
    """What both stored kinds share: parameters from the spec, and their way into kernel order."""

    def add_parameters(
        self, layer: Any, shape: tuple[int, int], dtype: torch.dtype, attrs: dict[str, Any]
    ) -> None:
        num_shards = len(layer.logical_widths)
        cut = LinearCut(shape, num_shards, attrs.get("weight_loader"), RowCut(layer))
        tensors = list(self.spec.tensors)
        if not any(tensor.name in NAMES_OF_MODELS for tensor in tensors):
            # Nothing loads it; a model that cuts the rows itself says so here.
            tensors.append(TensorSpec(NAMES_OF_MODELS[0], Role.UNUSED, ("U8",), optional=True))
        for tensor in tensors:
            parameter: Any = make_parameter(tensor, self.spec, cut)
            parameter.nvfp4_role = tensor.role
            if not tensor.optional and tensor.role is not Role.UNUSED:
                expect_all(parameter)
            layer.register_parameter(tensor.name, parameter)

    def take_tensors(self, layer: Any) -> dict[Role, torch.Tensor] | None:
        """Take the loaded tensors off the layer; None if they were taken before.

        Raises CheckpointError where one was not filled.
        """
        check_filled(layer, self.prefix)
        tensors, names = {}, {}
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if role := getattr(parameter, "nvfp4_role", None):
                tensors[role], names[role] = parameter.data, name
                delattr(layer, name)
        if not tensors:
            return None
        layer.nvfp4_stored = names
        return tensors


@register_weight_loader_v2_supported_method
class NvFp4LinearMethod(CheckpointLinearMethod):
    """NVFP4 and MXFP4 weights from a checkpoint."""

    def process_weights_after_loading(self, layer: Any) -> None:
        if (tensors := self.take_tensors(layer)) is None:
            return
        weight = to_weight(self.spec, tensors, layer.logical_widths, self.prefix)
        attach_weight(layer, weight)
        if (pre_scale := tensors.get(Role.PRE_SCALE)) is not None:
            layer.pre_scale = frozen(_agreed(pre_scale, self.prefix, "pre_quant_scale"))
        if (hadamard := tensors.get(Role.HADAMARD)) is not None:
            layer.hadamard = frozen(_agreed(hadamard, self.prefix, "forward_hadamard_matrix"))
        keep_offloaded(layer, layer.nvfp4_stored, LINEAR_NAMES)
        prepare_kernels(layer, self.options.activation)
        bits = ACTIVATION_BITS[self.options.activation]
        log_path(layer, self.spec, layer.weight_packed.device, bits, self.options.a8_variant)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.spec.tensor(Role.PRE_SCALE) is not None:
            x = x * layer.pre_scale.to(x.dtype)
        if self.spec.hadamard_size:
            x = rotate_blocks(x, layer.hadamard)
        return apply_weight(layer, x, bias, self.options.activation)

    def dequantize_weight(self, layer: Any) -> torch.Tensor:
        return unpack_weight(layer).dequantize(torch.get_default_dtype())


@register_weight_loader_v2_supported_method
class NvFp4Fp8LinearMethod(CheckpointLinearMethod):
    """The FP8 layers of a mixed-precision checkpoint."""

    def process_weights_after_loading(self, layer: Any) -> None:
        if (tensors := self.take_tensors(layer)) is None:
            return
        weight, row_scale = fp8_to_rows(self.spec, tensors, layer.logical_widths, self.prefix)
        attach_fp8_weight(layer, weight, row_scale)
        keep_offloaded(layer, layer.nvfp4_stored, LINEAR_NAMES)
        wanted = ACTIVATION_BITS[self.options.activation]
        if self.spec.activation_bits == 16:
            wanted = 16
        dtype = torch.get_default_dtype()
        layer.nvfp4_activation_bits = ops.fp8_activation_bits(weight, dtype, wanted)
        bits = layer.nvfp4_activation_bits
        log_path(layer, self.spec, weight.device, bits, self.options.a8_variant)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        bits = layer.nvfp4_activation_bits
        return torch.ops.vllm_nvfp4.fp8_linear(x, layer.weight, layer.row_scale, bias, bits)


@register_weight_loader_v2_supported_method
class NvFp4OnlineLinearMethod(PlacedMethod):
    """A 16-bit layer that becomes NVFP4 or MXFP4 as soon as its last shard is loaded.

    The weight lives on the meta device until then, so the peak is the quantised model and the
    16-bit weights of the layers in flight.
    """

    uses_meta_device = True

    def add_parameters(
        self, layer: Any, shape: tuple[int, int], dtype: torch.dtype, attrs: dict[str, Any]
    ) -> None:
        refuse_offload(self.prefix)
        add_meta_weight(layer, shape, dtype, attrs)

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        self._asked = args, kwargs
        super().create_weights(layer, *args, **kwargs)

    def give_back(self, layer: Any, method: LinearMethodBase) -> None:
        """Let another method have the layer, of which nothing is loaded yet."""
        del layer.weight
        versions.forget_online_processing(layer)
        args, kwargs = self._asked
        method.create_weights(layer, *args, **kwargs)
        layer.quant_method = method

    def process_weights_after_loading(self, layer: Any) -> None:
        weight: Any = getattr(layer, "weight", None)
        if getattr(weight, "nvfp4_role", None) is not Role.WEIGHT:
            return
        check_filled(layer, self.prefix)
        del layer.weight
        quantized = quantize_online(
            weight.data,
            layer.logical_widths,
            cast(BlockFormat, self.spec.fmt),
            self.options.online_method,
            layer=self.prefix,
        )
        attach_weight(layer, quantized)
        prepare_kernels(layer, self.options.activation)
        bits = ACTIVATION_BITS[self.options.activation]
        log_path(layer, self.spec, layer.weight_packed.device, bits, self.options.a8_variant)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return apply_weight(layer, x, bias, self.options.activation)

    def dequantize_weight(self, layer: Any) -> torch.Tensor:
        return unpack_weight(layer).dequantize(torch.get_default_dtype())


def add_meta_weight(
    layer: Any, shape: tuple[int, int], dtype: torch.dtype, attrs: dict[str, Any]
) -> None:
    """A 16-bit weight without memory, whose loading waits until all of it is there."""
    data = torch.empty(shape, dtype=dtype, device="meta")
    weight: Any = OnlineWeightParameter(
        data=data, input_dim=1, output_dim=0, weight_loader=attrs.get("weight_loader")
    )
    weight.nvfp4_role = Role.WEIGHT
    expect_all(weight)
    layer.register_parameter("weight", weight)
    # vLLM keeps loaders for reloading, in a table with weak keys.
    weight.nvfp4_layer = weakref.ref(layer)
    versions.initialize_online_processing(layer)


def log_path(
    layer: Any, spec: LayerSpec, device: torch.device, activation_bits: int, variant: str
) -> None:
    """One line for each kind of layer: what was found and which path runs it; the layer notes
    the path."""
    found = spec.algo or spec.kind.value
    if spec.kind is LayerKind.ONLINE and spec.fmt:
        found = f"16-bit layers, quantised to {spec.fmt.name} while loading"
    is_fp8 = spec.kind is LayerKind.FP8
    arch, gpu = versions.device_arch(), paths.gpu_figures(device.type)
    path = paths.describe_path(device.type, arch, is_fp8, activation_bits, variant, gpu)
    layer.nvfp4_path = path
    logger.info_once("nvfp4: %s: %s", found, path)


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
