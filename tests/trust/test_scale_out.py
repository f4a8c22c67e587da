# SPDX-License-Identifier: Apache-2.0
"""More than one process: replicas, and the dialects on two ranks that tests/ has no time for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from serving_cases import EXPERT_FIXTURES, TWO_RANKS, compare, compare_to, gpt_oss_answer

from vllm_nvfp4.testing.checkpoints import (
    extract_fixture,
    fixture_names,
    forget_kv_cache,
    give_shards_their_own_scale,
    to_gpt_oss_mxfp4,
    write_dequantized,
)
from vllm_nvfp4.testing.feature_checks import CHECKS, make_setup
from vllm_nvfp4.testing.features import FEATURES
from vllm_nvfp4.testing.tiny_models import write_model

pytestmark = [pytest.mark.trust, pytest.mark.vllm]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _one_core_per_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")


def test_features_of_several_processes(tmp_path: Path, count: Callable[..., None]) -> None:
    folder = extract_fixture("modelopt/w4a16-llama", tmp_path)
    plain = write_dequantized(folder, tmp_path / "plain")
    setup = make_setup(folder, plain, tmp_path, "float32")
    several = [feature.name for feature in FEATURES if feature.num_gpus > 1]
    for name in several:
        CHECKS[name](setup)
    count(features=len(several))


def test_the_features_as_gpu_check_runs_them(count: Callable[..., None]) -> None:
    only = [f"--only={name}" for name in ("Compiled graphs", "Sleep and wake")]
    script = ROOT / "benchmarks" / "check_features.py"
    done = subprocess.run([sys.executable, str(script), *only], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 0 failed, 1 not run" in done.stdout
    assert "vLLM refuses it on a CPU" in done.stdout
    count(features=2)


def test_every_dialect_on_two_ranks(tmp_path: Path, count: Callable[..., None]) -> None:
    names = fixture_names()
    for number, name in enumerate(names):
        folder = forget_kv_cache(extract_fixture(name, tmp_path / str(number)))
        compare(folder, atol=1e-4, **TWO_RANKS)
    count(checkpoints=len(names))


def test_experts_on_two_ranks(tmp_path: Path, count: Callable[..., None]) -> None:
    """Cut within each expert, and with whole experts on each rank."""
    cuts = [{}, {"enable_expert_parallel": True}]
    for name in EXPERT_FIXTURES:
        folder = extract_fixture(name, tmp_path)
        if "mxfp4" not in name:
            give_shards_their_own_scale(folder)
        for cut in cuts:
            compare(folder, atol=1e-4, **TWO_RANKS, **cut)
    count(runs=len(EXPERT_FIXTURES) * len(cuts))


def test_gpt_oss_experts_cut_over_two_ranks(tmp_path: Path, count: Callable[..., None]) -> None:
    original = to_gpt_oss_mxfp4(write_model(tmp_path / "gpt-oss", "gpt_oss"))
    compare_to(gpt_oss_answer(original), original, atol=1e-4, **TWO_RANKS)
    count(runs=1)
