# SPDX-License-Identifier: Apache-2.0
"""What `quantize` writes of families with experts of their own, served by a real engine against
stock vLLM on the same weights dequantised."""

from __future__ import annotations

from pathlib import Path

import pytest
import vision_classes

from vllm_nvfp4.checkpoints.headers import read_headers
from vllm_nvfp4.checkpoints.quantizer import DataFree
from vllm_nvfp4.checkpoints.write import WriteOptions, write_resumable
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.testing.architectures import ARCHITECTURES, write_architecture
from vllm_nvfp4.testing.model_sweep import (
    TOLERANCE,
    quantised_share,
    serve,
    stored_matrices,
    write_twin,
)
from vllm_nvfp4.testing.tiny_models import build_tokenizer

pytestmark = pytest.mark.vllm
TEXT = ["--samples", "4", "--sample-length", "64"]


def served_right(plain: Path, folder: Path, work: Path) -> float:
    """The share of the elements that is quantised."""
    matrices = stored_matrices(folder, plain)
    assert write_twin(plain, matrices, work / "twin") == 0
    answer, held = serve(folder, "float32")
    expected, _ = serve(work / "twin", "float32", quantization=None)
    assert answer.deviation(expected) < TOLERANCE["float32"]
    assert sum(m.numel() for m in held) == sum(m.numel() for m in matrices)
    return quantised_share(matrices, plain)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt-oss", ["--method", "mse"]),  # biases, rows of gate and up in turns
        ("gpt-oss", ["--method", "rtn", "--format", "compressed-tensors"]),
        ("gpt-oss", ["--method", "gptq", *TEXT]),
        ("llama4", ["--method", "gptq", *TEXT]),  # its router multiplies the inputs
    ],
)
def test_experts_as_written(family, options, tmp_path):
    vision_classes.install()
    plain = write_architecture(tmp_path / "plain", ARCHITECTURES[family])
    build_tokenizer().save_pretrained(plain)
    assert main(["quantize", str(plain), "-o", str(tmp_path / "out"), *options]) == 0
    assert served_right(plain, tmp_path / "out", tmp_path) > 0.5


def test_a_stack_of_which_nothing_is_quantised_stays_one(tmp_path):
    """vLLM's gpt-oss takes no expert alone in 16 bits."""
    plain = write_architecture(tmp_path / "plain", ARCHITECTURES["gpt-oss"])
    kept = "model.layers.1.mlp.experts"

    def formats(work, asked):
        return {n: "bf16" if n.startswith(kept) else "nvfp4" for n in asked}

    write_resumable(plain, tmp_path / "out", DataFree("rtn"), WriteOptions(precision=formats))
    names = {n for n in read_headers(tmp_path / "out") if n.startswith(kept)}
    leaves = ("down_proj", "down_proj_bias", "gate_up_proj", "gate_up_proj_bias")
    assert names == {f"{kept}.{leaf}" for leaf in leaves}
    assert 0.3 < served_right(plain, tmp_path / "out", tmp_path) < 0.6
