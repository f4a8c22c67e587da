# SPDX-License-Identifier: Apache-2.0
"""The process that check, inspect and plan ask: what it imports, and that it answers at once."""

import json
import re
import subprocess
import sys

import pytest

from vllm_nvfp4.checking.report import from_json
from vllm_nvfp4.compat import lean
from vllm_nvfp4.testing.checkpoints import extract_fixture


@pytest.mark.vllm
def test_what_is_left_out_is_neither_imported_nor_missed(tmp_path):
    folder = extract_fixture("modelopt/w4a16-llama", tmp_path)
    command = [sys.executable, "-X", "importtime", "-m", "vllm_nvfp4.checking.check", lean.FLAG]
    ended = subprocess.run(
        [*command, str(folder), "--enforce-eager"], capture_output=True, text=True
    )
    report = from_json(json.loads(lean.last_line(ended.stdout, '{"schema"')))
    assert (ended.returncode, report.is_right) == (0, True)
    imported = set(re.findall(r"^import time:.*\| +([\w.]+)$", ended.stderr, re.MULTILINE))
    assert "vllm.engine.arg_utils" in imported
    assert not imported & {"torch._inductor.ir", "torch._inductor.compile_fx", "scipy.linalg"}
    words = re.sub(r"^import time:.*\n", "", ended.stderr, flags=re.MULTILINE)
    assert not lean.is_missed(words), words
