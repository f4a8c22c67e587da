# SPDX-License-Identifier: Apache-2.0
"""vLLM's features (features.py), each run with the plugin and compared with the plain run.

On any device that vLLM runs on: float32 on the CPU, where a wrong answer cannot hide behind
rounding; BF16 on a GPU, where an answer may err as far from float32 as vLLM's own BF16 layers do.
"""

from __future__ import annotations

import io
import json
import re
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vllm_nvfp4.testing.checkpoints import write_adapter
from vllm_nvfp4.testing.engine import (
    Answer,
    ask_engine,
    ask_reference,
    engine,
    has_fp8_kv_cache,
    plain_model,
)

PROMPT = [3, 17, 200, 45, 99, 120, 7, 64, 250, 31, 12, 180]
LONG = [3 + (i * i + 7 * i) % 280 for i in range(100)]
NUM_TOKENS = 12
KEEP_KV: dict[str, Any] = {"nvfp4": {"kv_cache": "keep"}}
# Of float32 log-probabilities, where sums are taken in another order.
_EXACT = 1e-4


class Differs(ValueError):
    """A feature changed what the model answers."""


@dataclass(frozen=True)
class Setup:
    """The model of all checks, and what it answers with no feature on.

    folder, dequantised: the checkpoint, and its weights written out in 16 bits
    scratch:   a folder for what a check writes
    dtype:     of the activations: "float32" or "bfloat16"
    plain:     {length of the prompt: answer} of PROMPT and LONG
    written:   the same from the weights written out, without the plugin
    tolerance: of a log-probability
    """

    folder: Path
    dequantised: Path
    scratch: Path
    dtype: str
    plain: dict[int, Answer]
    written: dict[int, Answer]
    tolerance: float

    def options(self, is_plain_model: bool = False, **options: Any) -> dict[str, Any]:
        """What ``engine`` is told beside the folder."""
        method = {"quantization": None} if is_plain_model else {}
        return _base(self.dtype) | method | options


def _base(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "additional_config": KEEP_KV}


def _answers(folder: Path, dtype: str, **options: Any) -> dict[int, Answer]:
    off = {"enable_prefix_caching": False, "enable_chunked_prefill": False}
    with engine(folder, **(_base(dtype) | off | options)) as llm:
        return {len(p): ask_engine(llm, p, NUM_TOKENS) for p in (PROMPT, LONG)}


def make_setup(folder: Path, dequantised: Path, scratch: Path, dtype: str) -> Setup:
    """Run the model plainly. In BF16 the tolerance is four times what vLLM's own BF16 run of the
    written-out weights errs from float32."""
    plain = _answers(folder, dtype)
    written = _answers(dequantised, dtype, quantization=None)
    tolerance = _EXACT
    if dtype != "float32":
        reference = plain_model(dequantised, torch.float32)
        exact = ask_reference(reference, LONG, 1).logprobs[: len(LONG) - 1]
        tolerance = 4 * (written[len(LONG)].logprobs[: len(LONG) - 1] - exact).abs().max().item()
    return Setup(folder, dequantised, scratch, dtype, plain, written, tolerance)


def compare(setup: Setup, tokens: list[int], logprobs: torch.Tensor, expected: Answer) -> None:
    """Up to the first token that differs, which only BF16 may have.

    tokens, logprobs: new ones, [len(tokens), V]
    """
    pairs = enumerate(zip(tokens, expected.tokens, strict=True))
    same = next((i for i, (a, b) in pairs if a != b), len(tokens))
    if same < len(tokens) and setup.dtype == "float32":
        raise Differs(f"token {same} is {tokens[same]}, not {expected.tokens[same]}")
    rows = slice(0, same + 1)
    wanted = expected.logprobs[-len(tokens) :]
    error = (logprobs.cpu()[rows] - wanted[rows]).abs().max().item()
    if not error < setup.tolerance:
        raise Differs(f"a log-probability is off by {error:.3g}, more than {setup.tolerance:.3g}")


def need(condition: bool, message: str) -> None:
    if not condition:
        raise Differs(message)


def greedy(llm: Any, prompts: list[list[int]], **options: Any) -> list[Any]:
    """One request output per prompt of token ids, all in one batch."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=-1)
    requests = [{"prompt_token_ids": p} for p in prompts]
    return llm.generate(requests, parameters, use_tqdm=False, **options)


def rows_of(output: Any) -> tuple[list[int], torch.Tensor]:
    """(tokens, [len(tokens), V] log-probabilities) of a request output."""
    answer = output.outputs[0]
    table = [[row[token].logprob for token in sorted(row)] for row in answer.logprobs]
    return list(answer.token_ids), torch.tensor(table)


def check_both(setup: Setup, llm: Any) -> None:
    for output, prompt in zip(greedy(llm, [PROMPT, LONG]), (PROMPT, LONG), strict=True):
        compare(setup, *rows_of(output), setup.plain[len(prompt)])


# --- one function for each feature ----------------------------------------------------------------


def _with_options(setup: Setup, **options: Any) -> None:
    with engine(setup.folder, **setup.options(**options)) as llm:
        check_both(setup, llm)


def _prefix_caching(setup: Setup) -> None:
    options = setup.options(enable_prefix_caching=True, block_size=32)
    with engine(setup.folder, **options) as llm:
        outputs = [greedy(llm, [LONG])[0] for _ in range(2)]
    cached = [output.num_cached_tokens for output in outputs]
    need(cached == [0, 96], f"{cached} tokens came from the cache, not 0 and 96")
    for output in outputs:
        compare(setup, *rows_of(output), setup.plain[len(LONG)])


def _ngram_speculation(setup: Setup) -> None:
    method = {"method": "ngram", "num_speculative_tokens": 3}
    speculation = method | {"prompt_lookup_max": 2, "prompt_lookup_min": 1}
    options = setup.options(speculative_config=speculation, disable_log_stats=False)
    with engine(setup.folder, **options) as llm:
        check_both(setup, llm)
        metrics = {metric.name: metric for metric in llm.get_metrics()}
    need(metrics["vllm:spec_decode_num_drafts"].value > 0, "nothing was speculated on")


def _structured_output(setup: Setup) -> None:
    from transformers import AutoTokenizer
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "large": {"type": "boolean"}},
        "required": ["city", "large"],
        "additionalProperties": False,
    }
    parameters = SamplingParams(
        temperature=0, max_tokens=64, structured_outputs=StructuredOutputsParams(json=schema)
    )
    config = {"backend": "xgrammar", "disable_any_whitespace": True}
    tokenizer = AutoTokenizer.from_pretrained(setup.folder)
    texts: list[str] = []
    for folder, is_plain in ((setup.folder, False), (setup.dequantised, True)):
        with engine(folder, **setup.options(is_plain, structured_outputs_config=config)) as llm:
            prompt = {"prompt_token_ids": PROMPT}
            output = llm.generate([prompt], parameters, use_tqdm=False)[0].outputs[0]
            texts.append(str(tokenizer.decode(output.token_ids, skip_special_tokens=True)))
    answer = json.loads(texts[0])
    is_valid = answer["city"] in ("Paris", "Rome") and isinstance(answer["large"], bool)
    need(is_valid, f"the answer is not of the schema: {texts[0]}")
    need(texts[0] == texts[1] or setup.dtype != "float32", f"{texts[0]}, not {texts[1]}")


def _logprobs(setup: Setup) -> None:
    """Of the prompt and the answer over the whole vocabulary, against the weights written out."""
    for length, answer in setup.plain.items():
        written = setup.written[length]
        compare(setup, answer.tokens, answer.logprobs[-NUM_TOKENS:], written)
        off = (answer.logprobs - written.logprobs)[: length - 1].abs().max().item()
        need(off < setup.tolerance, f"a prompt's log-probability is off by {off:.3g}")


def _lora(setup: Setup) -> None:
    from vllm.lora.request import LoRARequest

    request = LoRARequest("adapter", 1, str(write_adapter(setup.folder, setup.scratch)))
    answers = []
    for folder, is_plain in ((setup.folder, False), (setup.dequantised, True)):
        with engine(folder, **setup.options(is_plain, enable_lora=True)) as llm:
            base = rows_of(greedy(llm, [PROMPT])[0])
            adapted = rows_of(greedy(llm, [PROMPT], lora_request=request)[0])
        answers.append((base, adapted))
    (base, adapted), (_, expected) = answers
    compare(setup, *base, setup.plain[len(PROMPT)])
    compare(setup, *adapted, Answer(*expected))
    change = (base[1][0] - adapted[1][0]).abs().max().item()
    need(
        change > 2 * setup.tolerance, f"the adapter changes log-probabilities by {change:.3g} only"
    )


def _reload(setup: Setup) -> None:
    with engine(setup.folder, **setup.options()) as llm:
        before = ask_engine(llm, PROMPT, NUM_TOKENS)
        llm.collective_rpc("reload_weights")
        after = ask_engine(llm, PROMPT, NUM_TOKENS)
    need(torch.equal(before.logprobs, after.logprobs), "log-probabilities changed")


def _sleep(setup: Setup) -> None:
    """Level 1 keeps the weights in the CPU's memory; level 2 drops them: they are read again."""
    with engine(setup.folder, **setup.options(enable_sleep_mode=True)) as llm:
        llm.sleep(level=1)
        llm.wake_up()
        check_both(setup, llm)
        llm.sleep(level=2)
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
        check_both(setup, llm)


def _fp8_kv_cache(setup: Setup) -> None:
    """BF16 activations: as far from float32 as 16-bit weights with the same cache are."""
    if not has_fp8_kv_cache():
        _no_fp8_kv_cache(setup)
        return
    reference = plain_model(setup.dequantised, torch.float32)
    exact = ask_reference(reference, LONG, 1).logprobs[: len(LONG) - 1]
    errors = []
    for folder, is_plain in ((setup.folder, False), (setup.dequantised, True)):
        options = setup.options(is_plain, dtype="bfloat16", kv_cache_dtype="fp8")
        with engine(folder, **options) as llm:
            found = ask_engine(llm, LONG, 1).logprobs[: len(LONG) - 1]
        errors.append((found - exact).square().mean().sqrt().item())
    need(errors[0] < 1.5 * errors[1], f"errs by {errors[0]:.3g}, 16-bit weights by {errors[1]:.3g}")


def _no_fp8_kv_cache(setup: Setup) -> None:
    """The default is then the plain run, and an FP8 cache is refused on a CPU."""
    with engine(setup.folder, **setup.options(additional_config={})) as llm:
        check_both(setup, llm)
    if not torch.cuda.is_available():
        try:
            with engine(setup.folder, **setup.options(kv_cache_dtype="fp8")):
                pass
        except ValueError as error:
            need(str(error).startswith("--kv-cache-dtype fp8: "), f"the error is: {error}")
        else:
            need(False, "an FP8 KV cache was not refused")


def _embeddings(setup: Setup) -> None:
    vectors = []
    for folder, is_plain in ((setup.folder, False), (setup.dequantised, True)):
        with engine(folder, **setup.options(is_plain, runner="pooling", convert="embed")) as llm:
            outputs = llm.embed([{"prompt_token_ids": p} for p in (PROMPT, LONG)], use_tqdm=False)
            vectors.append(torch.tensor([o.outputs.embedding for o in outputs]))
    limit = 1e-5 if setup.dtype == "float32" else 2e-2  # of vectors of length 1
    off = (vectors[0] - vectors[1]).abs().max().item()
    need(off < limit, f"a vector is off by {off:.3g}, more than {limit:g}")
    need((vectors[0][0] - vectors[0][1]).abs().max().item() > limit, "the two vectors are alike")


def _data_parallel(setup: Setup) -> None:
    """Over HTTP: vLLM shares requests out among the replicas of a server only."""
    import openai

    from vllm_nvfp4.serving.server import Server

    flags = ["--data-parallel-size", "2", "--dtype", setup.dtype, "--enforce-eager"]
    flags += ["--additional-config", json.dumps(KEEP_KV), "--max-model-len", "128"]
    flags += ["--skip-tokenizer-init", "--kv-cache-memory-bytes", str(2**26)]
    extra = {"detokenize": False, "return_token_ids": True, "ignore_eos": True}
    with Server([str(setup.folder), *flags], setup.scratch / "replicas.log") as server:
        server.wait_ready(io.StringIO())
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")

        def ask(prompt: list[int]) -> list[int]:
            answer: Any = client.completions.create(
                model=str(setup.folder),
                prompt=prompt,
                max_tokens=NUM_TOKENS,
                temperature=0,
                extra_body=extra,
            )
            return answer.choices[0].token_ids

        prompts = [PROMPT, LONG] * 4
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, prompts))
        metrics = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    for answer, prompt in zip(answers, prompts, strict=True):
        expected = setup.plain[len(prompt)].tokens
        # Without log-probabilities: BF16 may go another way after the first token.
        num = len(expected) if setup.dtype == "float32" else 1
        need(answer[:num] == expected[:num], f"{answer}, not {expected}")
    shares = re.findall(r'^vllm:request_success_total{.*engine="(\d)".*} (\d+)', metrics, re.M)
    replicas = {number for number, requests in shares if int(requests)}
    need(replicas == {"0", "1"}, f"only replicas {sorted(replicas)} answered")


_TWO_PROCESSES: dict[str, Any] = {"distributed_executor_backend": "mp"}
# vLLM's CPU backend makes room for a stage's input only where the model is traced; it need not be
# compiled.
_TRACED: dict[str, Any] = {
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager"},
}
CHECKS: dict[str, Callable[[Setup], None]] = {
    "Tensor parallel": partial(_with_options, tensor_parallel_size=2, **_TWO_PROCESSES),
    "Pipeline parallel": partial(
        _with_options, pipeline_parallel_size=2, **_TWO_PROCESSES, **_TRACED
    ),
    "Data parallel": _data_parallel,
    "Ray": partial(_with_options, distributed_executor_backend="ray"),
    "Prefix caching": _prefix_caching,
    "Chunked prefill": partial(
        _with_options, enable_chunked_prefill=True, max_num_batched_tokens=32
    ),
    "Structured output": _structured_output,
    "Log-probabilities": _logprobs,
    "N-gram speculation": _ngram_speculation,
    "LoRA": _lora,
    "Compiled graphs": partial(_with_options, enforce_eager=False),
    "Reloading weights in place": _reload,
    "Sleep and wake": _sleep,
    "CPU offload": partial(_with_options, cpu_offload_gb=1),
    "FP8 KV cache, on and off": _fp8_kv_cache,
    "Embeddings": _embeddings,
}
