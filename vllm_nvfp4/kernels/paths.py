# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs a layer on a device, in words: for the log and the commands.

Imports no torch before a function asks the machine: ``plan`` and ``inspect`` tell of other cards.
"""

from __future__ import annotations

from vllm_nvfp4.gpus import Gpu
from vllm_nvfp4.kernels.cuda import cost, dispatch
from vllm_nvfp4.options import ACTIVATION_BITS, Options


def gpu_figures(device_type: str) -> Gpu | None:
    """What is known of the current GPU; None on a CPU, and where torch sees no GPU."""
    import torch

    if device_type != "cuda" or not torch.cuda.is_available():
        return None
    from vllm_nvfp4.kernels.cuda import devices

    return devices.figures_of(torch.cuda.current_device())


def describe_path(
    device_type: str,
    arch: int | None,
    is_fp8: bool,
    activation_bits: int,
    variant: str,
    gpu: Gpu | None,
) -> str:
    """In a few words, for the log and ``doctor``: which kernel runs a layer on this device.

    arch: compute capability times ten; None on a CPU
    activation_bits: 16, 8, or 0 where the batch size decides
    variant: the option ``a8_variant``
    gpu: of :func:`gpu_figures`, by which "auto" is resolved
    """
    if device_type == "cpu" or arch is None:
        bits = "W8A16" if is_fp8 else _four_bits(activation_bits or 16, _cpu_variant(variant))
        return f"CPU kernel, {bits}"
    if is_fp8:
        return {
            16: "Triton kernel, W8A16",
            8: "torch's library product, W8A8",
            0: "Triton kernel, W8A16, or torch's library product, W8A8, by the batch size",
        }[activation_bits]
    chosen = ""
    if gpu is not None:
        chosen = _why_chosen(gpu) if variant == "auto" else ""
        variant = dispatch.resolve_variant(gpu, variant)
    has_switch = cost.has_fp8_mma(arch) if gpu is None else dispatch.gains_from_8_bits(gpu, variant)
    if activation_bits:
        why = chosen if has_switch else f" (slow: {_no_gain(arch, variant)})"
        why = "" if activation_bits == 16 else why
        return f"CUDA kernel, {_four_bits(activation_bits, variant)}{why}"
    if not has_switch:
        return f"CUDA kernel, W4A16 for every batch size ({_no_gain(arch, variant)})"
    return f"CUDA kernel, W4A16, or by the batch size {_four_bits(8, variant)}{chosen}"


def describe_experts_path(
    device_type: str,
    arch: int | None,
    activation_bits: int,
    variant: str,
    gpu: Gpu | None,
) -> str:
    """In a few words, for the log: which kernel runs routed experts on this device.

    The arguments: as in :func:`describe_path`
    """
    if device_type == "cpu" or arch is None:
        bits = _four_bits(activation_bits or 16, _cpu_variant(variant))
        return f"CPU kernel, {bits}, one expert after another"
    # The grouped kernels have INT8 and exact FP8.
    variant = variant if variant in ("auto", "int8") else "exact"
    path = describe_path(device_type, arch, False, activation_bits, variant, gpu)
    return f"grouped {path.replace('batch size W4A8', 'tokens per expert W4A8')}"


def describe_on(gpu: Gpu, options: Options, are_experts: bool = False) -> str:
    """What would run a layer of four-bit weights on a card that need not be here."""
    if gpu.fp4_tflops and options.native_blackwell:
        return "vLLM's own kernels, where they take the checkpoint (option native_blackwell)"
    bits = ACTIVATION_BITS[options.activation]
    if are_experts:
        return describe_experts_path("cuda", gpu.arch, bits, options.a8_variant, gpu)
    return describe_path("cuda", gpu.arch, False, bits, options.a8_variant, gpu)


def _why_chosen(gpu: Gpu) -> str:
    """Why a8_variant=auto is what it is on a GPU, where 8 bits gain."""
    if not gpu.fp8_f32_tflops:
        gain = f"{cost.gain_on_paper(gpu, 'nvfp4'):.1f} times BF16's rate on paper"
        return f" (a8_variant=auto: sm_{gpu.arch} has no FP8 tensor cores; {gain})"
    int8, fp8 = (cost.paper_tflops_8(gpu, "nvfp4", v) for v in ("int8", "exact"))
    if dispatch.resolve_variant(gpu, "auto") == "int8":
        return f" (a8_variant=auto: {int8 / fp8:.2f} times FP8's rate on paper)"
    return f" (a8_variant=auto: INT8 has {int8 / fp8:.2f} times its rate on paper)"


def _four_bits(activation_bits: int, variant: str) -> str:
    """How four-bit weights meet activations."""
    words = {
        "int8": "INT8 per token and 64 columns",
        "auto": "FP8 or INT8 by the GPU's figures",
        "f16_partials": "FP8 per token, f16 sums of blocks",
        "folded": "FP8 per token, folded scales",
    }
    if activation_bits == 16:
        return "W4A16"
    return f"W4A8 in {words.get(variant, 'FP8 per token')}"


def _cpu_variant(variant: str) -> str:
    """What the option ``a8_variant`` means to the CPU's kernels: "int8" or "exact"."""
    from vllm_nvfp4.kernels.cpu.linear import resolve_variant

    return resolve_variant(variant)


def _no_gain(arch: int, variant: str) -> str:
    """Why 8-bit activations gain nothing, or too little, on an architecture."""
    if variant == "int8":
        return f"on sm_{arch} its INT8 gains less than 1.3 times on paper"
    return f"sm_{arch} has no FP8 mma.sync" if arch < 89 else f"sm_{arch} emulates FP8 mma.sync"
