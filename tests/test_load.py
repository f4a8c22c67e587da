# SPDX-License-Identifier: Apache-2.0
"""A short load over HTTP, and a server that loses a process; tests/trust has the long ones."""

from __future__ import annotations

import io

import pytest
from load_cases import kill_midway, put_load, server, wait_until_idle

from vllm_nvfp4.testing.checkpoints import extract_fixture

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return extract_fixture("modelopt/w4a16-llama", tmp_path_factory.mktemp("model"))


def test_clients_at_once_get_what_each_gets_alone(folder, tmp_path):
    with server(folder, tmp_path / "log") as running:
        running.wait_ready(io.StringIO())
        load = put_load(running.url, running._process.pid, clients=32, seconds=20)
        left = wait_until_idle(running.url)
    assert load.errors == []
    assert load.wrong == 0
    assert load.answers > 32
    assert load.cancelled > 0
    assert left == {}


def test_killed_worker_ends_the_server_and_a_restart_serves(folder, tmp_path):
    status, log, error = kill_midway(folder, tmp_path / "log", "Worker")
    assert status == 1
    assert "the engine process of this server has died" in log
    assert "500" in error or "Connection" in error or "Remote" in error
    with server(folder, tmp_path / "again") as running:
        running.wait_ready(io.StringIO())
        load = put_load(running.url, running._process.pid, clients=1, seconds=1)
    assert load.errors == []
    assert load.wrong == 0
    assert load.answers > 0
