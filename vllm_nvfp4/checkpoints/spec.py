# SPDX-License-Identifier: Apache-2.0
"""What a dialect says about a checkpoint: which layer is stored how, in which tensors.

The rest of the plugin sees a checkpoint only through these types. Nothing here imports vLLM or
torch, so that ``inspect`` and ``plan`` answer at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol

from vllm_nvfp4.numerics.formats import BlockFormat


class Role(Enum):
    """What a stored tensor means for the layer it belongs to."""

    CODES = "codes"  # [N, K/2] uint8, two E2M1 codes a byte
    BLOCK_SCALE = "block_scale"  # [N, K/block]
    GLOBAL_SCALE = "global_scale"  # scalar, multiplies
    GLOBAL_DIVISOR = "global_divisor"  # scalar, divides
    INPUT_SCALE = "input_scale"  # scalar of the activations; not used for 16- or 8-bit activations
    PRE_SCALE = "pre_scale"  # [K], multiplies the activations (AWQ); absent counts as ones
    HADAMARD = "hadamard"  # [g, g], block-diagonal rotation of the activations
    UNUSED = "unused"  # stored by the tool and of no use here
    WEIGHT = "weight"  # [N, K], FP8 or unquantised
    WEIGHT_SCALE = "weight_scale"  # FP8: scalar; multiplies
    BIAS = "bias"  # [N], added; where a format stacks it with the experts' weights
    ROW_SCALE = "row_scale"  # FP8: [N] or [N, 1], one per output row; multiplies
    OFFSET = "offset"  # [N, K/block] beside a BLOCK_SCALE; added
    TILE_SCALE = "tile_scale"  # FP8: [N/b, K/b], one per square of b x b; multiplies


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a layer: its name after the layer's, its role, and what it must look like.

    name:     suffix in the checkpoint and of the vLLM parameter, e.g. "weight_scale_2"
    dtypes:   accepted safetensors dtypes, e.g. ("F8_E4M3",), first one is what the tool writes
    optional: the layer is complete without it
    """

    name: str
    role: Role
    dtypes: tuple[str, ...]
    optional: bool = False


class LayerKind(Enum):
    MICROSCALED = "microscaled"  # NVFP4 or MXFP4
    FP8 = "fp8"
    UNQUANTIZED = "unquantized"
    ONLINE = "online"  # 16-bit in the checkpoint, quantised while it loads
    WIDENED = "widened"  # in a form that no kernel here reads: 16 bits as soon as it is loaded
    OTHER = "other"  # named by a configuration, and not read here


@dataclass(frozen=True)
class LayerSpec:
    """How one layer (or one shard of a fused layer) is stored.

    kind:            see LayerKind
    fmt:             NVFP4 or MXFP4 for MICROSCALED and ONLINE, else None
    tensors:         the tensors the dialect stores for it
    scale_block:     elements of one row that share a stored block scale: fmt.block_size (also
                     meant by 0) or a multiple of it, whose scales are then repeated on load
    activation_bits: what the checkpoint was made for: 4, 8 or 16
    hadamard_size:   block size of the rotation of the activations; 0 without one
    algo:            the dialect's own name for it, for messages, e.g. "W4A16_NVFP4"
    """

    kind: LayerKind
    fmt: BlockFormat | None = None
    tensors: tuple[TensorSpec, ...] = ()
    activation_bits: int = 16
    hadamard_size: int = 0
    algo: str = ""
    scale_block: int = 0

    def __post_init__(self) -> None:
        if self.fmt is not None and not self.scale_block:
            object.__setattr__(self, "scale_block", self.fmt.block_size)

    def tensor(self, role: Role) -> TensorSpec | None:
        return next((t for t in self.tensors if t.role is role), None)

    def names(self, *roles: Role) -> frozenset[str]:
        """Of the tensors that have one of these roles."""
        return frozenset(t.name for t in self.tensors if t.role in roles)

    @property
    def is_quantized(self) -> bool:
        """Whether the stored weight has fewer than 16 bits."""
        return self.kind in (
            LayerKind.MICROSCALED,
            LayerKind.FP8,
            LayerKind.WIDENED,
            LayerKind.OTHER,
        )


UNQUANTIZED = LayerSpec(LayerKind.UNQUANTIZED)


@dataclass(frozen=True)
class KvCacheSpec:
    """The KV cache that the checkpoint asks for.

    dtype: "fp8" or None
    """

    dtype: str | None = None


class Dialect(Protocol):
    """One on-disk dialect, parsed from the checkpoint's configuration."""

    name: str
    kv_cache: KvCacheSpec

    def has_microscaled_layers(self) -> bool:
        """Whether the checkpoint holds NVFP4 or MXFP4 weights."""

    def layer_spec(self, name: str) -> LayerSpec:
        """How the layer of this name is stored. ``name`` is one linear layer as the checkpoint
        names it, never a fused one; the caller splits fused layers into their shards
        (:func:`fused_layer_spec`)."""

    def excludes(self, name: str) -> bool:
        """Whether the configuration's ignore list names this layer, fused or not."""

    def named_layers(self) -> tuple[str, ...]:
        """The layers that the configuration promises by their full names, without patterns."""

    def settle(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Take from the stored tensors what the configuration leaves open (today: ModelOpt's group
        size). ``shapes``: tensor name -> shape, as in the files; to be called before ``rename``."""

    def rename(self, mapper: object) -> None:
        """Translate the layer names of the configuration with vLLM's WeightsMapper
        (``mapper.apply_list`` / ``mapper.apply_dict``), as vLLM does for its own configs."""


class CheckpointError(ValueError):
    """Something about a checkpoint that makes it unusable: one message, made to be read.

    Format: ``<file>: <tensor or key>: found <found>; needed <needed>. <what to do>``, in one line
    that a terminal or a log takes as it is, whatever the files hold.
    """

    def __init__(self, where: str, what: str, found: object, needed: object, todo: str) -> None:
        where, what, found, needed, todo = (
            _printable(part) for part in (where, what, found, needed, todo)
        )
        self.where, self.what = where, what
        super().__init__(f"{where}: {what}: found {found}; needed {needed}. {todo}")


_MAX_PART = 1000


def _printable(part: object) -> str:
    """The text with what moves a cursor or ends a line written as an escape, and cut if long."""
    text = str(part)
    if len(text) > _MAX_PART:
        text = text[:_MAX_PART] + " ..."
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def shard_names(name: str, packed_modules: Mapping[str, Sequence[str]]) -> list[str]:
    """The checkpoint's names of the shards of a layer: qkv_proj -> q_proj, k_proj, v_proj."""
    parent, _, leaf = name.rpartition(".")
    shards = packed_modules.get(leaf, [leaf])
    return [f"{parent}.{s}" if parent else s for s in shards]


def fused_layer_spec(
    dialect: Dialect, name: str, packed_modules: Mapping[str, Sequence[str]]
) -> LayerSpec:
    """How a layer of the model is stored, from how each of its shards is.

    name: the layer as the model names it, fused or not
    """
    shards = shard_names(name, packed_modules)
    if len(shards) > 1 and dialect.excludes(name):
        return UNQUANTIZED
    return one_spec({shard: dialect.layer_spec(shard) for shard in shards})


def one_spec(shards: Mapping[str, LayerSpec]) -> LayerSpec:
    """The spec of a layer that is one in memory, from those of its shards by their names.

    Shards in different forms have no kernel in common: they come out as WIDENED.
    """
    if (spec := merged(list(shards.values()))) is not None:
        return spec
    tensors: dict[str, TensorSpec] = {}
    for spec in shards.values():
        tensors |= {t.name: replace(t, optional=True) for t in spec.tensors}
    forms = ", ".join(f"{n.rpartition('.')[2]} {describe(spec)}" for n, spec in shards.items())
    return LayerSpec(LayerKind.WIDENED, tensors=tuple(tensors.values()), algo=forms)


def merged(specs: Sequence[LayerSpec]) -> LayerSpec | None:
    """One spec for layers that are one in memory, or None where they are stored differently.

    They may differ in what a layer can do without: an input scale, the bits of the activations.
    """
    if len({_form(spec) for spec in specs}) != 1:
        return None
    tensors: dict[str, TensorSpec] = {}
    for spec in specs:
        tensors |= {t.name: t for t in spec.tensors if t.name not in tensors}
    most = max(specs, key=lambda spec: spec.activation_bits)
    has_all = len(tensors) == len(most.tensors)
    return most if has_all else replace(most, tensors=tuple(tensors.values()))


def _form(spec: LayerSpec) -> tuple[Any, ...]:
    needed = frozenset((t.name, t.role) for t in spec.tensors if not t.optional)
    return spec.kind, spec.fmt, spec.scale_block, spec.hadamard_size, needed


def embedding_spec(dialect: Dialect, name: str) -> LayerSpec:
    """How the token embedding is stored. A configuration that names no embedding in full speaks of
    linear layers alone, whatever its patterns match.

    name: as the model has it; some models name no more than the last part
    """
    leaf = name.rpartition(".")[2]
    named = [layer for layer in dialect.named_layers() if layer.rpartition(".")[2] == leaf]
    return dialect.layer_spec(named[0]) if named else UNQUANTIZED


def fold(name: str) -> str:
    """The name with its numbers replaced: the same for every layer of a stack."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def describe(spec: LayerSpec) -> str:
    """The spec in a few words, for messages and tables: "nvfp4 (W4A16_NVFP4)"."""
    if spec.kind is LayerKind.UNQUANTIZED:
        return "not quantised"
    name = spec.fmt.name if spec.fmt else spec.kind.value
    return f"{name} ({spec.algo})" if spec.algo else name
