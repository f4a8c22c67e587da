# SPDX-License-Identifier: Apache-2.0
"""The roofline that a measured speed is held against, from ``vllm_nvfp4.planning``."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_nvfp4.bench.results import Limit, VariantRecord
from vllm_nvfp4.bench.variants import Variant, format_of, plugin_options
from vllm_nvfp4.gpus import Gpu, find_gpu
from vllm_nvfp4.planning import model as planning
from vllm_nvfp4.planning.shapes import find_shape


def cpu_as_device(name: str, gbps: float) -> Gpu:
    """A device that reads ``gbps`` GB/s, as measured, and whose arithmetic sets no limit."""
    unknown = float("inf")
    return Gpu(
        name, 0, 0, 0, gbps, 0, 0, unknown, unknown, unknown, unknown, 0,
        "memory bandwidth measured on this machine; arithmetic sets no limit",
    )  # fmt: skip


def gpu_as_device(name: str) -> Gpu:
    """The card's row in gpus.py. Raises ValueError where it has none."""
    gpu = find_gpu(name)
    if gpu is None:
        raise ValueError(f"vllm_nvfp4/gpus.py has no figures for {name}")
    return gpu


def weigh(variant: Variant, flags: Sequence[str], cards: int) -> tuple[str, planning.Weights]:
    """(format, bytes on each of ``cards``) of a variant's weights as held in memory.

    Raises ValueError for a model whose shape planning does not know.
    """
    kinds, online = ("keep", "keep"), "bf16"
    if variant.with_plugin:
        options = plugin_options(flags)
        kinds, online = (options.lm_head, options.embedding), options.online_format
    elif "--quantization" in flags:
        online = "fp8"  # what ``against`` adds for a 16-bit checkpoint
    fmt = format_of(variant.folder, online)
    shape = find_shape(str(variant.folder))
    return fmt, planning.weights_of(shape, fmt, *kinds, cards=cards)


def decode_limits(
    record: VariantRecord,
    weights: planning.Weights,
    device: Gpu,
    batches: Sequence[int],
    context: int,
    cards: int,
) -> list[Limit]:
    """The roofline per batch size, with ``context`` tokens in every sequence."""
    shape = find_shape(record.model)
    kv_bits = 8 if "fp8" in record.kv_dtype else 16
    limits = []
    for batch in batches:
        step = planning.decode(
            shape, weights, record.weight_format, kv_bits, context, batch, device, cards
        )
        limits.append(Limit(batch, step.tokens_per_s, step.bound, step.num_bytes))
    return limits
