# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-eval, with vLLM and this plugin as the model."""

from __future__ import annotations

import difflib
import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from vllm_nvfp4.compat.packages import install_hint
from vllm_nvfp4.quality.statistics import Row

_SEED = 1234


@dataclass(frozen=True)
class Tasks:
    """names:  of lm-eval's tasks or groups
    folder:    with task files (YAML) of one's own, or None
    limit:     samples of each task, or None for all
    run_code:  allow tasks that run what the model writes (humaneval)
    """

    names: Sequence[str]
    folder: Path | None = None
    limit: int | None = None
    run_code: bool = False

    def manager(self) -> Any:
        """lm-eval's task manager. Raises ValueError where lm-eval or a task is missing."""
        if util.find_spec("lm_eval") is None:
            raise ValueError(f"--tasks needs lm-eval: {install_hint('tasks')}")
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"--task-path {self.folder}: no such folder")
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(self.folder) if self.folder else None)
        known = manager.all_tasks
        for name in self.names:
            if name not in known:
                near = difflib.get_close_matches(name, known, 3)
                hint = f"; near it: {', '.join(near)}" if near else ""
                raise ValueError(
                    f"--tasks: lm-eval has no task {name!r}{hint}. Tasks of your own: --task-path."
                )
        return manager


def evaluate(
    folder: Path, tasks: Tasks, manager: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """lm-eval's own results.

    manager: of the tasks; it takes seconds to make
    options: keywords of vLLM's ``LLM``
    Raises ValueError where a task's data cannot be had, or it would run code that was not allowed.
    """
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if tasks.run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.vllm_causallms import VLLM
    from vllm.distributed import cleanup_dist_env_and_memory

    # One BOS at most, as the tokenizer puts it; the seed is of what little is drawn.
    model = VLLM(pretrained=str(folder), seed=_SEED, **options)
    try:
        return simple_evaluate(
            model=model,
            tasks=list(tasks.names),
            task_manager=manager,
            limit=tasks.limit,
            log_samples=True,
            bootstrap_iters=1000,
            confirm_run_unsafe_code=tasks.run_code,
        )
    except OSError as error:
        raise ValueError(
            f"--tasks: the data of {', '.join(tasks.names)} cannot be loaded: "
            f"{str(error).splitlines()[0]}. Without a hub, give files with --task-path."
        ) from error
    except ValueError as error:
        if "unsafe" in str(error).lower():
            raise ValueError(
                f"--tasks: one of {', '.join(tasks.names)} runs code that the model writes; "
                "--run-unsafe-code allows it"
            ) from error
        raise
    finally:
        model.model.llm_engine.engine_core.shutdown()
        del model
        cleanup_dist_env_and_memory()
        gc.collect()


def task_rows(found: Mapping[str, Any], reference: Mapping[str, Any] | None) -> list[Row]:
    """A row for each metric of each task and group.

    With a reference the standard error is of the paired difference, question by question; where a
    metric has no value per question, of two independent results.
    """
    rows = []
    for name in {**found.get("groups", {}), **found["results"]}:
        for key, value in found["results"].get(name, found.get("groups", {}).get(name)).items():
            metric, _, of_filter = key.partition(",")
            if not of_filter or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            label = f"{name}, {metric}" + ("" if of_filter == "none" else f" ({of_filter})")
            error = _number(found["results"].get(name, {}).get(f"{metric}_stderr,{of_filter}"))
            if reference is None:
                rows.append(Row(label, None, value, None, error))
                continue
            base = reference["results"][name][key]
            theirs = _number(reference["results"][name].get(f"{metric}_stderr,{of_filter}"))
            paired = _paired_error(found, reference, name, metric, of_filter)
            if paired is None and error is not None and theirs is not None:
                paired = math.hypot(error, theirs)
            rows.append(Row(label, base, value, value - base, paired))
    return rows


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _paired_error(
    found: Mapping[str, Any], reference: Mapping[str, Any], name: str, metric: str, of_filter: str
) -> float | None:
    mine, theirs = (
        {
            (task, sample["doc_id"]): float(sample[metric])
            for task in _leaves(result, name)
            for sample in result["samples"].get(task, ())
            if sample.get("filter", "none") == of_filter
            and isinstance(sample.get(metric), int | float)
        }
        for result in (found, reference)
    )
    if len(mine) < 2 or mine.keys() != theirs.keys():
        return None
    differences = np.array([mine[key] - theirs[key] for key in mine])
    return float(differences.std(ddof=1) / math.sqrt(len(differences)))


def _leaves(result: Mapping[str, Any], name: str) -> Iterator[str]:
    parts = result.get("group_subtasks", {}).get(name)
    if not parts:
        yield name
        return
    for part in parts:
        yield from _leaves(result, part)
