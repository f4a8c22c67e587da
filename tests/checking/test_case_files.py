# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of odd layouts that people reported: each loads whole, or is refused by name."""

import json
import re
from collections import Counter
from functools import partial

import pytest
from case_files import CASES, write_case
from case_layouts import drop
from safetensors.torch import load_file

from vllm_nvfp4.checking.check import engine_arguments, examine
from vllm_nvfp4.compat import cpu_metadata
from vllm_nvfp4.testing.checkpoints import edit_tensors
from vllm_nvfp4.testing.drafts import write_eagle3
from vllm_nvfp4.testing.tiny_models import write_model

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True, scope="module")
def _environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        cpu_metadata.apply()
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


DRAFTS = [name for name in CASES if "draft layer" in name or name.startswith("mtp.fc")]
SPECULATION = ["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 1}']


@pytest.mark.parametrize("name", DRAFTS)
def test_the_draft_is_looked_at_too(name, tmp_path):
    folder = write_case(CASES[name], tmp_path)
    flags = ["--enforce-eager", *SPECULATION]
    report = examine(engine_arguments(str(folder), flags))
    assert report.is_right, [str(f) for f in (*report.errors, *report.dropped)]
    assert not report.left_out
    assert sum(layer.count for layer in report.layers if layer.part == "draft linear") >= 5
    gone = "o_proj.weight"
    edit_tensors(folder, partial(drop, rf"(^mtp|layers\.2)\..*{gone}$"))
    errors = examine(engine_arguments(str(folder), flags)).errors
    assert errors
    assert all("self_attn.o_proj" in error.what for error in errors)


@pytest.mark.parametrize("quantization", [None, "nvfp4"])
def test_a_draft_in_a_folder_of_its_own(quantization, tmp_path):
    target = write_model(tmp_path / "target", "llama")
    tensors = load_file(target / "model.safetensors")
    draft = write_eagle3(tmp_path / "draft", target, tensors)
    speculative = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 1}
    speculative["quantization"] = quantization
    flags = ["--enforce-eager", "--speculative-config", json.dumps(speculative)]
    report = examine(engine_arguments(str(target), flags))
    assert report.is_right, [str(f) for f in (*report.errors, *report.dropped)]
    forms = {layer.form for layer in report.layers if layer.part == "draft linear"}
    assert any("to nvfp4" in form for form in forms) == (quantization == "nvfp4")
    edit_tensors(draft, partial(drop, "midlayer.mlp.down_proj"))
    [error] = examine(engine_arguments(str(target), flags)).errors
    assert "mlp.down_proj" in error.what
