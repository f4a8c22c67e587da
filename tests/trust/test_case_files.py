# SPDX-License-Identifier: Apache-2.0
"""Every odd checkpoint of case_files through a real engine."""

import pytest
from case_files import SERVED, check_served

pytestmark = [pytest.mark.trust, pytest.mark.vllm]


@pytest.mark.parametrize("name", SERVED)
def test_it_gives_the_right_numbers_or_its_error(name, tmp_path):
    check_served(name, tmp_path)
