# SPDX-License-Identifier: Apache-2.0
"""The roofline that a measured speed is held against, from ``vllm_nvfp4.planning``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from vllm_nvfp4.bench.results import Limit
from vllm_nvfp4.bench.variants import Variant, format_of
from vllm_nvfp4.checkpoints.detect import SUPPORTED_METHODS, detect, method_name, read_config
from vllm_nvfp4.gpus import Gpu, find_gpu
from vllm_nvfp4.planning import model as planning
from vllm_nvfp4.planning.families import as_stored, shape_of
from vllm_nvfp4.planning.shapes import DecoderShape
from vllm_nvfp4.serving.arguments import plugin_options


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


@dataclass(frozen=True)
class Weighed:
    """What one variant serves: its shape, the format of most linear weights, their bytes.

    planned: the format that planning computes with: ``fmt``, or AS_STORED
    weights: on each of ``cards``
    """

    shape: DecoderShape
    fmt: str
    planned: str
    weights: planning.Weights
    cards: int


def weigh(variant: Variant, flags: Sequence[str], cards: int) -> Weighed:
    """A variant's weights as held in the memory of ``cards``.

    A checkpoint that the plugin reads is weighed layer by layer as it is stored; another one
    (AWQ, FP8 by blocks, ...) as if all linear layers had its format.
    Raises ValueError for a model whose shape planning does not know.
    """
    kinds, online = ("keep", "keep"), "bf16"
    if variant.with_plugin:
        options = plugin_options(flags)
        kinds, online = (options.lm_head, options.embedding), options.online_format
    elif "--quantization" in flags:
        online = "fp8"  # what ``against`` adds for a 16-bit checkpoint
    config, quantization = read_config(variant.folder)
    shape = shape_of(config, str(variant.folder))
    fmt = planned = format_of(variant.folder, online)
    if quantization and method_name(quantization).startswith(SUPPORTED_METHODS):
        shape, planned = as_stored(shape, detect(quantization)), planning.AS_STORED
    weights = planning.weights_of(shape, planned, *kinds, cards=cards)
    return Weighed(shape, fmt, planned, weights, cards)


def decode_limits(
    weighed: Weighed, kv_dtype: str, device: Gpu, batches: Sequence[int], context: int
) -> list[Limit]:
    """The roofline per batch size, with ``context`` tokens in every sequence."""
    kv_bits = 8 if "fp8" in kv_dtype else 16
    limits = []
    for batch in batches:
        step = planning.decode(
            weighed.shape, weighed.weights, weighed.planned, kv_bits, context, batch, device,
            weighed.cards,
        )  # fmt: skip
        terms = asdict(step)
        del terms["tokens"]
        for rate in ("linear_tflops", "other_tflops"):
            terms[rate] = None if terms[rate] == float("inf") else terms[rate]
        limits.append(Limit(batch, step.tokens_per_s, step.bound, **terms))
    return limits
