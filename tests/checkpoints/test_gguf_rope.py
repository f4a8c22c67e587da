# SPDX-License-Identifier: Apache-2.0
"""Scaled rotary positions of a GGUF file are the model's, or an error."""

import numpy as np
import pytest
import torch
from gguf_files import TYPE, write_gguf
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vllm_nvfp4.checkpoints.gguf import gguf_to_folder, write_fp4
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.testing.checkpoints import extract_fixture
from vllm_nvfp4.testing.tiny_models import write_model

HEAD_SIZE = 32


def frequencies(folder):
    return LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder)).inv_freq


def plain():
    return 1 / 10000.0 ** (torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)


def with_factors(factors):
    def edit(tensors):
        tensors["rope_freqs.weight"] = np.asarray(factors, np.float32), TYPE.F32

    return edit


@pytest.mark.parametrize("is_fp4", [True, False])
def test_llama_3s_factors_come_back(is_fp4, tmp_path):
    """The factors are those of transformers' own Llama 3, as llama.cpp stores them."""
    source = write_model(tmp_path / "plain", "llama")
    config = AutoConfig.from_pretrained(source)
    config.rope_parameters = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 10000.0,
    }  # fmt: skip
    scaled = LlamaRotaryEmbedding(config).inv_freq
    factors = plain() / scaled
    assert len(factors.unique()) > 2
    assert factors.max() > 31
    if is_fp4:
        source = extract_fixture("modelopt/w4a16-llama", tmp_path)
    path = write_gguf(source, tmp_path / "model.gguf", with_factors(factors))
    out = tmp_path / "out"
    write_fp4(path, out, None) if is_fp4 else gguf_to_folder(path, out)
    torch.testing.assert_close(frequencies(out), scaled, rtol=1e-6, atol=0)


def test_factors_of_one_change_nothing(tmp_path):
    source = extract_fixture("modelopt/w4a16-llama", tmp_path)
    path = write_gguf(source, tmp_path / "model.gguf", with_factors([1.0] * (HEAD_SIZE // 2)))
    write_fp4(path, tmp_path / "out", None)
    torch.testing.assert_close(frequencies(tmp_path / "out"), plain(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("is_fp4", [True, False])
def test_other_scalings_are_refused(is_fp4, tmp_path):
    source = extract_fixture("modelopt/w4a16-llama", tmp_path)
    if not is_fp4:
        source = write_model(tmp_path / "plain", "llama")
    read = (
        (lambda path: write_fp4(path, tmp_path / "out", None))
        if is_fp4
        else (lambda path: gguf_to_folder(path, tmp_path / "out"))
    )
    path = write_gguf(source, tmp_path / "a.gguf", with_factors(range(1, HEAD_SIZE // 2 + 1)))
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight: found other factors"):
        read(path)
    path = write_gguf(
        source,
        tmp_path / "b.gguf",
        describe=lambda w: w.add_string("llama.rope.scaling.type", "yarn"),
    )
    with pytest.raises(CheckpointError, match=r"llama\.rope\.scaling\.type: found yarn"):
        read(path)
