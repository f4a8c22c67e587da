# SPDX-License-Identifier: Apache-2.0
"""No quantisation in the checkpoint: 16-bit weights, quantised layer by layer while they load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
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

# What a reader of files alone takes for vision and audio encoders, their projectors, and routers.
# An engine decides by what vLLM builds (layers/keep.py).
SENSITIVE = (
    "*vision_tower*",
    "*vision_model*",
    "*visual.*",
    "*audio_tower*",
    "*multi_modal_projector*",
    "*mlp.gate",
    "*block_sparse_moe.gate",
    "*router*",
)


def online_spec(fmt: BlockFormat) -> LayerSpec:
    """A 16-bit layer that is quantised to ``fmt`` while it loads."""
    weight = TensorSpec("weight", Role.WEIGHT, ("BF16", "F16", "F32"))
    return LayerSpec(LayerKind.ONLINE, fmt, (weight,), algo=f"online {fmt.name}")


class OnlineDialect:
    """A checkpoint without quantisation.

    fmt:    the format that linear layers get
    ignore: layers that stay as they are: names, or patterns as in a shell. ``lm_head`` and the
            embedding are decided by options of their own.
    """

    name = "online"
    kv_cache = KvCacheSpec()

    def __init__(self, fmt: BlockFormat = NVFP4, ignore: Sequence[str] = SENSITIVE) -> None:
        self._ignore = list(ignore)
        self._spec = online_spec(fmt)

    def has_microscaled_layers(self) -> bool:
        return False

    def layer_spec(self, name: str) -> LayerSpec:
        if name.rpartition(".")[2] == "lm_head" or self.excludes(name):
            return UNQUANTIZED
        return self._spec

    def excludes(self, name: str) -> bool:
        return any(fnmatchcase(name, entry) for entry in self._ignore)

    def named_layers(self) -> tuple[str, ...]:
        return ()

    def settle(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """The configuration says it all."""

    def rename(self, mapper: Any) -> None:
        self._ignore = mapper.apply_list(self._ignore)
