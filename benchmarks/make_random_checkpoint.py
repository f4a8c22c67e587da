#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write an NVFP4 checkpoint of a real model's shapes with random weights: speed needs no more.

    python benchmarks/make_random_checkpoint.py --model Qwen3-8B --out /tmp/qwen3-8b-random

ModelOpt's dialect, one file per decoder layer, no tokenizer (serve it with skip_tokenizer_init).
The weights keep activations of order one, so that no code path sees infinities.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

from common import ROOT  # puts the checkout on sys.path  # noqa: F401

from vllm_nvfp4.testing.shapes import MODELS, TINY, ModelShape

# Small enough for a CPU; the head size is one that every attention backend takes.
FAMILIES = {
    "Qwen3-8B": ("Qwen3ForCausalLM", "qwen3"),
    "Qwen3-32B": ("Qwen3ForCausalLM", "qwen3"),
    "Llama-3.1-8B": ("LlamaForCausalLM", "llama"),
    "Llama-3.1-70B": ("LlamaForCausalLM", "llama"),
    "tiny": ("Qwen3ForCausalLM", "qwen3"),
}
INDEX_NAME = "model.safetensors.index.json"
# Block scales of 1.0 to 1.875; with random codes the weights' standard deviation is about
# 3.7 * global_scale.
_SCALE_BITS = (0x38, 0x40)
_WEIGHT_STD = 3.7


def config_of(shape: ModelShape) -> dict[str, object]:
    """The model's config.json."""
    architecture, model_type = FAMILIES[shape.name]
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": 40960,
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab_size,
        "quantization_config": quantization_config(),
    }


def quantization_config() -> dict[str, object]:
    """As ModelOpt's export writes it for NVFP4."""
    block = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    group = {"input_activations": block, "weights": block, "targets": ["Linear"]}
    return {
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "model.embed_tokens"],
        "quant_algo": "NVFP4",
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quant_method": "modelopt",
    }


def projections(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """{name in the checkpoint: (N, K)} of one decoder layer's linear layers."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    return {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def layer_tensors(shape: ModelShape, layer_idx: int) -> dict[str, object]:
    """Every tensor of one decoder layer."""
    import torch

    generator = torch.Generator().manual_seed(layer_idx)
    prefix = f"model.layers.{layer_idx}."
    tensors: dict[str, object] = {}
    for name, (n, k) in projections(shape).items():
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
        bits = torch.randint(*_SCALE_BITS, (n, k // 16), dtype=torch.uint8, generator=generator)
        tensors[f"{prefix}{name}.weight"] = codes
        tensors[f"{prefix}{name}.weight_scale"] = bits.view(torch.float8_e4m3fn)
        tensors[f"{prefix}{name}.weight_scale_2"] = torch.tensor(k**-0.5 / _WEIGHT_STD)
        tensors[f"{prefix}{name}.input_scale"] = torch.tensor(1.0)
    norms = {"input_layernorm": shape.hidden_size, "post_attention_layernorm": shape.hidden_size}
    if FAMILIES[shape.name][1] == "qwen3":
        norms |= {"self_attn.q_norm": shape.head_dim, "self_attn.k_norm": shape.head_dim}
    for name, size in norms.items():
        tensors[f"{prefix}{name}.weight"] = torch.ones(size, dtype=torch.bfloat16)
    return tensors


def outer_tensors(shape: ModelShape) -> dict[str, object]:
    """Embedding, final norm, lm_head, in 16 bits as the published checkpoints have them."""
    import torch

    generator = torch.Generator().manual_seed(1 << 20)

    def normal(std: float) -> torch.Tensor:
        table = torch.empty(shape.vocab_size, shape.hidden_size, dtype=torch.bfloat16)
        return table.normal_(0, std, generator=generator)

    tensors: dict[str, object] = {
        "model.embed_tokens.weight": normal(1.0),
        "model.norm.weight": torch.ones(shape.hidden_size, dtype=torch.bfloat16),
    }
    if not shape.tie_word_embeddings:
        tensors["lm_head.weight"] = normal(shape.hidden_size**-0.5)
    return tensors


def write_tokenizer(shape: ModelShape, out: Path) -> None:
    """A word for every token, "t0 t1 ...": text of n words is n tokens, there and back."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {f"t{i}": i for i in range(shape.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t1").save_pretrained(out)


def write(shape: ModelShape, out: Path) -> int:
    """Write the checkpoint; returns its size in bytes. The index comes last: it marks it whole."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    parts = [(f"layer-{i:03d}", lambda i=i: layer_tensors(shape, i))
             for i in range(shape.num_hidden_layers)]  # fmt: skip
    parts.append(("outer", lambda: outer_tensors(shape)))
    weight_map: dict[str, str] = {}
    total, last_line = 0, time.monotonic()
    for done, (name, make) in enumerate(parts, start=1):
        tensors = make()
        file_name = f"model-{name}.safetensors"
        save_file(tensors, out / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
        total += sum(t.nbytes for t in tensors.values())
        if time.monotonic() - last_line > 5:
            print(f"{done} of {len(parts)} files, {total / 1e9:.1f} GB", flush=True)
            last_line = time.monotonic()
    write_tokenizer(shape, out)
    (out / "config.json").write_text(json.dumps(config_of(shape), indent=2) + "\n")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n")
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(FAMILIES), default="Qwen3-8B")
    parser.add_argument("--layers", type=int, help="decoder layers; default: the model's own")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--keep", action="store_true", help="do nothing if --out is whole already")
    args = parser.parse_args()
    shape = TINY if args.model == "tiny" else MODELS[args.model]
    if args.layers is not None:
        if args.layers < 1:
            parser.error(f"--layers {args.layers}: needs at least 1")
        shape = dataclasses.replace(shape, num_hidden_layers=args.layers)
    if args.keep and (args.out / INDEX_NAME).is_file():
        print(f"{args.out}: there already")
        return 0
    started = time.monotonic()
    total = write(shape, args.out)
    print(f"{args.out}: {shape.name}, {shape.num_hidden_layers} layers, {total / 1e9:.2f} GB in "
          f"{time.monotonic() - started:.0f} s")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
