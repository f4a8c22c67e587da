# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a model are quantised and written together: fused layers, decoder layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_nvfp4.checkpoints.model_class import BLOCK

# Layers of one parent and one input that serving engines fuse: their shards share one global scale.
# All that any of vLLM's classes fuses; where two fuse differently, what either does.
FUSED = (
    ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj"),
    ("gate_proj", "up_proj", "dense_h_to_4h"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("query", "key", "value"),
    ("query_net", "key_net", "value_net"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("fc1", "fc3"),
    ("c_fc_0", "c_fc_1"),
)
# The order in which a decoder layer computes; each shard's name stands for its whole group.
_COMPUTED = ("q_proj", "o_proj", "gate_proj", "w1", "down_proj", "w2")


def fused_with(leaf: str) -> tuple[str, ...]:
    """The leaves of the fused layer that a linear layer of this name is a shard of."""
    return next((shards for shards in FUSED if leaf in shards), (leaf,))


def fused_name(name: str) -> str:
    """What the shards of one fused layer have in common."""
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    return f"{parent}.{'+'.join(fused_with(leaf))}"


@dataclass(frozen=True)
class Unit:
    """What is written to one file: a decoder layer, or all that belongs to none.

    prefix: what its tensors' names begin with, "" for the rest
    groups: tensor names in the order of the file; the quantised shards of one fused layer together
    """

    prefix: str
    groups: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> list[str]:
        return [name for group in self.groups for name in group]


def whole(names: Iterable[str], quantized: set[str]) -> list[Unit]:
    """Everything in one unit."""
    return [Unit("", _groups(names, quantized))]


def by_layer(
    names: Iterable[str], quantized: set[str], linear: set[str] | None = None
) -> list[Unit]:
    """The rest first, then the decoder layers in the order of their numbers.

    linear: what could be quantised, and shows which layers there are; default ``quantized``
    """
    found: dict[tuple[int, str], list[str]] = {}
    shown = quantized if linear is None else linear
    prefixes = {m[1] for n in shown if (m := BLOCK.match(n))}
    for name in names:
        match = BLOCK.match(name)
        key = (int(match[2]), match[1]) if match and match[1] in prefixes else (-1, "")
        found.setdefault(key, []).append(name)
    return [Unit(key[1], _groups(found[key], quantized)) for key in sorted(found)]


def _groups(names: Iterable[str], quantized: set[str]) -> tuple[tuple[str, ...], ...]:
    """Tensor names: those that are kept, then the others in the order in which a decoder layer
    computes them, the shards of a fused layer together."""
    groups: dict[str, list[str]] = {}
    rank: dict[str, int] = {}
    for name in names:
        key, rank[name] = name, -1
        if name in quantized:
            leaf = name.removesuffix(".weight").rpartition(".")[2]
            key = fused_name(name)
            first = fused_with(leaf)[0]
            rank[key] = (*_COMPUTED, first).index(first)
        groups.setdefault(key, []).append(name)
    return tuple(tuple(groups[key]) for key in sorted(groups, key=rank.__getitem__))
