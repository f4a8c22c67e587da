# SPDX-License-Identifier: Apache-2.0
"""plan: bytes against real tensors, the roofline by hand, errors, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from vllm_nvfp4.checkpoints.headers import read_headers
from vllm_nvfp4.checkpoints.write import write_nvfp4
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.layout import pack_weight
from vllm_nvfp4.numerics.quantize import quantize_mxfp4, quantize_nvfp4
from vllm_nvfp4.planning import model as planning
from vllm_nvfp4.planning.shapes import find_shape
from vllm_nvfp4.testing.tiny_models import build_model


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen3", "gemma3"])
def test_checkpoint_bytes_to_the_byte(family, tmp_path):
    build_model(family).save_pretrained(tmp_path / "bf16")
    write_nvfp4(tmp_path / "bf16", tmp_path / "nvfp4", method="rtn")
    for name in ("bf16", "nvfp4"):
        stored = sum(t.num_bytes for t in read_headers(tmp_path / name).values())
        shape = find_shape(str(tmp_path / name))
        bf16 = planning.weights_of(shape, "bf16").total
        assert stored == (bf16 if name == "bf16" else planning.stored_nvfp4_bytes(shape))


def test_a_mixture_of_experts_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "hidden_size": 64}')
    with pytest.raises(ValueError, match="plan knows the dense families"):
        find_shape(str(tmp_path))


@pytest.mark.parametrize(("n", "k"), [(16, 64), (48, 96), (50, 160)])
def test_held_bytes_are_those_of_packed_tensors(n, k):
    weight = torch.randn(n, k)
    for fmt, quantized in (("nvfp4", quantize_nvfp4(weight)), ("mxfp4", quantize_mxfp4(weight))):
        packed = pack_weight(quantized)
        tensors = (packed.codes, packed.block_scale, packed.global_scale)
        assert planning.held_bytes(n, k, fmt) == sum(t.nbytes for t in tensors)


def test_llama_70b_does_not_fit_24_gb_and_the_roofline_is_bytes_over_bandwidth(capsys):
    assert main(["plan", "Llama-3.1-70B", "--json", "--gpu", "RTX 4090"]) == 0
    plan = json.loads(capsys.readouterr().out)
    row = plan["formats"][-1]
    linear = 80 * (10240 * 8192 + 8192 * 8192 + 3 * 28672 * 8192)
    assert row["weight_bytes"] > linear * 4.5 / 8
    assert not row["fits"]
    assert row["limit_tokens_per_s"] == pytest.approx(1008e9 / row["step_bytes"])
    assert row["kv_bytes"] == 8192 * 2 * 80 * 8 * 128


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["Qwen3-8B", "--gpu", "RTX 9"], "cards:"),
        (["Qwen3-8B", "--context", "99999999"], "takes 1 to 40960"),
        (["Qwen3-8B", "--concurrency", "0"], "1 or more"),
        (["a.gguf"], "config.json"),
        (["nothing"], "Qwen3-8B"),
    ],
)
def test_wrong_input_says_what_is_accepted(args, words, capsys):
    assert main(["plan", *args]) == 1
    assert words in capsys.readouterr().err


def test_plan_imports_no_torch():
    code = (
        "import sys; from vllm_nvfp4.cli.main import main; main(['plan', 'Qwen3-8B']);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
