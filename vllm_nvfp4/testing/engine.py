# SPDX-License-Identifier: Apache-2.0
"""A real vLLM engine in this process, and a transformers model to compare it with."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from vllm_nvfp4.quality.engine import running

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "INFO",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Answer:
    """Greedy decoding of one prompt.

    tokens:   the new tokens
    logprobs: [len(prompt) - 1 + len(tokens), V] log-probabilities, of each prompt token after the
              first and of each new token
    """

    tokens: list[int]
    logprobs: torch.Tensor


@contextlib.contextmanager
def engine(folder: Path | str, **options: Any) -> Iterator[Any]:
    """A small engine of ``running``: eager, offline, all log-probabilities on request."""
    os.environ.update(ENVIRONMENT)
    defaults: dict[str, Any] = {
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 4,
        # A CPU writes all of it at the start; a GPU's memory is not looked through for more.
        "kv_cache_memory_bytes": 64 << 20,
        "quantization": "nvfp4",
        "max_logprobs": -1,
        "seed": 0,
    }
    with _one_collection(), running(folder, **(defaults | options)) as llm:
        yield llm


@contextlib.contextmanager
def _one_collection() -> Iterator[None]:
    """Collect garbage once, at the end.

    vLLM does it nine times for an engine, each time through the objects of all its modules, which
    takes longer than a tiny model's loading and answers together.
    """
    try:
        with mock.patch.object(gc, "collect", return_value=0):
            yield
    finally:
        gc.collect()


def has_fp8_kv_cache() -> bool:
    """Whether vLLM's attention holds an FP8 KV cache on this machine, for head sizes that suit it.

    vLLM itself is asked, on a CPU its kernel, and nothing of this project that decides by it.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return current_platform.has_device_capability(89)
    from vllm import _custom_ops

    token = torch.zeros(1, 1, 64, dtype=torch.bfloat16)
    keys, values = torch.zeros(1, 1, 256, 64, dtype=torch.uint8).chunk(2, dim=2)
    slots = torch.zeros(1, dtype=torch.int64)
    try:
        _custom_ops.cpu_attn_reshape_and_cache(
            token, token, keys, values, slots, "vec", kv_cache_dtype="fp8"
        )
    except RuntimeError:
        return False
    return True


def ask_engine(llm: Any, prompt: list[int], num_tokens: int, lora_request: Any = None) -> Answer:
    """Greedy continuation and all log-probabilities, from vLLM, with an adapter if one is given."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=-1, prompt_logprobs=-1
    )
    request = {"prompt_token_ids": prompt}
    output = llm.generate([request], parameters, use_tqdm=False, lora_request=lora_request)[0]
    rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    table = [[row[token].logprob for token in sorted(row)] for row in rows]
    return Answer(list(output.outputs[0].token_ids), torch.tensor(table))


def ask_reference(model: Any, prompt: list[int], num_tokens: int) -> Answer:
    """The same from a transformers model, one forward pass over the whole text per token."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            logits = model(torch.tensor([tokens])).logits[0].float()
            tokens.append(int(logits[-1].argmax()))
    logprobs = torch.log_softmax(logits, dim=-1)
    return Answer(tokens[len(prompt) :], logprobs)


def reference_model(folder: Path, dtype: torch.dtype) -> Any:
    """A transformers model that holds the checkpoint's dequantised weights."""
    from vllm_nvfp4.testing.checkpoints import write_dequantized

    with tempfile.TemporaryDirectory() as twin:
        # Loaded as a file, so that transformers stacks the experts in its own way.
        model, report = _load(write_dequantized(folder, Path(twin)), dtype)
    missing = [name for name in report["missing_keys"] if "lm_head" not in name]
    if missing or report["unexpected_keys"]:
        unexpected = report["unexpected_keys"]
        raise ValueError(f"{folder}: tensors missing {missing}, unexpected {unexpected}")
    return model


def plain_model(folder: Path, dtype: torch.dtype) -> Any:
    """A transformers model of a checkpoint without quantization."""
    return _load(folder, dtype)[0]


def _load(folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    model, report = loaded
    return model.eval(), report
