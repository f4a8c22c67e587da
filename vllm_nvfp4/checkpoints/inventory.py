# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds, layer by layer: what ``validate`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from vllm_nvfp4.checkpoints.headers import TensorHeader
from vllm_nvfp4.checkpoints.spec import LayerKind, LayerSpec, Role

LINEAR, HEAD, EMBEDDING, OTHER = "linear", "lm_head", "embedding", "other"
_EMBEDDING_LEAVES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")


@dataclass(frozen=True)
class LayerRecord:
    """One layer as stored.

    part:       "linear", "lm_head", "embedding" or "other" (norms, biases, routers, convolutions)
    format:     "nvfp4", "mxfp4", "fp8", "mxfp8", "int", or the dtype of what is not quantised
    shape:      of the weight: [N, K], or whatever the tensor has
    num_bytes:  of all its tensors
    files:      that hold them
    bias_bytes: of its biases alone
    """

    name: str
    part: str
    spec: LayerSpec
    format: str
    shape: tuple[int, ...]
    num_bytes: int
    files: tuple[str, ...]
    bias_bytes: int = 0

    @property
    def num_weights(self) -> int:
        return prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / max(self.num_weights, 1)


@dataclass(frozen=True)
class Inventory:
    """A checkpoint's layers in the order of their names.

    dialect:         its name
    kv_cache:        "fp8" if the checkpoint asks for it, else None
    tied_embeddings: lm_head is the embedding's weight
    """

    folder: str
    dialect: str
    kv_cache: str | None
    tied_embeddings: bool
    layers: tuple[LayerRecord, ...]

    @property
    def num_bytes(self) -> int:
        return sum(layer.num_bytes for layer in self.layers)


def weight_of(
    tensors: Mapping[str, TensorHeader], spec: LayerSpec
) -> tuple[TensorHeader | None, tuple[int, ...]]:
    """(the tensor that holds a layer's weight, the weight's shape in elements)."""
    codes = spec.tensor(Role.CODES)
    if spec.kind is LayerKind.MICROSCALED and codes and codes.name in tensors:
        header = tensors[codes.name]
        return header, (*header.shape[:-1], 2 * header.shape[-1]) if header.shape else ()
    if "weight" in tensors:
        return tensors["weight"], tensors["weight"].shape
    if not tensors:
        return None, ()
    largest = max(tensors.values(), key=lambda t: t.num_bytes)
    return largest, largest.shape


def record(name: str, tensors: Mapping[str, TensorHeader], spec: LayerSpec) -> LayerRecord:
    """The record of a module from its tensors (leaf name -> header)."""
    header, shape = weight_of(tensors, spec)
    stored = header.dtype if header else "none"
    if spec.is_quantized:
        # Of weights in FP8, those with a scale for 32 of a row are called by a name of their own.
        is_mx = spec.kind is LayerKind.WIDENED and spec.tensor(Role.BLOCK_SCALE)
        stored = spec.fmt.name if spec.fmt else "mxfp8" if is_mx else "fp8"
        stored = "int" if spec.tensor(Role.OFFSET) else stored
    return LayerRecord(
        name,
        part_of(name, shape),
        spec,
        stored,
        shape,
        sum(t.num_bytes for t in tensors.values()),
        tuple(sorted({t.file for t in tensors.values()})),
        sum(t.num_bytes for leaf, t in tensors.items() if leaf.endswith("bias")),
    )


def records_of(
    name: str, tensors: Mapping[str, TensorHeader], spec: LayerSpec
) -> list[LayerRecord]:
    """:func:`record` of a module in 16 bits; of one that keeps several matrices or stacks of them
    under names of its own, as stacked experts do, one of each."""
    stacks = [leaf for leaf, t in tensors.items() if len(t.shape) > 2]
    if len(stacks) < 2:
        return [record(name, tensors, spec)]
    rest = {leaf: t for leaf, t in tensors.items() if leaf not in stacks}
    found = []
    for leaf in stacks:
        own = {n: rest.pop(n) for n in list(rest) if n.startswith(leaf)}
        found.append(record(f"{name}.{leaf}", {leaf: tensors[leaf], **own}, spec))
    return found + ([record(name, rest, spec)] if rest else [])


def part_of(name: str, shape: tuple[int, ...]) -> str:
    leaf = name.rpartition(".")[2]
    if leaf in _EMBEDDING_LEAVES:
        return EMBEDDING
    if leaf == "lm_head":
        return HEAD
    return LINEAR if len(shape) >= 2 and leaf not in ("patch_embed", "conv1d") else OTHER
