# SPDX-License-Identifier: Apache-2.0
"""Settings for all tests; read before torch is imported."""

import functools
import gc
import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "support" / "lesser_cpu_site"))
import forked_questions
import forked_ranks
import lesser_cpu
import pytest
import vision_classes

lesser_cpu.install()
# transformers looks once which processors of pictures there are.
vision_classes.install()

# The tests run on two processes (see the Makefile). OpenMP threads of both on the same cores wait
# for each other in busy loops, which makes a suite of small tensors several times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _as_before_an_engine():
    """An engine in this process leaves its options' variant in force: not for the next test."""
    yield
    for name in ("cpu.linear", "cuda.devices"):
        if module := sys.modules.get(f"vllm_nvfp4.kernels.{name}"):
            module.use_variant("exact")
    # vLLM keeps its tables for the next model: those of a check in this process have no values.
    if module := sys.modules.get("vllm.model_executor.layers.rotary_embedding"):
        module._ROPE_DICT.clear()


def pytest_collection_modifyitems(items):
    """Files that take long first, then those with the most engines: one of them that is begun last
    would leave the other process idle."""
    engines = Counter(item.path for item in items if item.get_closest_marker("vllm"))
    long = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: (item.path not in long, -engines[item.path]))


@pytest.fixture(autouse=True)
def _log_level_as_it_was():
    """What a command sets for its own process is not for servers that a later test starts."""
    name = "VLLM_LOGGING_LEVEL"
    before = os.environ.get(name)
    yield
    os.environ.pop(name, None)
    if before is not None:
        os.environ[name] = before


_freeze, _thaw = gc.freeze, gc.unfreeze
_frozen_for = None


def pytest_sessionfinish():
    _thaw()


def _leave_out_what_stays(item):
    """Have collections of garbage pass over what is there before a file's tests, or an engine's.

    vLLM collects a dozen times for an engine, and a calibrated method once for a model, each time
    through the objects of all modules that are imported: longer than a tiny model's answers take.
    vLLM's own freezing would keep an engine for ever, and its thawing would bring the modules back.
    """
    global _frozen_for
    gc.freeze = gc.unfreeze = lambda: None
    if item.path != _frozen_for or item.get_closest_marker("vllm"):
        _frozen_for = item.path
        gc.collect()
        _freeze()


def pytest_runtest_setup(item):
    _leave_out_what_stays(item)
    if item.get_closest_marker("vllm"):
        _inspect_models_here()
        forked_ranks.install()


@pytest.fixture(autouse=True)
def _no_check_of_what_is_written(request, monkeypatch):
    """`quantize` asks vLLM about each checkpoint, in a process of its own that imports it: once for
    each family, in the tests that are marked so."""
    if not request.node.get_closest_marker("checks_written"):
        module = "vllm_nvfp4.cli._quantize_check"
        monkeypatch.setattr(f"{module}.check_written", lambda *_, **__: None)
        monkeypatch.setattr(f"{module}.without_plain", lambda _, table, kept, say: (table, kept))


@pytest.fixture(autouse=True)
def _questions_are_forked(request, monkeypatch):
    if not request.node.get_closest_marker("own_process"):
        monkeypatch.setattr("vllm_nvfp4.compat.lean.ask", forked_questions.ask)


@functools.cache
def _inspect_models_here():
    """On a CPU, have vLLM look at the classes of models in this process.

    For each that its cache does not know it starts a process, which imports all of vLLM again, so
    as not to initialise a GPU in this one. An engine imports the class here in any case.
    """
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        registry._run_in_subprocess = lambda inspect: inspect()


def pytest_addoption(parser):
    parser.addoption("--vllm", help="the release that `import vllm` must give; default any")
