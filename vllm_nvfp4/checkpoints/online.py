# SPDX-License-Identifier: Apache-2.0
"""No quantisation in the checkpoint: 16-bit weights, quantised layer by layer while they load."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

from vllm_nvfp4.checkpoints.spec import (
    UNQUANTIZED,
    KvCacheSpec,
    LayerKind,
    LayerSpec,
    Role,
    TensorSpec,
)
from vllm_nvfp4.numerics.formats import NVFP4, BlockFormat

# Gates of shared experts, scores of classes, coefficients of a few streams.
_FEW_OUTPUTS = 16
ROUTERS = "routers"
TOWERS = "in encoders and connectors"
OUTSIDE = "outside of the stacks"
LEFT_OUT = "left out by their sizes or by online_ignore"


def is_in_stack(name: str) -> bool:
    """Whether a layer is in one of a model's repeated blocks, by the number in its name."""
    return any(part.isdecimal() for part in name.split("."))


def why_in_16_bits(
    n: int, k: int, per_layer: int = 0, *, is_router: bool, is_in_stack: bool
) -> str | None:
    """Why a linear layer [n, k] stays as it is while others are quantised, or None.

    per_layer: width of the inputs that each decoder layer gets on its own; 0 for none

    The one rule: an engine asks with what vLLM builds (layers/keep.py), whoever tells beforehand
    with what transformers builds (online_layers.py). By what a layer is, where it stands and its
    sizes, not by its name: routers, heads and projections are small against the rest and spoil more
    than they save.
    """
    if is_router:
        return ROUTERS
    if n < _FEW_OUTPUTS:
        return "gates and scores"
    if not is_in_stack:
        return OUTSIDE
    if per_layer and per_layer in (n, k):
        return "per-layer inputs"
    return None


def is_ignored(names: Collection[str], patterns: Sequence[str]) -> bool:
    """Whether the user's list names a layer: all of its names, of which there is one at least."""
    return bool(names) and all(any(fnmatch(n, p) for p in patterns) for n in names)


def online_spec(fmt: BlockFormat) -> LayerSpec:
    """A 16-bit layer that is quantised to ``fmt`` while it loads."""
    weight = TensorSpec("weight", Role.WEIGHT, ("BF16", "F16", "F32"))
    return LayerSpec(LayerKind.ONLINE, fmt, (weight,), algo=f"online {fmt.name}")


class OnlineDialect:
    """A checkpoint without quantisation.

    fmt: the format that linear layers get; lm_head and the embedding are decided by options of
         their own. Which of the others stay as they are is for :func:`why_in_16_bits` to say.
    """

    name = "online"
    kv_cache = KvCacheSpec()

    def __init__(self, fmt: BlockFormat = NVFP4) -> None:
        self._spec = online_spec(fmt)

    def has_microscaled_layers(self) -> bool:
        return False

    def layer_spec(self, name: str) -> LayerSpec:
        return UNQUANTIZED if name.rpartition(".")[2] == "lm_head" else self._spec

    def excludes(self, name: str) -> bool:
        return False

    def named_layers(self) -> tuple[str, ...]:
        return ()

    def settle(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """The configuration says it all."""

    def rename(self, mapper: Any) -> None:
        """No name is asked for."""
