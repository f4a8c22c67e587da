# SPDX-License-Identifier: Apache-2.0
"""Features of vLLM beside the plugin (vllm_nvfp4/testing/features.py): the tokens stay the same.

In float32 a wrong answer cannot hide behind rounding: log-probabilities agree to 1e-4.
"""

from __future__ import annotations

import io
import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import ray
import torch
from serving_cases import KEEP_KV, NUM_TOKENS, PROMPT

from vllm_nvfp4.cli._server import Server
from vllm_nvfp4.testing.checkpoints import extract_fixture, write_dequantized
from vllm_nvfp4.testing.engine import ask_engine, engine
from vllm_nvfp4.testing.features import FEATURES, table

ROOT = Path(__file__).resolve().parent.parent
FLOAT32 = {"dtype": "float32", "additional_config": KEEP_KV}
LONG = [3 + (i * i + 7 * i) % 280 for i in range(100)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return extract_fixture("modelopt/w4a16-llama", tmp_path_factory.mktemp("nvfp4"))


@pytest.fixture(scope="module")
def dequantised(folder, tmp_path_factory):
    return write_dequantized(folder, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def plain(folder):
    """The short and the long prompt, with none of the features."""
    options = {"enable_prefix_caching": False, "enable_chunked_prefill": False}
    with engine(folder, **FLOAT32, **options) as llm:
        return {len(p): ask_engine(llm, p, NUM_TOKENS) for p in (PROMPT, LONG)}


def greedy(llm, prompts, num_tokens=NUM_TOKENS, **sampling):
    """One request output per prompt, of token ids."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=-1, **sampling
    )
    return llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)


def check(outputs, answer):
    """Tokens and log-probabilities of an output, against an answer of the plain run."""
    output = outputs.outputs[0]
    assert list(output.token_ids) == answer.tokens
    found = [[row[token].logprob for token in sorted(row)] for row in output.logprobs]
    assert (torch.tensor(found) - answer.logprobs[-len(found) :]).abs().max() < 1e-4


@pytest.mark.vllm
def test_prefix_caching(folder, plain):
    with engine(folder, enable_prefix_caching=True, block_size=32, **FLOAT32) as llm:
        first, second = (greedy(llm, [LONG])[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 96)
    for output in (first, second):
        check(output, plain[len(LONG)])


@pytest.mark.vllm
def test_chunked_prefill(folder, plain):
    """Twelve tokens decode while the hundred of the other prompt come in pieces of up to 32."""
    options = {"enable_chunked_prefill": True, "max_num_batched_tokens": 32}
    with engine(folder, **FLOAT32, **options) as llm:
        for output, prompt in zip(greedy(llm, [PROMPT, LONG]), (PROMPT, LONG), strict=True):
            check(output, plain[len(prompt)])


@pytest.mark.vllm
def test_structured_output(folder, dequantised):
    from transformers import AutoTokenizer
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "large": {"type": "boolean"}},
        "required": ["city", "large"],
        "additionalProperties": False,
    }
    constraint = StructuredOutputsParams(json=schema)
    parameters = SamplingParams(temperature=0, max_tokens=64, structured_outputs=constraint)
    texts = []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for model, quantization in ((folder, "nvfp4"), (dequantised, None)):
        options = {"backend": "xgrammar", "disable_any_whitespace": True}
        options = {"quantization": quantization, "structured_outputs_config": options}
        with engine(model, **FLOAT32, **options) as llm:
            prompt = {"prompt_token_ids": PROMPT}
            output = llm.generate([prompt], parameters, use_tqdm=False)[0].outputs[0]
            texts.append(tokenizer.decode(output.token_ids, skip_special_tokens=True))
    answer = json.loads(texts[0])
    assert answer["city"] in ("Paris", "Rome")
    assert isinstance(answer["large"], bool)
    assert texts[0] == texts[1]


@pytest.mark.vllm
def test_logprobs(folder, dequantised, plain):
    """Of prompt and answer, over the whole vocabulary, against the weights written out."""
    with engine(dequantised, quantization=None, **FLOAT32) as llm:
        for prompt in (PROMPT, LONG):
            expected = ask_engine(llm, prompt, NUM_TOKENS)
            assert plain[len(prompt)].tokens == expected.tokens
            assert (plain[len(prompt)].logprobs - expected.logprobs).abs().max() < 1e-4


@pytest.mark.vllm
def test_ngram_speculation(folder, plain):
    speculation = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    }
    options = {"speculative_config": speculation, "disable_log_stats": False}
    with engine(folder, **FLOAT32, **options) as llm:
        outputs = greedy(llm, [PROMPT, LONG])
        metrics = {m.name: m for m in llm.get_metrics()}
    assert metrics["vllm:spec_decode_num_drafts"].value > 0
    for output, prompt in zip(outputs, (PROMPT, LONG), strict=True):
        check(output, plain[len(prompt)])


@pytest.mark.vllm
@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_kv_cache(cache, folder, dequantised, plain):
    """BF16 activations: as far from float32 as BF16 weights with the same cache are."""
    exact = plain[len(LONG)].logprobs[: len(LONG) - 1]
    errors = []
    for model, quantization in ((folder, "nvfp4"), (dequantised, None)):
        options = {"dtype": "bfloat16", "quantization": quantization, "kv_cache_dtype": cache}
        with engine(model, additional_config=KEEP_KV, **options) as llm:
            found = ask_engine(llm, LONG, 1).logprobs[: len(LONG) - 1]
        errors.append((found - exact).square().mean().sqrt().item())
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.vllm
def test_embeddings(folder, dequantised):
    vectors = []
    for model, quantization in ((folder, "nvfp4"), (dequantised, None)):
        options = {"quantization": quantization, "runner": "pooling", "convert": "embed"}
        with engine(model, **FLOAT32, **options) as llm:
            outputs = llm.embed([{"prompt_token_ids": p} for p in (PROMPT, LONG)], use_tqdm=False)
            vectors.append(torch.tensor([o.outputs.embedding for o in outputs]))
    assert (vectors[0] - vectors[1]).abs().max() < 1e-5
    assert (vectors[0][0] - vectors[0][1]).abs().max() > 1e-2


@pytest.mark.vllm
def test_pipeline_parallel(folder, plain, monkeypatch):
    """Traced but not compiled: only so does vLLM's CPU backend make room for a stage's input."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = {
        "pipeline_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "enforce_eager": False,
        "compilation_config": {"mode": 2, "backend": "eager"},
    }
    with engine(folder, **FLOAT32, **options) as llm:
        for output, prompt in zip(greedy(llm, [PROMPT, LONG]), (PROMPT, LONG), strict=True):
            check(output, plain[len(prompt)])


@pytest.mark.vllm
def test_data_parallel(folder, plain, tmp_path, monkeypatch):
    """Over HTTP: vLLM shares requests out among the replicas of a server only."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    flags = ["--data-parallel-size", "2", "--dtype", "float32", "--enforce-eager"]
    flags += ["--additional-config", json.dumps(KEEP_KV), "--max-model-len", "128"]
    flags += ["--skip-tokenizer-init", "--kv-cache-memory-bytes", str(2**26)]
    extra = {"detokenize": False, "return_token_ids": True, "ignore_eos": True}
    with Server([str(folder), *flags], tmp_path / "log") as server:
        server.wait_ready(io.StringIO())
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")

        def ask(prompt):
            answer = client.completions.create(
                model=str(folder),
                prompt=prompt,
                max_tokens=NUM_TOKENS,
                temperature=0,
                extra_body=extra,
            )
            return answer.choices[0].token_ids

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, [PROMPT, LONG] * 4))
        metrics = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    assert answers == [plain[len(p)].tokens for p in (PROMPT, LONG)] * 4
    shares = re.findall(r'^vllm:request_success_total{.*engine="(\d)".*} (\d+)', metrics, re.M)
    assert {engine for engine, count in shares if int(count)} == {"0", "1"}


@pytest.mark.vllm
def test_ray_worker(folder, plain):
    """vLLM's CPU platform has no Ray executor; a Ray worker of its own loads the plugin."""
    with (
        pytest.raises(ValueError, match="platform cpu does not support ray"),
        engine(folder, distributed_executor_backend="ray"),
    ):
        pass
    ray.shutdown()  # vLLM connects before it refuses

    def work(folder, prompt, num_tokens, config):
        from vllm_nvfp4.testing.engine import ask_engine, engine

        with engine(folder, dtype="float32", additional_config=config) as llm:
            executor = llm.llm_engine.engine_core.engine_core.model_executor
            model = executor.driver_worker.worker.model_runner.model
            layer = model.get_submodule("model.layers.0.mlp.down_proj")
            return ask_engine(llm, prompt, num_tokens).tokens, type(layer.quant_method).__name__

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        running = ray.remote(num_cpus=1)(work).remote(str(folder), PROMPT, NUM_TOKENS, KEEP_KV)
        tokens, method = ray.get(running)
    finally:
        ray.shutdown()
    assert tokens == plain[len(PROMPT)].tokens
    assert method == "NvFp4LinearMethod"


@pytest.mark.vllm
def test_sleep_is_refused(folder):
    with (
        pytest.raises(ValueError, match="Sleep mode is not supported on current platform"),
        engine(folder, enable_sleep_mode=True),
    ):
        pass


@pytest.mark.vllm
def test_cpu_offload(folder, plain):
    with engine(folder, cpu_offload_gb=1, **FLOAT32) as llm:
        assert llm.llm_engine.vllm_config.offload_config.uva.cpu_offload_gb == 1
        check(greedy(llm, [PROMPT])[0], plain[len(PROMPT)])


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_every_feature_has_its_test(feature):
    file, _, name = feature.test.partition("::")
    assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text()


def test_the_readme_has_the_table():
    assert table() in (ROOT / "README.md").read_text()
