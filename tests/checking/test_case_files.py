# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of odd layouts that people reported: each loads whole, or is refused by name."""

import re
from collections import Counter

import pytest
import vision_classes
from case_files import CASES, write_case

from vllm_nvfp4.checking.check import engine_arguments, examine
from vllm_nvfp4.compat import cpu_metadata

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True, scope="module")
def _environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        cpu_metadata.apply()
        vision_classes.install()
        yield


def quantised(report):
    counts = Counter()
    for layer in report.layers:
        if "16 bits" not in layer.form and "widened" not in layer.path:
            counts[layer.part] += layer.count
    return counts


@pytest.mark.parametrize("name", CASES)
def test_it_loads_whole_or_is_refused_by_name(name, tmp_path):
    case = CASES[name]
    folder = write_case(case, tmp_path)
    report = examine(engine_arguments(str(folder), ["--enforce-eager"]))
    said = [str(finding) for finding in (*report.errors, *report.dropped)]
    if case.error:
        assert any(re.search(case.error, line) for line in said), said
        assert not report.will_load
    else:
        assert not said
        assert quantised(report) == case.quantised
