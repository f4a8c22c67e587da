# SPDX-License-Identifier: Apache-2.0
"""The time left of a quantisation, by what the phases of a real one took."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from vllm_nvfp4.checkpoints.source import Source
from vllm_nvfp4.checkpoints.units import by_layer
from vllm_nvfp4.cli._quantize_progress import TITLE, Progress
from vllm_nvfp4.serving import progress

TOKENS = 8 * 1024
EXPERTS = 8
FORWARD = 0.70
# CPU seconds of SmolLM2-135M by gptq on an EPYC with AVX512-BF16, one thread: from the name of a
# weight to the next, after the layer's own forward passes. Of SmolLM2's layers 24 and on, as
# make_upcycled_moe.py makes them, the MLP is that of a mixture.
ATTENTION = [("self_attn.q_proj", 0.62), ("self_attn.o_proj", 0.38)]
DENSE = [*ATTENTION, ("mlp.gate_proj", 1.42), ("mlp.down_proj", 0.77)]
ROUTED = [
    *((f"mlp.experts.{e}.gate_proj", 0.45) for e in range(EXPERTS)),
    *((f"mlp.experts.{e}.down_proj", 0.28) for e in range(EXPERTS - 1)),
    (f"mlp.experts.{EXPERTS - 1}.down_proj", 0.67),
]
MIXTURE = [*ATTENTION, *ROUTED]
MIXTURE += [("mlp.shared_experts.gate_proj", 0.53), ("mlp.shared_experts.down_proj", 0.33)]


def write_shapes(folder: Path, first_moe: int) -> None:
    """A checkpoint of SmolLM2's sizes that holds no weights: its file is a hole."""
    import torch

    config = Glm4MoeConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        moe_intermediate_size=768,
        num_experts_per_tok=2,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        first_k_dense_replace=first_moe,
        tie_word_embeddings=True,
        architectures=["Glm4MoeForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = Glm4MoeForCausalLM(config).state_dict()
    header, end = {}, 0
    for name, tensor in state.items():
        stem, is_routed, leaf = name.partition(".experts.")
        parts = {name: list(tensor.shape)}
        if is_routed:
            rows = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
            shape = [tensor.shape[1] // len(rows), tensor.shape[2]]
            parts = {f"{stem}.experts.{e}.{r}.weight": shape for e in range(EXPERTS) for r in rows}
        for part, shape in parts.items():
            begin, end = end, end + 2 * torch.Size(shape).numel()
            header[part] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize(
    ("first_moe", "is_kept"), [(30, ""), (24, ""), (24, "self_attn"), (24, "experts")]
)
def test_from_a_tenth_on_the_time_left_is_right(tmp_path, monkeypatch, first_moe, is_kept):
    """Dense, a mixture after dense layers, and with a part of each layer left in 16 bits."""
    write_shapes(tmp_path, first_moe)
    source = Source(tmp_path)
    linear, _ = source.quantizable()
    quantized = {n for n in linear if not (is_kept and is_kept in n)}
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    current = progress.Step(TITLE, io.StringIO())
    prefixes = [u.prefix for u in by_layer(source.tensors, linear) if u.prefix]
    moved = Progress(current, source, quantized, "gptq", prefixes, TOKENS)
    phases: list[tuple[str, float]] = []
    for i, prefix in enumerate(prefixes):
        named = [(f"{prefix}{n}", seconds) for n, seconds in (DENSE if i < first_moe else MIXTURE)]
        named = [(n, seconds) for n, seconds in named if f"{n}.weight" in quantized]
        phases += [(named[0][0], FORWARD), *named]
    total = sum(seconds for _, seconds in phases)
    seen = []
    for name, seconds in phases:
        moved.begun(name)
        if (current.fraction or 0.0) >= 0.1 and now[0] < 0.95 * total:
            left = current.left()
            assert left is not None
            seen.append(left / (total - now[0]))
        now[0] += seconds
    assert len(seen) > len(phases) / 2
    assert 1 / 1.3 < min(seen) <= max(seen) < 1.3
