# SPDX-License-Identifier: Apache-2.0
"""vLLM's features beside this plugin: which are tested, where, and what the CPU backend refuses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Feature:
    """One row of the table in docs/features.md.

    name:  what vLLM's users call it; also its check in feature_checks.py
    flag:  how it is asked for on the command line; "" where it is part of a request
    test:  the test that compares it with the plain run, ``file.py::function``
    cpu:   how far the test goes on vLLM's CPU backend
    num_gpus: that it takes
    """

    name: str
    flag: str
    test: str
    cpu: str = "the same tokens"
    num_gpus: int = 1


_SAME = "layers/test_features.py::test_the_same_answers"
_SCALE_OUT = "trust/test_scale_out.py::test_features_of_several_processes"

FEATURES = (
    Feature(
        "Tensor parallel",
        "--tensor-parallel-size",
        "layers/test_parallel.py::test_two_ranks_give_the_same_tokens",
        num_gpus=2,
    ),
    Feature(
        "Pipeline parallel",
        "--pipeline-parallel-size",
        _SCALE_OUT,
        "the same tokens in compiled mode; in eager mode vLLM 0.32 for the CPU ends with an "
        "AssertionError, with 16-bit models too",
        num_gpus=2,
    ),
    Feature("Data parallel", "--data-parallel-size", _SCALE_OUT, num_gpus=2),
    Feature(
        "Ray",
        "--distributed-executor-backend ray",
        "layers/test_features.py::test_ray_worker",
        "refused by vLLM; an engine inside a Ray worker gives the same tokens",
    ),
    Feature("Prefix caching", "--enable-prefix-caching", _SAME),
    Feature("Chunked prefill", "--enable-chunked-prefill", _SAME),
    Feature("Structured output", "", _SAME),
    Feature("Log-probabilities", "", _SAME, "equal to 1e-4"),
    Feature("N-gram speculation", "--speculative-config", _SAME),
    Feature("LoRA", "--enable-lora", _SAME),
    Feature(
        "Compiled graphs",
        "",
        "layers/test_engine_features.py::test_compiled_graph_gives_the_tokens_of_eager_mode",
    ),
    Feature(
        "Reloading weights in place",
        "",
        "layers/test_engine_features.py::test_reloading_other_weights_in_place_gives_their_bits",
        "the same bits",
    ),
    Feature(
        "Sleep and wake",
        "--enable-sleep-mode",
        "layers/test_features.py::test_sleep_is_refused",
        "refused by vLLM",
    ),
    Feature(
        "CPU offload",
        "--cpu-offload-gb",
        _SAME,
        "the same tokens; the weights are in the CPU's memory anyway",
    ),
    Feature(
        "FP8 KV cache, on and off",
        "--kv-cache-dtype",
        _SAME,
        "as exact as 16-bit weights with the same cache; needs AVX-512 or AMX",
    ),
    Feature("Embeddings", "--runner pooling", _SAME, "equal to 1e-5"),
)


def table() -> str:
    """The features as a Markdown table."""
    rows = ["| feature | flag | on the CPU |", "| --- | --- | --- |"]
    for feature in FEATURES:
        flag = f"`{feature.flag}`" if feature.flag else ""
        rows.append(f"| {feature.name} | {flag} | {feature.cpu} |")
    return "\n".join(rows)
