# SPDX-License-Identifier: Apache-2.0
"""Long work: one line in its place on a terminal, a line now and then without one, and phases."""

from __future__ import annotations

import io
import re
import time

import pytest

from vllm_nvfp4.serving import progress
from vllm_nvfp4.serving.phases import phase_of


class Terminal(io.StringIO):
    def isatty(self):
        return True


def wait_for(text: str, out: io.StringIO) -> None:
    deadline = time.monotonic() + 30
    while text not in out.getvalue():
        assert time.monotonic() < deadline, out.getvalue()
        time.sleep(0.01)


def test_on_a_terminal_the_line_stays_in_its_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "TERMINAL_SECONDS", 0.02)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    out, other = Terminal(), io.StringIO()
    with progress.step("Working", out) as current:
        current.detail = "a detail that is longer than the terminal is wide"
        wait_for("Working ... 0 s", out)
        current.say("a result", other)
        wait_for("a detail", out)
    text = out.getvalue()
    assert other.getvalue() == "a result\n"
    # Two lines in all, however often the one between them was written.
    first, last, rest = text.split("\n")
    assert (first, rest) == ("==> Working", "")
    assert last.count("\r\x1b[2K") >= 3
    assert last.rsplit("\r\x1b[2K", 1)[-1].startswith("    done in ")
    shown = [x for x in re.split(r"\r\x1b\[2K|\n", text) if x]
    assert max(map(len, shown)) < 40


def test_the_time_left_follows_from_the_fraction(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    current = progress.Step("Working", io.StringIO())
    current.fraction = 0.0
    now[0] += 30
    assert current.line() == "    Working ... 30 s, 0%"
    current.advance(0.25, "layer 3")
    assert current.line() == "    Working ... 30 s, 25%, about 90 s left  layer 3"
    # A run that goes on where another stopped: what was done took it no time.
    current.begin("Again")
    current.fraction = 0.5
    now[0] += 300
    current.fraction = 0.75
    assert current.line() == "    Again ... 5 min 00 s, 75%, about 5 min 00 s left"
    # It counts down while a piece is under way.
    now[0] += 60
    assert current.line() == "    Again ... 6 min 00 s, 75%, about 4 min 00 s left"
    now[0] += 600
    assert current.line().endswith("75%, about 0 s left")
    # Neither what came before the first piece nor what was skipped counts.
    current.begin("Anew")
    now[0] += 100
    current.fraction = 0.0
    current.skip(0.5)
    now[0] += 10
    current.fraction = 0.6
    assert current.line() == "    Anew ... 110 s, 60%, about 40 s left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (119, "119 s"),
        (120, "2 min 00 s"),
        (7199, "119 min 59 s"),
        (9000, "2 h 30 min"),
    ],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


# As vLLM 0.32 writes them.
LOG = """
(APIServer pid=1) INFO 11-28 18:01:00 [entry.py:1] vLLM API server version 0.32.0
(EngineCore pid=2) INFO 11-28 18:01:20 [core.py:134] Initializing a V1 LLM engine (v0.32.0) with
(EngineCore pid=2) INFO 11-28 18:01:30 [gpu_model_runner.py:5040] Starting to load model x...
Loading safetensors checkpoint shards:  50% Completed | 1/2
(EngineCore pid=2) INFO 11-28 18:01:50 [backends.py:1105] Dynamo bytecode transform time: 3.1 s
(EngineCore pid=2) INFO 11-28 18:02:10 [backends.py:399] Compiling a graph for compile range (1, 9)
(EngineCore pid=2) INFO 11-28 18:02:20 [kv_cache_utils.py:1] GPU KV cache size: 9 tokens
Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  20%|##  | 1/5
(APIServer pid=1) INFO 11-28 18:02:40 [entry.py:140] Starting vLLM server on http://x
"""
PHASES = (
    "importing vLLM",
    "starting the engine",
    "loading the weights",
    "loading the weights, 50 %",
    "compiling, first start only",
    "compiling, first start only",
    "preparing the KV cache",
    "capturing CUDA graphs, 20 %",
    "opening the port",
)


def test_phases_follow_the_log():
    lines = LOG.strip().splitlines()
    found = [phase_of("\n".join(lines[: i + 1])) for i in range(len(lines))]
    assert found == list(PHASES)
    assert phase_of("") == "importing vLLM"
    again = "\n".join(lines[:6]).replace("Compiling a graph", "Directly load the compiled graph(s)")
    assert phase_of(again) == "loading compiled code"


@pytest.mark.vllm
def test_vllm_still_writes_the_lines_that_begin_a_phase():
    """The words that phases are known by, in vLLM's own source."""
    from importlib.util import find_spec
    from pathlib import Path

    root = Path(find_spec("vllm").submodule_search_locations[0])
    sources = "".join(
        p.read_text(errors="replace")
        for folder in ("v1", "compilation", "model_executor/model_loader", "entrypoints")
        for p in (root / folder).rglob("*.py")
    )
    for words in (
        "Initializing a V1 LLM engine", "Starting to load model", "Dynamo bytecode transform",
        "Compiling a graph for", "Directly load the compiled graph", "Capturing CUDA graphs",
        "Time spent downloading weights", "Loading safetensors checkpoint shards",
    ):  # fmt: skip
        assert words in sources, words


def test_a_line_for_the_user_keeps_to_the_columns_of_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal()
    with progress.step("Work", out) as current:
        current.say("kept in 16 bits: embeddings, 21.0% of the bytes: model.embed\na  table", out)
    lines = out.getvalue().replace("\r\x1b[2K", "").splitlines()
    assert lines[1:4] == [
        "kept in 16 bits: embeddings, 21.0% of",
        "    the bytes: model.embed",
        "a  table",
    ]
