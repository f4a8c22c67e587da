# SPDX-License-Identifier: Apache-2.0
"""Every dialect through a real vLLM engine, against transformers with the dequantised weights."""

import pytest
import torch

from vllm_nvfp4.testing.checkpoints import (
    extract_fixture,
    fixture_names,
    give_shards_their_own_scale,
    make_legacy,
)
from vllm_nvfp4.testing.engine import ask_engine, ask_reference, engine, reference_model

PROMPT = [3, 17, 200, 45, 99, 120, 7, 64, 250, 31, 12, 180]
NUM_TOKENS = 12
KEEP_KV = {"nvfp4": {"kv_cache": "keep"}}

pytestmark = pytest.mark.vllm


def compare(folder, atol, **options):
    """Greedy tokens equal, and log-probabilities within ``atol``, in float32 arithmetic."""
    expected = ask_reference(reference_model(folder, torch.float32), PROMPT, NUM_TOKENS)
    options = {"additional_config": KEEP_KV, "dtype": "float32"} | options
    with engine(folder, **options) as llm:
        answer = ask_engine(llm, PROMPT, NUM_TOKENS)
    assert answer.tokens == expected.tokens
    rows = len(PROMPT) - 1 + NUM_TOKENS
    error = (answer.logprobs - expected.logprobs[:rows]).abs().max().item()
    assert error < atol, f"log-probabilities differ by up to {error}"


@pytest.mark.parametrize("name", fixture_names())
def test_every_dialect_gives_the_tokens_of_its_dequantised_weights(name, tmp_path):
    compare(extract_fixture(name, tmp_path), atol=1e-4)


@pytest.mark.parametrize("name", ["modelopt/mixed-llama", "modelopt/w4a16-llama"])
def test_legacy_modelopt_config_file_alone(name, tmp_path):
    compare(make_legacy(extract_fixture(name, tmp_path)), atol=1e-4)


@pytest.mark.parametrize("name", ["modelopt/w4a16-llama", "compressed_tensors/nvfp4a16-qwen3"])
def test_shards_of_a_fused_layer_keep_their_own_global_scale(name, tmp_path):
    compare(give_shards_their_own_scale(extract_fixture(name, tmp_path)), atol=1e-4)
