# SPDX-License-Identifier: Apache-2.0
"""What the tests through a real vLLM engine share."""

import contextlib
import logging
from pathlib import Path

import torch

from vllm_nvfp4.checkpoints.quantizer import DataFree
from vllm_nvfp4.checkpoints.source import Source
from vllm_nvfp4.checkpoints.write import WriteOptions, WriteReport, write_resumable
from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row, quantize_mxfp4, quantize_nvfp4
from vllm_nvfp4.testing.engine import ask_engine, ask_reference, engine, reference_model
from vllm_nvfp4.testing.feature_checks import KEEP_KV, NUM_TOKENS, PROMPT

TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
EXPERT_FIXTURES = [
    "moe_modelopt/nvfp4-qwen3",
    "moe_modelopt/w4a16-qwen2",
    "moe_compressed_tensors/nvfp4a16-qwen3",
    "moe_compressed_tensors/mxfp4a16-qwen2",
    "moe_mlx/nvfp4-qwen3",
    "moe_mlx/mxfp4-qwen3",
]


def compare(folder, atol, **options):
    """As :func:`compare_to`, with transformers' model of the dequantised weights."""
    expected = ask_reference(reference_model(folder, torch.float32), PROMPT, NUM_TOKENS)
    compare_to(expected, folder, atol, **options)


def compare_to(expected, folder, atol, **options):
    """Greedy tokens equal, and log-probabilities within ``atol``, in float32 arithmetic."""
    options = {"additional_config": KEEP_KV, "dtype": "float32"} | options
    with engine(folder, **options) as llm:
        answer = ask_engine(llm, PROMPT, NUM_TOKENS)
    assert answer.tokens == expected.tokens
    error = (answer.logprobs - expected.logprobs).abs().max().item()
    assert error < atol, f"log-probabilities differ by up to {error}"


def gpt_oss_answer(folder):
    """What transformers' own reader of gpt-oss's MXFP4 experts gives."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16,  # holds every MXFP4 weight of order one exactly
        attn_implementation="eager",
    )
    return ask_reference(model.float().eval(), PROMPT, NUM_TOKENS)


# Why a CPU with AVX2 alone has no FP8 KV cache.
NO_FP8 = "this CPU has neither AVX-512 nor AMX, one of which an FP8 KV cache needs"


@contextlib.contextmanager
def warnings_of(module):
    """A list that fills with the warnings that a module of the package logs in this process.

    By a filter, since vLLM takes handlers away when it sets up its log.
    """
    lines = []

    def note(record):
        if record.levelno >= logging.WARNING:
            lines.append(record.getMessage())
        return True

    logger = logging.getLogger(f"vllm.vllm_nvfp4.{module}")
    logger.addFilter(note)
    try:
        yield lines
    finally:
        logger.removeFilter(note)


def rounded(weight, fmt):
    """The weight through a format and back."""
    if fmt == "fp8":
        quantised, scale = quantize_fp8_per_row(weight)
        return quantised.float() * scale
    if fmt == "mxfp4":
        return quantize_mxfp4(weight).dequantize()
    return quantize_nvfp4(weight, "mse").dequantize()


def quantise_like_online(model, fmt):
    """Round every linear layer but lm_head, as a 16-bit checkpoint is while it loads."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
                module.weight.copy_(rounded(module.weight, fmt))
    return model


def layer_of(llm, name):
    """A layer of the model in an engine of this process."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner.model.get_submodule(name)


def write_with_vocabulary(source: Path, target: Path, head: str, embedding: str) -> WriteReport:
    """A mixed checkpoint with lm_head and embedding in these formats, the rest in NVFP4; a weight
    that is both has the embedding's."""
    formats = {"lm_head.weight": head, "model.embed_tokens.weight": embedding}
    options = WriteOptions(
        precision=lambda work, asked: {name: formats.get(name, "nvfp4") for name in asked},
        vocabulary=Source(source).vocabulary(with_embedding=True),
    )
    return write_resumable(source, target, DataFree("rtn"), options)
