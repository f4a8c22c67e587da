# SPDX-License-Identifier: Apache-2.0
"""The JSON of the commands: a schema number each, and every key in docs/json.md."""

from __future__ import annotations

import dataclasses
import json
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_nvfp4.bench.results import Limit, Measurement, Results, VariantRecord
from vllm_nvfp4.checking.report import Finding, LayerGroup, Report, from_json
from vllm_nvfp4.cli import doctor, main
from vllm_nvfp4.cli import quality as quality_command
from vllm_nvfp4.quality.report import as_json
from vllm_nvfp4.quality.statistics import Row
from vllm_nvfp4.testing.checkpoints import extract_fixture

ROOT = Path(__file__).parents[2]
# Tables whose keys are names of something, not of the format.
OPEN = (
    "paths",
    "four_bit_paths",
    "checkpoint_bytes",
    "machine",
    "weights",
    "weight_parts",
    "vllm",
    "versions",
)


def documented(section: str) -> set[str]:
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    [part] = re.findall(rf"^## {section}$(.*?)(?=^## |\Z)", text, re.M | re.S)
    return set(re.findall(r"`([a-z0-9_]+)`", part))


def keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if key not in OPEN:
                yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


def check(section: str, value: dict[str, Any]) -> None:
    assert next(iter(value)) == "schema" or section == "bench"
    assert value["schema"] == 1
    assert set(keys_of(value)) - documented(section) == set()


def test_doctor(capsys, monkeypatch):
    monkeypatch.setattr(
        doctor, "collect", lambda: ([doctor.Check("a", "ok", "b")], {"linear": "kernel"})
    )
    assert main.main(["doctor", "--json"]) == 0
    check("doctor", json.loads(capsys.readouterr().out))


def test_check():
    finding = Finding("a.weight", "found none; needed one.")
    group = LayerGroup("linear", "nvfp4", "CPU kernel", 2, 64)
    report = Report("m", "A", "modelopt", 1, (group,), (finding,), (finding,), {"b.*": 2}, 0.1)
    check("check", report.to_json())
    assert from_json(json.loads(json.dumps(report.to_json()))) == report


def test_inspect(capsys, tmp_path):
    folder = extract_fixture("modelopt/mixed-llama", tmp_path)
    assert main.main(["inspect", str(folder), "--json"]) == 0
    check("inspect", json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("model", ["Qwen3-30B-A3B", "Gemma3-12B"])
def test_plan(capsys, model):
    assert main.main(["plan", model, "--json"]) == 0
    check("plan", json.loads(capsys.readouterr().out))


def test_quality(tmp_path):
    args = type("Args", (), {"after_dashes": []})
    about = quality_command._about(args, tmp_path, None)
    about |= {"text": "builtin", "windows": 1, "window_length": 8, "tokens": 7}
    check("quality", as_json([Row("perplexity", None, 1.0, None, float("nan"))], about))


def test_bench():
    folder = ROOT / "benchmarks" / "results" / "smollm2_cpu"
    check("bench", json.loads(lzma.decompress((folder / "bench.json.xz").read_bytes())))
    named = {f.name for c in (Results, VariantRecord, Limit, Measurement)
             for f in dataclasses.fields(c)}  # fmt: skip
    assert named - documented("bench") == set()
