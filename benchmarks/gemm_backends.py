# SPDX-License-Identifier: Apache-2.0
"""The peers of bench_gemm.py, each as: prepare(weight, dtype) -> call(a) -> y.

vLLM's Marlin and Humming go through vLLM's own kernel classes, as its linear layers use them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_nvfp4.kernels.cuda import devices, dispatch
from vllm_nvfp4.kernels.cuda import linear as cuda
from vllm_nvfp4.kernels.cuda.configs import imma_stand_in
from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row
from vllm_nvfp4.numerics.weight import BlockScaledWeight

Call = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Backend:
    """One way to compute the product.

    prepare:         makes the call for one weight
    activation_bits: 16 or 8: which tensor rate bounds it; 0: as dispatch chooses
    weight_bits:     bits per weight that it reads; 0: the format's own
    max_error:       relative error against the float64 product, above which its result does not
                     match; None: not a result at all
    note:            what to know when reading its row
    """

    name: str
    prepare: Callable[[BlockScaledWeight, torch.dtype], Call]
    activation_bits: int
    weight_bits: float = 0
    max_error: float | None = 6e-3
    note: str = ""


def _ours(bits: int) -> Callable[[BlockScaledWeight, torch.dtype], Call]:
    def prepare(weight: BlockScaledWeight, dtype: torch.dtype) -> Call:
        cuda.prepare(weight.codes.device, weight.fmt.name, (dtype,))
        packed = cuda.pack_weight(weight)
        return lambda a: cuda.linear(a, packed, None, bits)

    return prepare


def _imma_stand_in(weight: BlockScaledWeight, dtype: torch.dtype) -> Call:
    """The W4A8 kernel with integer MMA: its schedule on a GPU whose FP8 mma.sync is emulated."""
    device = cuda.prepare(weight.codes.device, weight.fmt.name, (dtype,))
    packed = cuda.pack_weight(weight)
    name = devices.DTYPE_NAMES[dtype]
    twins = {c: imma_stand_in(c) for c in dispatch.reachable(weight.fmt.name, name, 8)}
    device.load(list(twins.values()))
    n, k = packed.num_rows, packed.num_cols

    def call(a: torch.Tensor) -> torch.Tensor:
        m = a.shape[0]
        chosen = device.choose(m, n, k, weight.fmt.name, name, "8").config
        choice = dispatch.launch_geometry(device.gpu, twins[chosen], m, n, k)
        y = a.new_empty((m, n))
        cuda.run(device, choice, a, packed, None, y, devices.current_stream(a.device.index))
        return y

    return call


def _vllm_layer(weight: BlockScaledWeight, dtype: torch.dtype) -> torch.nn.Module:
    """What vLLM's NVFP4 scheme hands to a linear kernel after loading a checkpoint."""
    layer = torch.nn.Module()
    for name, value in (
        ("weight", weight.codes.clone()),
        ("weight_scale", weight.block_scale.clone()),
        ("weight_global_scale", weight.global_scale.max().clone()),
    ):
        setattr(layer, name, torch.nn.Parameter(value, requires_grad=False))
    layer.output_size_per_partition = layer.output_size = weight.num_rows
    layer.input_size_per_partition = layer.input_size = weight.num_cols
    layer.output_partition_sizes = [weight.num_rows]
    layer.logical_widths = [weight.num_rows]
    layer.params_dtype, layer.orig_dtype = dtype, dtype
    layer.has_bias, layer.bias = False, None
    return layer


def _vllm_kernel(module: str, name: str) -> Callable[[BlockScaledWeight, torch.dtype], Call]:
    def prepare(weight: BlockScaledWeight, dtype: torch.dtype) -> Call:
        import importlib

        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearLayerConfig

        package = "vllm.model_executor.kernels.linear.nvfp4"
        kernel_class = getattr(importlib.import_module(f"{package}.{module}"), name)
        is_supported, reason = kernel_class.is_supported()
        if not is_supported:
            raise RuntimeError(reason)
        layer = _vllm_layer(weight, dtype)
        with set_current_vllm_config(VllmConfig()):
            kernel = kernel_class(NvFp4LinearLayerConfig())
            kernel.process_weights_after_loading(layer)
        return lambda a: kernel.apply_weights(layer, a)

    return prepare


def _cublas_bf16(weight: BlockScaledWeight, dtype: torch.dtype) -> Call:
    dense = weight.dequantize(dtype)
    return lambda a: torch.nn.functional.linear(a, dense)


def _torch_fp8(weight: BlockScaledWeight, dtype: torch.dtype) -> Call:
    """torch._scaled_mm, per-token and per-row scales; the activations are quantised outside."""
    dense = weight.dequantize(torch.float32)
    row_scale = dense.abs().amax(1, keepdim=True) / 448
    w = (dense / row_scale).to(torch.float8_e4m3fn)
    del dense
    last: list[torch.Tensor] = []

    def call(a: torch.Tensor) -> torch.Tensor:
        # Of the same activations as before, which this keeps alive: an address alone may come to
        # belong to others.
        if not last or last[0] is not a:
            last[:] = [a, *quantize_fp8_per_row(a)]
        _, q, a_scale = last
        return torch._scaled_mm(q, w.t(), a_scale, row_scale.t(), out_dtype=a.dtype)

    return call


BACKENDS = {
    b.name: b
    for b in (
        Backend("ours", _ours(0), 0),
        Backend("ours-w4a16", _ours(16), 16),
        Backend("ours-w4a8", _ours(8), 8),
        Backend("marlin", _vllm_kernel("marlin", "MarlinNvFp4LinearKernel"), 16),
        Backend("humming", _vllm_kernel("humming", "HummingNvFp4LinearKernel"), 16),
        Backend("cublas-bf16", _cublas_bf16, 16, 16, note="weights widened to 16 bits"),
        Backend(
            "torch-fp8", _torch_fp8, 8, 8, 8e-2,
            "weights rounded to FP8; time without quantising the activations",
        ),
        Backend(
            "w4a8-imma-STAND-IN", _imma_stand_in, 8, max_error=None,
            note="integer MMA in place of FP8: schedule only, the numbers mean nothing",
        ),
    )
}  # fmt: skip
