# SPDX-License-Identifier: Apache-2.0
"""Encoders as `quantize` writes them, served by a real engine: embeddings against stock vLLM's on
the same weights dequantised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import SIZES

from vllm_nvfp4.cli.main import main
from vllm_nvfp4.testing.engine import engine
from vllm_nvfp4.testing.model_sweep import stored_matrices, write_twin
from vllm_nvfp4.testing.tiny_models import build_tokenizer

ENCODERS = {
    "BertModel": "BertConfig",
    "RobertaModel": "RobertaConfig",
    "ModernBertModel": "ModernBertConfig",
}
PROMPTS = [[1, 5, 17, 40, 3, 99, 2], [1, 200, 31, 2]]


def write_encoder(folder: Path, name: str) -> Path:
    import transformers

    sizes = SIZES | {"num_attention_heads": 2, "num_key_value_heads": 2}  # heads of 32
    config = getattr(transformers, ENCODERS[name])(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def embeddings(folder: Path, **options) -> torch.Tensor:
    with engine(folder, runner="pooling", dtype="float32", **options) as llm:
        prompts = [{"prompt_token_ids": p} for p in PROMPTS]
        return torch.tensor([o.outputs.embedding for o in llm.embed(prompts, use_tqdm=False)])


@pytest.mark.vllm
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
def test_embeddings_are_those_of_the_dequantised_weights(name, dialect, tmp_path):
    plain = write_encoder(tmp_path / "plain", name)
    target = tmp_path / "out"
    arguments = ["quantize", str(plain), "-o", str(target), "--method", "rtn"]
    assert main([*arguments, "--format", dialect]) == 0
    matrices = stored_matrices(target, plain)
    assert matrices
    assert write_twin(plain, matrices, tmp_path / "twin") == 0
    found = embeddings(target)
    expected = embeddings(tmp_path / "twin", quantization=None)
    before = embeddings(plain, quantization=None)
    assert (found - expected).abs().max() < 1e-4
    assert (found - before).abs().max() > 0.01
