# SPDX-License-Identifier: Apache-2.0
"""Tasks of `vllm-nvfp4 quality` through lm-eval and vLLM, on a task of a few local lines."""

import json

import pytest

from vllm_nvfp4.checkpoints.write import write_nvfp4
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.quality.tasks import Tasks, task_rows
from vllm_nvfp4.testing.engine import ENVIRONMENT
from vllm_nvfp4.testing.tiny_models import write_model

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
NUM_QUESTIONS = 12


@pytest.fixture
def folder(tmp_path, monkeypatch):
    variables = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    for name, value in (ENVIRONMENT | variables).items():
        monkeypatch.setenv(name, value)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    lines = [{"question": f"Is {i} even? ", "answer": i % 2} for i in range(NUM_QUESTIONS)]
    (tasks / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tasks / "local.yaml").write_text(TASK.format(file=tasks / "test.jsonl"))
    return tasks


@pytest.mark.vllm
def test_local_task_against_the_reference(folder, tmp_path, capfd):
    plain = write_model(tmp_path / "plain", "llama")
    write_nvfp4(plain, tmp_path / "nvfp4", method="rtn")
    command = ["quality", str(tmp_path / "nvfp4"), "--reference", str(plain), "--json"]
    command += ["--windows", "1", "--window-length", "64", "--tasks", "local_choice"]
    command += ["--task-path", str(folder), "--", "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", str(1 << 28)]
    assert main(command) == 0
    rows = {row["metric"]: row for row in json.loads(capfd.readouterr().out)["rows"]}
    row = rows["local_choice, acc"]
    for value in (row["value"], row["reference"]):
        assert 0 <= value <= 1
        assert value * NUM_QUESTIONS == pytest.approx(round(value * NUM_QUESTIONS))
    assert row["difference"] == pytest.approx(row["value"] - row["reference"])
    assert row["standard_error"] is not None


def result(values, error=0.1):
    samples = [{"doc_id": i, "filter": "none", "acc": v} for i, v in enumerate(values)]
    mean = sum(values) / len(values)
    scores = {"alias": "t", "acc,none": mean, "acc_stderr,none": error}
    return {
        "results": {"t": scores, "g": scores},
        "samples": {"t": samples},
        "group_subtasks": {"g": ["t"]},
    }


def test_difference_is_paired_question_by_question():
    mine, theirs = result([1.0, 0.0, 1.0, 1.0]), result([1.0, 0.0, 1.0, 0.0])
    for row in task_rows(mine, theirs):
        assert (row.reference, row.value, row.difference) == (0.5, 0.75, 0.25)
        assert row.standard_error == pytest.approx(0.25)  # sd of 0, 0, 0, 1 is 0.5
    # Without values of each question the two errors add up.
    for found in (mine, theirs):
        found["samples"] = {}
    assert task_rows(mine, theirs)[0].standard_error == pytest.approx(0.1 * 2**0.5)
    assert task_rows(mine, None)[0].standard_error == 0.1


def test_unknown_tasks_and_folders_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"near it: .*local_choice"):
        Tasks(["local_choices"], folder).manager()
    with pytest.raises(ValueError, match="no such folder"):
        Tasks(["local_choice"], tmp_path / "none").manager()


def test_missing_lm_eval_says_how_to_get_it(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'lm-eval"):
        Tasks(["mmlu"]).manager()
