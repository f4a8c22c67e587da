# SPDX-License-Identifier: Apache-2.0
"""A real vLLM engine in this process, and a transformers model to compare it with."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# One process: no start-up of an engine process per model, and errors come as they are raised.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
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
    """vLLM's ``LLM`` on a checkpoint; everything it holds is released at the end."""
    os.environ.update(ENVIRONMENT)
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults: dict[str, Any] = {
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "quantization": "nvfp4",
        "max_logprobs": -1,
        "seed": 0,
    }
    llm: Any = None
    try:
        llm = LLM(str(folder), **(defaults | options))
        yield llm
    finally:
        # A failed test's traceback keeps the engine alive: end it now, not when that is collected.
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def ask_engine(llm: Any, prompt: list[int], num_tokens: int) -> Answer:
    """Greedy continuation and all log-probabilities, from vLLM."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=-1, prompt_logprobs=-1
    )
    request = {"prompt_token_ids": prompt}
    output = llm.generate([request], parameters, use_tqdm=False)[0]
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
    from transformers import AutoConfig, AutoModelForCausalLM

    from vllm_nvfp4.testing.checkpoints import dequantized_state_dict

    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    missing, unexpected = model.load_state_dict(dequantized_state_dict(folder), strict=False)
    if unexpected or any("lm_head" not in name for name in missing):
        raise ValueError(f"{folder}: tensors missing {missing}, unexpected {unexpected}")
    return model.to(dtype).eval()


def plain_model(folder: Path, dtype: torch.dtype) -> Any:
    """A transformers model of a checkpoint without quantization."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval()
