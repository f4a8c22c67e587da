# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: the same tokens, and a draft that is the target is nearly always right."""

import pytest
from serving_cases import KEEP_KV, NUM_TOKENS, PROMPT

from vllm_nvfp4.testing.checkpoints import extract_fixture
from vllm_nvfp4.testing.engine import ask_engine, engine
from vllm_nvfp4.testing.tiny_models import write_model

pytestmark = pytest.mark.vllm

AHEAD = 3


def tokens_and_acceptance(target, draft):
    """Greedy tokens, and the share of drafted tokens that the target took; None without a draft."""
    options = {"additional_config": KEEP_KV, "dtype": "float32", "disable_log_stats": False}
    if draft is not None:
        options["speculative_config"] = {
            "method": "draft_model",
            "model": str(draft),
            "quantization": "nvfp4",
            "num_speculative_tokens": AHEAD,
        }
    with engine(target, **options) as llm:
        tokens = ask_engine(llm, PROMPT, NUM_TOKENS).tokens
        counts = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    drafted = counts.get("vllm:spec_decode_num_draft_tokens", 0)
    if draft is None:
        return tokens, None
    assert drafted >= NUM_TOKENS // (AHEAD + 1)
    return tokens, counts["vllm:spec_decode_num_accepted_tokens"] / drafted


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "stored": extract_fixture("modelopt/w4a16-llama", folder),
        "16 bits": write_model(folder / "dense", "llama"),
        "other": write_model(folder / "other", "llama", seed=7),
    }


@pytest.mark.parametrize("form", ["stored", "16 bits"])
def test_a_draft_that_is_the_target_is_taken(form, folders):
    """Both are read, or quantised while they load, to the same numbers; another draft is not."""
    target = folders[form]
    alone, _ = tokens_and_acceptance(target, None)
    tokens, acceptance = tokens_and_acceptance(target, target)
    assert tokens == alone
    assert acceptance > 0.9
    if form == "stored":
        tokens, acceptance = tokens_and_acceptance(target, folders["other"])
        assert tokens == alone
        assert acceptance < 0.5
