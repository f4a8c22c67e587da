# SPDX-License-Identifier: Apache-2.0
"""Routed experts that a model's own loader cannot be handed: loaded here, past it.

Models take experts one by one, under names of their own, in a form that their layer has. Files have
them stacked, or in a form that is widened to 16 bits as it is loaded. What a file stores for such
experts is taken out of the stream of tensors and given to the layer's parameters, each of which
knows what of an expert is this rank's.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_nvfp4.checkpoints.census import Census
from vllm_nvfp4.checkpoints.modules import StoredModule
from vllm_nvfp4.checkpoints.spec import (
    CheckpointError,
    LayerKind,
    LayerSpec,
    Role,
    describe,
)
from vllm_nvfp4.checkpoints.stacks import Stack, StoredAs, parts_of
from vllm_nvfp4.layers.plain import Parts, value_of
from vllm_nvfp4.numerics.activation import INTERLEAVED

logger = init_logger(f"vllm.{__name__}")

_SHARDS = {"gate": "w1", "up": "w3", "down": "w2"}
_PARTS = ("gate", "down", "up")


@dataclass
class _Module:
    """A stored module of experts: a stack, or one layer of one expert.

    find_layer: vLLM's layer that it belongs to
    stack:      how it is taken apart; None for one expert's layer, which is ``expert`` and ``part``
    spec:       how it is stored
    leaves:     its tensors: file's name -> (name after the module's, as stored)
    parts:      to be widened to 16 bits once they are there; None for what is loaded as it is
    """

    find_layer: Any
    stack: Stack | None
    expert: int
    part: str
    spec: LayerSpec
    leaves: Mapping[str, tuple[str, StoredAs]]
    parts: Parts | None

    def take(self, name: str, tensor: torch.Tensor) -> None:
        """Load a tensor of the file, or keep it until the others are there."""
        leaf, stored = self.leaves[name]
        if stored.is_transposed:
            tensor = tensor.mT
        if self.parts is None or leaf == "bias":
            for expert, part, value in self._split(tensor):
                self._load(leaf, expert, part, value)
        elif (whole := self.parts.take(leaf, tensor)) is not None:
            self._widen(whole)

    def _split(self, tensor: torch.Tensor) -> Iterator[tuple[int, str, torch.Tensor]]:
        if self.stack is None:
            yield self.expert, self.part, tensor
        else:
            yield from self.stack.split(tensor)

    def _widen(self, whole: Mapping[str, torch.Tensor]) -> None:
        found: dict[tuple[int, str], dict[str, torch.Tensor]] = defaultdict(dict)
        for leaf, tensor in whole.items():
            for expert, part, value in self._split(tensor):
                found[expert, part][leaf] = value
        for (expert, part), tensors in found.items():
            if self._slots(expert):
                name = f"expert {expert}, {part} ({describe(self.spec)})"
                self._load("weight", expert, part, value_of(self.spec, tensors, name))

    def _slots(self, expert: int) -> list[int]:
        """The numbers under which this rank has the expert, copies to balance the load included."""
        layer = self.find_layer()
        moe = layer.moe_config
        copies = range(expert, moe.num_experts, moe.num_logical_experts)
        return [e for e in copies if layer._map_global_expert_id_to_local_expert_id(e) != -1]

    def _load(self, leaf: str, expert: int, part: str, value: torch.Tensor) -> None:
        layer = self.find_layer()
        stem = "w2" if part == "down" else "w13"
        shard = "w1" if part == "up" and not layer.moe_config.is_act_and_mul else _SHARDS[part]
        parameter = getattr(layer, f"{stem}_{leaf}", None)
        if parameter is None:  # of no use to this layer, as a scale of the activations
            return
        for slot in self._slots(expert):
            parameter.weight_loader(
                param=parameter,
                loaded_weight=value,
                weight_name=f"{stem}_{leaf}",
                shard_id=shard,
                expert_id=slot,
                return_success=True,
            )


class ExpertLoading:
    """The experts of a model that are loaded here."""

    def __init__(self, census: Census) -> None:
        self._census = census
        self._modules: dict[str, _Module] = {}  # by the file's tensors

    def _widens(self, prefix: str, names: list[list[str]], spec: LayerSpec) -> bool:
        """Whether the experts of a layer become 16 bits: no kernel of experts reads FP8, a
        rotation, or scales of activations that every expert has its own of.

        names: of an expert's gate, down and up projection, the last left out without a gate
        """
        if not spec.is_quantized:
            return False
        if spec.kind is not LayerKind.MICROSCALED or spec.hadamard_size:
            return True
        pre_scale = spec.tensor(Role.PRE_SCALE)
        modules = self._census.stacks(prefix) or [m for m, *_ in self._alone(names)]
        return pre_scale is not None and any(pre_scale.name in m.tensors for m in modules)

    def plan(self, layer: Any, prefix: str, names: list[list[str]], spec: LayerSpec) -> bool:
        """Have the experts of a layer loaded here, where the model's own loader cannot: stacks, and
        what is widened. prefix, names, spec: as of :meth:`_widens`, whose answer it returns.

        Raises CheckpointError for what has to be widened and has gate and up rows in turns.
        """
        is_widened = self._widens(prefix, names, spec)
        is_in_turns = layer.moe_config.activation.value == INTERLEAVED
        if is_widened and is_in_turns:
            raise CheckpointError(
                "checkpoint",
                prefix,
                describe(spec),
                "NVFP4 or MXFP4 for experts whose rows of gate and up take turns",
                "Quantise the model again with one of these.",
            )
        stacks = self._census.stacks(prefix)
        for module in stacks:
            parts = parts_of(module.name)
            if not layer.moe_config.is_act_and_mul:
                parts = parts[-1:]
            turns = is_in_turns and len(parts) > 1
            self._add(layer, module, is_widened, stack=Stack(parts, len(names), turns))
        alone = [] if stacks else list(self._alone(names))
        # The model of such experts takes no part of one alone.
        is_refused = is_in_turns and bool(alone) and spec.is_quantized
        layer.nvfp4_in_halves = is_in_turns and bool(stacks or is_refused)
        if is_widened or is_refused:
            for module, expert, part in alone:
                self._add(layer, module, is_widened, alone=(expert, part))
        if is_widened:
            logger.info_once(
                "nvfp4: %s experts: widened to 16 bits while loading: no kernel here reads them",
                describe(spec),
            )
        return is_widened

    def _alone(self, names: list[list[str]]) -> Iterator[tuple[StoredModule, int, str]]:
        """(module, expert, part) of experts that are stored one by one."""
        for e, expert in enumerate(names):
            for part, name in zip(_PARTS, expert, strict=False):
                if (module := self._census.find(name)) is not None:
                    yield module, e, part

    def _add(
        self,
        layer: Any,
        module: StoredModule,
        is_widened: bool,
        stack: Stack | None = None,
        alone: tuple[int, str] = (0, ""),
    ) -> None:
        leaves = {}
        for leaf in module.tensors:
            name = f"{module.name}.{leaf}"
            stored = self._census.stored_as.get(name, StoredAs(name))
            leaves[stored.name] = leaf, stored
        parts = Parts(module.spec, module.tensors) if is_widened else None
        entry = _Module(weakref.ref(layer), stack, *alone, module.spec, leaves, parts)
        self._modules |= dict.fromkeys(leaves, entry)

    def rest(
        self, weights: Iterable[tuple[str, Any]], model: torch.nn.Module
    ) -> Iterator[tuple[str, Any]]:
        """Load what was planned of this model; yields all other tensors, for the model's loader.

        The files of a model with a draft layer are read twice, the second time for the draft alone:
        the target's experts are in kernel order by then.
        """
        elsewhere = self._census.quantised_stacks()  # if not planned, another rank's
        layers = set(map(id, model.modules()))
        for name, tensor in weights:
            if (module := self._modules.get(name)) is not None:
                if id(module.find_layer()) in layers:
                    module.take(name, tensor)
            elif name not in elsewhere:
                yield name, tensor
