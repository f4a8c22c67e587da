# SPDX-License-Identifier: Apache-2.0
"""Features of vLLM beside the plugin (vllm_nvfp4/testing/features.py): the tokens stay the same.

tests/trust/test_scale_out.py runs what takes several processes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from vllm_nvfp4.testing.checkpoints import extract_fixture, write_dequantized
from vllm_nvfp4.testing.engine import engine
from vllm_nvfp4.testing.feature_checks import (
    CHECKS,
    KEEP_KV,
    LONG,
    NUM_TOKENS,
    PROMPT,
    Differs,
    compare,
    make_setup,
)
from vllm_nvfp4.testing.features import FEATURES, table

ROOT = Path(__file__).resolve().parents[2]
# Each is checked where its test says.
HERE = [
    pytest.param(f.name, marks=[pytest.mark.cpu_path] if "KV cache" in f.name else [])
    for f in FEATURES
    if f.test == "layers/test_features.py::test_the_same_answers"
]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = extract_fixture("modelopt/w4a16-llama", tmp_path_factory.mktemp("nvfp4"))
    plain = write_dequantized(folder, tmp_path_factory.mktemp("plain"))
    return make_setup(folder, plain, tmp_path_factory.mktemp("scratch"), "float32")


@pytest.mark.vllm
@pytest.mark.parametrize("name", HERE)
def test_the_same_answers(name, setup):
    CHECKS[name](setup)


@pytest.mark.vllm
def test_other_answers_are_noticed(setup):
    answer = setup.plain[len(LONG)]
    new = answer.logprobs[-NUM_TOKENS:]
    compare(setup, answer.tokens, new, answer)
    with pytest.raises(Differs, match="token 3 is 7, not"):
        compare(setup, [*answer.tokens[:3], 7, *answer.tokens[4:]], new, answer)
    with pytest.raises(Differs, match="a log-probability is off by"):
        compare(setup, answer.tokens, new + 1e-3, answer)


@pytest.mark.vllm
def test_ray_worker(setup, monkeypatch):
    """vLLM's CPU platform has no Ray executor; a Ray worker of its own loads the plugin."""
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else it waits for whatever else runs
    with (
        pytest.raises(ValueError, match="platform cpu does not support ray"),
        engine(setup.folder, distributed_executor_backend="ray"),
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
        running = ray.remote(num_cpus=1)(work).remote(
            str(setup.folder), PROMPT, NUM_TOKENS, KEEP_KV
        )
        tokens, method = ray.get(running)
    finally:
        ray.shutdown()
    assert tokens == setup.plain[len(PROMPT)].tokens
    assert method == "NvFp4LinearMethod"


@pytest.mark.vllm
def test_sleep_is_refused(setup):
    with (
        pytest.raises(ValueError, match="Sleep mode is not supported on current platform"),
        engine(setup.folder, enable_sleep_mode=True),
    ):
        pass


def test_every_feature_has_its_check():
    assert [f.name for f in FEATURES] == list(CHECKS)


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_every_feature_has_its_test(feature):
    file, _, name = feature.test.partition("::")
    assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text()


def test_the_page_has_the_table():
    assert table() in (ROOT / "docs" / "features.md").read_text()
