# SPDX-License-Identifier: Apache-2.0
"""Drafts for speculative decoding beside tiny models, of which it is known what they propose.

A predictable model follows a permutation p of its vocabulary: after token t comes p(t), by a margin
that no rounding bridges. A draft that hands the embedding of the last token on is then always
right, and one with other weights is right by chance alone, once in ``VOCAB_SIZE`` tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

# Of the residual stream, so that the embedding outweighs what the layers add to it.
_EMBEDDING = 3.0
_TABLES = ("embed_tokens.weight", "backbone.embeddings.weight")


def make_predictable(tensors: Tensors, steps: int = 1) -> Mapping[int, int]:
    """Give a model the tables of a permutation, in place; returns it.

    tensors: with an embedding and an lm_head, [V, K] each
    steps:   lm_head tells the token that comes so many tokens later
    The logit of p(t) after t is about |x| cos(x, e_t), x the last hidden state: e_t is its larger
    part.
    """
    import torch

    embedding = next(n for n in tensors if n.endswith(_TABLES))
    generator = torch.Generator().manual_seed(5)
    vocab_size, hidden_size = tensors[embedding].shape
    directions = torch.randn(vocab_size, hidden_size, generator=generator)
    following = torch.randperm(vocab_size, generator=generator)
    later = torch.arange(vocab_size)
    for _ in range(steps):
        later = following[later]
    head = torch.empty(vocab_size, hidden_size)
    head[later] = directions * hidden_size**-0.5
    for name in tensors:
        if name.endswith(_TABLES):
            tensors[name] = (_EMBEDDING * directions).bfloat16()
        elif name.endswith(("lm_head.weight", "shared_head.head.weight")):
            tensors[name] = head.bfloat16()
    return dict(enumerate(following.tolist()))


def add_mtp(tensors: Tensors, layer: str) -> None:
    """Qwen's head for multi-token prediction, a copy of the model's ``layer`` ("a.layers.3.") with
    other weights."""
    import torch

    _copy_layer(tensors, layer, "mtp.layers.0.")
    hidden_size = _hidden_size(tensors)
    tensors["mtp.fc.weight"] = _draw(hidden_size, 2 * hidden_size, seed=99)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        tensors[f"mtp.{name}.weight"] = torch.zeros(hidden_size).bfloat16()


def add_layer_past_the_end(tensors: Tensors, last: int) -> None:
    """The draft layer of GLM and DeepSeek, numbered after the last one, with tables of its own."""
    import torch

    layer, hidden_size = f"model.layers.{last + 1}.", _hidden_size(tensors)
    _copy_layer(tensors, f"model.layers.{last}.", layer)
    tensors[layer + "eh_proj.weight"] = _draw(hidden_size, 2 * hidden_size, seed=99)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{layer}{name}.weight"] = torch.ones(hidden_size).bfloat16()
    tensors[layer + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    tensors[layer + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()


def add_nemotron_mtp(tensors: Tensors, attention: str, experts: str) -> None:
    """Nemotron-H's head, copies of two of the model's layers ("backbone.layers.3.") with other
    weights."""
    import torch

    _copy_layer(tensors, attention, "mtp.layers.0.")
    _copy_layer(tensors, experts, "mtp.layers.1.")
    hidden_size = _hidden_size(tensors)
    tensors["mtp.layers.0.eh_proj.weight"] = _draw(hidden_size, 2 * hidden_size, seed=99)
    sizes = {"0.enorm": _EMBEDDING, "0.hnorm": 1, "1.final_layernorm": 1}
    for name, size in sizes.items():
        tensors[f"mtp.layers.{name}.weight"] = torch.full((hidden_size,), size).bfloat16()


def hand_on_the_embedding(tensors: Tensors) -> None:
    """Let the draft's first projection [K, 2 K] take the embedding and leave the hidden state."""
    import torch

    for name in tensors:
        if name.endswith(("mtp.fc.weight", "eh_proj.weight")):
            rows = len(tensors[name])
            tensors[name] = torch.cat([torch.eye(rows), torch.zeros(rows, rows)], 1).bfloat16()


def write_eagle3(folder: Path, target: Path, tensors: Tensors) -> Path:
    """An EAGLE-3 draft for the Llama model of ``target``: one layer, BF16; returns its folder.

    It hands the target's first hidden state on, that of the token before the last, so its head
    tells two tokens later.
    tensors: the target's, for their sizes
    """
    import torch
    from safetensors.torch import save_file

    source = "model.layers.0."
    hidden_size = _hidden_size(tensors)
    draft: Tensors = {}
    _copy_layer(tensors, source, "midlayer.", draft)
    for name in ("q_proj", "k_proj", "v_proj"):  # of the embedding and the hidden state
        rows = len(tensors[f"{source}self_attn.{name}.weight"])
        weight = _draw(rows, 2 * hidden_size, seed=len(name))
        draft[f"midlayer.self_attn.{name}.weight"] = weight
    for name in ("midlayer.hidden_norm", "norm"):
        draft[f"{name}.weight"] = torch.ones(hidden_size).bfloat16()
    others = torch.zeros(hidden_size, 2 * hidden_size)
    draft["fc.weight"] = torch.cat([torch.eye(hidden_size), others], 1).bfloat16()
    draft["lm_head.weight"] = tensors["lm_head.weight"].clone()
    draft["embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    make_predictable(draft, steps=2)
    folder.mkdir(parents=True)
    save_file(draft, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config: dict[str, Any] = json.loads((target / "config.json").read_text())
    config.pop("quantization_config", None)
    config |= {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": config["vocab_size"],
        "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _hidden_size(tensors: Tensors) -> int:
    return next(t.shape[1] for n, t in tensors.items() if n.endswith(_TABLES))


def _copy_layer(tensors: Tensors, source: str, target: str, into: Tensors | None = None) -> None:
    for number, name in enumerate([n for n in tensors if n.startswith(source)]):
        old = tensors[name]
        new = _draw(*old.shape, seed=number) if old.dim() > 1 else old.clone()
        (tensors if into is None else into)[target + name.removeprefix(source)] = new


def _draw(*shape: int, seed: int) -> torch.Tensor:
    import torch

    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (noise * shape[-1] ** -0.5).bfloat16()
