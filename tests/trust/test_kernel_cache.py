# SPDX-License-Identifier: Apache-2.0
"""Twenty processes on one kernel cache, killed at random while they compile, write and read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cache_storm import storm

from vllm_nvfp4.kernels.cuda import cubins

pytestmark = pytest.mark.trust


def test_twenty_processes_killed_at_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: Callable[..., None]
) -> None:
    monkeypatch.setenv(cubins.CACHE_DIR_ENV, str(tmp_path / "cache"))
    found = storm(tmp_path, num_processes=20, num_kills=300, num_loads=60)
    count(**found._asdict())
    assert found.wrong == 0
    assert found.loads > 1000
    assert found.kills == 300
