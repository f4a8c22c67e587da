# SPDX-License-Identifier: Apache-2.0
"""Odd checkpoints through real engines: a sample, one of each kind that no other test serves.

tests/checking/test_case_files.py looks at all of them, tests/trust/test_case_files.py serves all.
"""

import pytest
from case_files import SERVED, check_served

pytestmark = pytest.mark.vllm

SAMPLE = (
    "a list of shards, fused in the file",
    "an expert without its global scale",
    "values that are keys, attention in 16 bits",
    "KV scales of Gemma-3",
    "the rows of all experts in one matrix",
    "MLA quantised whole",
)


@pytest.mark.parametrize("name", SAMPLE)
def test_it_gives_the_right_numbers_or_its_error(name, tmp_path):
    assert name in SERVED
    check_served(name, tmp_path)
