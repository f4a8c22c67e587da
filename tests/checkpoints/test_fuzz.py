# SPDX-License-Identifier: Apache-2.0
"""Hostile and broken checkpoints: refused in one line, or read as an independent reader does.

A short sample of what tests/trust/test_fuzz_loaders.py does; and every case that was found once.
"""

from __future__ import annotations

import pytest
from fuzz_corpus import entries_of, read_corpus
from fuzz_files import Node
from fuzz_mutations import MUTATIONS, choose
from fuzz_pool import Pool
from fuzz_strategies import headers, quantization_configs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_nvfp4.checkpoints.source import Source
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.testing.tiny_models import write_model

# A seed of each dialect.
STARTS = ("leg", "sh", "fp", "moe_m", "16", "gpt")
SAMPLE = settings(
    max_examples=120,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def pool():
    with Pool(1) as pool:
        yield pool


def test_every_mutation_alone(pool):
    """On one checkpoint of each dialect; and neither all is refused nor all accepted."""
    seeds = [name for name in pool.seeds if name.startswith(STARTS)]
    cases = [
        (seed, [name], number)
        for number in range(3)
        for seed in seeds[number::3]
        for name in MUTATIONS
    ]
    pool.counts.clear()
    assert pool.run(cases) == []
    assert pool.counts["accepted"] > 10
    assert pool.counts["refused"] > 100


def test_mutations_together(pool):
    seeds = pool.seeds
    assert pool.run((seeds[n % len(seeds)], choose(n), n) for n in range(30_000, 30_200)) == []


@pytest.mark.parametrize("number", range(len(read_corpus())))
def test_what_was_found_once(pool, number):
    case = read_corpus()[number]
    outcome = pool.run_one((case["seed"], entries_of(case, pool.read_seed(case["seed"]))))
    assert outcome.kind != "fault", outcome.text


@SAMPLE
@given(st.data())
def test_any_configuration(pool, data):
    seed = data.draw(st.sampled_from(pool.seeds))
    outcome = pool.run_one((seed, data.draw(quantization_configs())))
    assert outcome.kind != "fault", outcome.text


@SAMPLE
@given(entries=headers())
def test_any_header(pool, entries):
    outcome = pool.run_one(("16-bit modelopt/nvfp4-qwen3", entries))
    assert outcome.kind != "fault", outcome.text


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"config.json": Node(b"../outside/secret.json", "link")}, "found a link to "),
        ({"config.json": Node(b"config.json", "link")}, "a broken link"),
        ({"config.json": Node(size=2**35)}, "found 34359738368 bytes"),
        ({"model.safetensors.index.json": Node(kind="fifo")}, "a folder, pipe or device"),
        ({"model.safetensors": Node(b"../outside/secret.safetensors", "link")}, "found a link to "),
        ({"config.json": Node(b'{"a":' * 100_000)}, "nesting without end"),
        ({"config.json": Node(b'{"num_hidden_layers": 1000000000000}')}, "2 of 1000000000000 lay"),
    ],
)
def test_the_refusal_says_what_it_is(pool, entries, words):
    outcome = pool.run_one(("modelopt/nvfp4-kv8-llama", entries))
    assert outcome.kind == "refused"
    assert words in outcome.text


def test_a_source_to_quantise_is_read_as_carefully(tmp_path):
    """What `quantize` reads: neither a link out of the folder nor a file that is cut off."""
    folder = write_model(tmp_path / "model", "llama")
    path = folder / "model.safetensors"
    path.rename(tmp_path / "secret.safetensors")
    path.symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(CheckpointError, match="found a link to"):
        Source(folder)
    path.unlink()
    path.write_bytes((tmp_path / "secret.safetensors").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        Source(folder)
    (tmp_path / "secret.safetensors").rename(path)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="nesting without end"):
        Source(folder).config()


# --- the fuzz itself sees what it is to see -------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("crash", "the interpreter died with -11"),
        ("hang", "no answer in 5 s"),
        ("memory", "MemoryError"),
        ("outside", "outside the folder"),
        ("wrong", "values differ, first"),
        ("raises", "KeyError"),
    ],
)
def test_planted_faults_are_noticed(fault, words, monkeypatch):
    monkeypatch.setattr("fuzz_pool.HANG_SECONDS", 5)
    with Pool(1, plant=fault) as pool:
        outcome = pool.run_one(("legacy", {}))
        assert outcome.kind == "fault"
        assert words in outcome.text
        assert pool.counts["fault"] == 1
