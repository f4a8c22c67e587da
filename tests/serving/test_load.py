# SPDX-License-Identifier: Apache-2.0
"""A short load over HTTP; tests/trust has the long one, and servers that lose a process."""

from __future__ import annotations

import io

import pytest
from load_cases import put_load, server, wait_until_idle

from vllm_nvfp4.testing.checkpoints import extract_fixture

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return extract_fixture("modelopt/w4a16-llama", tmp_path_factory.mktemp("model"))


def test_clients_at_once_get_what_each_gets_alone(folder, tmp_path):
    with server(folder, tmp_path / "log") as running:
        running.wait_ready(io.StringIO())
        load = put_load(running.url, running._process.pid, clients=32, seconds=8)
        left = wait_until_idle(running.url)
    assert load.errors == []
    assert load.wrong == 0
    assert load.answers > 32
    assert load.cancelled > 0
    assert left == {}
