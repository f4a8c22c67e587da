# SPDX-License-Identifier: Apache-2.0
"""One module of a checkpoint's files: its tensors, and the form that they are of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_nvfp4.checkpoints.headers import TensorHeader
from vllm_nvfp4.checkpoints.spec import CheckpointError, LayerSpec, Role, describe

# Scales of a KV cache, beside a projection or the attention.
KV_SCALES = frozenset(("k_scale", "v_scale", "q_scale", "prob_scale"))
Tensors = Mapping[str, TensorHeader]


@dataclass(frozen=True)
class StoredModule:
    """One module of the files.

    name:   in the files
    stored: how its weight is stored; None for fewer than 16 bits in a form that is not known
    said:   how the configuration says that it is
    """

    name: str
    tensors: Tensors
    stored: LayerSpec | None
    said: LayerSpec

    @property
    def spec(self) -> LayerSpec:
        """How it is stored. Raises CheckpointError for an unknown form."""
        if self.stored is None:
            raise unknown_form(self)
        return self.stored

    @property
    def stray(self) -> tuple[str, ...]:
        """Scales beside a weight that has no use for them, by their full names."""
        spec = self.stored
        if spec is None:
            return ()
        unused = [t.name for t in spec.tensors if t.role is Role.UNUSED]
        return tuple(f"{self.name}.{leaf}" for leaf in unused if leaf in self.tensors)

    @property
    def has_scales_alone(self) -> bool:
        """Whether it holds nothing but scales of a KV cache, as qkv_proj does beside its shards."""
        return self.tensors.keys() <= KV_SCALES

    @property
    def dispensable(self) -> frozenset[str]:
        """Tensors that the layer computes the same without: scales of activations that are not
        used, strays, and scales of a KV cache, which may be in 16 bits."""
        if self.stored is None:
            return KV_SCALES
        return self.stored.names(Role.UNUSED, Role.INPUT_SCALE) | KV_SCALES


def group_by_module(headers: Mapping[str, TensorHeader]) -> dict[str, dict[str, TensorHeader]]:
    """module name -> leaf name -> header."""
    modules: dict[str, dict[str, TensorHeader]] = defaultdict(dict)
    for name, header in headers.items():
        module, _, leaf = name.rpartition(".")
        modules[module][leaf] = header
    return dict(modules)


def unknown_form(module: StoredModule) -> CheckpointError:
    """The error for a weight of fewer than 16 bits whose tensors are of no form that is known."""
    some = next(iter(module.tensors.values()))
    found = ", ".join(
        f"{leaf} {header.dtype} {list(header.shape)}"
        for leaf, header in sorted(module.tensors.items())
    )
    said = (
        "" if not module.said.is_quantized else f" ({describe(module.said)} in the configuration)"
    )
    return CheckpointError(
        some.file,
        module.name,
        f"{found}{said}",
        "a weight in 16 bits, NVFP4, MXFP4, FP8 or MXFP8, with its scales",
        "Quantise the model again with this layer in one of these, or left as it is.",
    )
