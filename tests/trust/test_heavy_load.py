# SPDX-License-Identifier: Apache-2.0
"""Five minutes of 500 requests in flight over HTTP, and servers that lose a process."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from load_cases import kill_midway, put_load, server, wait_until_idle

from vllm_nvfp4.testing.checkpoints import extract_fixture

pytestmark = [pytest.mark.trust, pytest.mark.vllm]

CLIENTS = 500
SECONDS = 300


def test_five_hundred_clients_for_five_minutes(tmp_path: Path, count: Callable[..., None]) -> None:
    folder = extract_fixture("modelopt/w4a16-llama", tmp_path)
    with server(folder, tmp_path / "log") as running:
        running.wait_ready(io.StringIO())
        load = put_load(running.url, running._process.pid, CLIENTS, SECONDS)
        left = wait_until_idle(running.url)
    count(
        clients=CLIENTS,
        answers=load.answers,
        cancelled=load.cancelled,
        errors=len(load.errors),
        wrong=load.wrong,
        memory_growth=f"{load.growth():+.2%}",
    )
    assert load.errors == []
    assert load.wrong == 0
    assert load.answers > 10 * CLIENTS
    assert load.cancelled > CLIENTS // 10
    assert left == {}
    assert load.growth() < 0.02


@pytest.mark.parametrize("target", ["EngineCore", "Worker"])
def test_killed_process_ends_the_server_and_a_restart_serves(
    target: str, tmp_path: Path, count: Callable[..., None]
) -> None:
    folder = extract_fixture("modelopt/w4a16-llama", tmp_path)
    for number in range(3):
        status, log, error = kill_midway(folder, tmp_path / f"log-{number}", target)
        assert status == 1
        assert "the engine process of this server has died" in log
        assert "500" in error or "Connection" in error or "Remote" in error
    with server(folder, tmp_path / "again") as running:
        running.wait_ready(io.StringIO())
        load = put_load(running.url, running._process.pid, clients=1, seconds=1)
    assert load.errors == []
    assert load.wrong == 0
    assert load.answers > 0
    count(servers=3)
