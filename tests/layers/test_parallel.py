# SPDX-License-Identifier: Apache-2.0
"""Two tensor-parallel ranks give what one gives: the cut of codes and scales is right.

In float32 the order of sums costs 1e-6, so a wrong cut cannot hide. Every stored checkpoint,
rotated ones too: tests/trust/test_scale_out.py.
"""

from dataclasses import replace

import pytest
import torch
from serving_cases import (
    KEEP_KV,
    NUM_TOKENS,
    PROMPT,
    TWO_RANKS,
    compare,
    quantise_like_online,
    write_with_vocabulary,
)
from stored_forms import store

from vllm_nvfp4.testing.architectures import ARCHITECTURES, write_architecture
from vllm_nvfp4.testing.checkpoints import (
    extract_fixture,
    forget_kv_cache,
    give_shards_their_own_scale,
)
from vllm_nvfp4.testing.engine import ask_engine, ask_reference, engine, plain_model
from vllm_nvfp4.testing.model_sweep import TOLERANCE, serve
from vllm_nvfp4.testing.tiny_models import write_model

pytestmark = [pytest.mark.vllm, pytest.mark.long]


@pytest.fixture(autouse=True)
def _one_core_per_rank(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")


@pytest.mark.parametrize(
    "name",
    [
        "modelopt/mixed-llama",
        "compressed_tensors/nvfp4a16-qwen3",
    ],
)
def test_two_ranks_give_the_same_tokens(name, tmp_path):
    folder = forget_kv_cache(extract_fixture(name, tmp_path))
    if "nvfp4a16" in name:
        give_shards_their_own_scale(folder)
    compare(folder, atol=1e-4, **TWO_RANKS)


def test_quantised_while_loading_does_not_depend_on_the_cut(tmp_path):
    folder = write_model(tmp_path / "llama", "llama")
    reference = quantise_like_online(plain_model(folder, torch.float32), "nvfp4")
    expected = ask_reference(reference, PROMPT, NUM_TOKENS)
    with engine(folder, dtype="float32", additional_config=KEEP_KV, **TWO_RANKS) as llm:
        answer = ask_engine(llm, PROMPT, NUM_TOKENS)
    assert answer.tokens == expected.tokens
    assert (answer.logprobs - expected.logprobs).abs().max() < 1e-4


def test_lm_head_and_embedding_are_cut_over_the_vocabulary(tmp_path):
    source = write_model(tmp_path / "llama", "llama")
    write_with_vocabulary(source, tmp_path / "out", "nvfp4", "fp8")
    compare(tmp_path / "out", atol=1e-4, **TWO_RANKS)


@pytest.mark.parametrize("form", ["ct", "16 bits"])
def test_a_mixer_that_cuts_its_rows_by_itself(form, tmp_path):
    """Mamba-2 with one group, stored and quantised while it loads; every form: test_cut.py."""
    granite = ARCHITECTURES["granite4"]
    granite = replace(granite, keys={**granite.keys, "mamba_proj_bias": True})
    folder = write_architecture(tmp_path, granite)
    if form != "16 bits":
        config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
        kept = ("embed", "head", "norm", "conv1d")
        store(folder, lambda n: "bf16" if any(k in n for k in kept) else form, config)
    one, matrices = serve(folder, "float32")
    assert matrices
    two, _ = serve(folder, "float32", **TWO_RANKS)
    assert two.deviation(one) < TOLERANCE["float32"]
