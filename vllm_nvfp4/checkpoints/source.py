# SPDX-License-Identifier: Apache-2.0
"""A folder of 16-bit safetensors weights, and which of them are to be quantised."""

from __future__ import annotations

import fnmatch
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_nvfp4.checkpoints.class_names import class_names
from vllm_nvfp4.checkpoints.detect import read_config
from vllm_nvfp4.checkpoints.expert_parts import Part, biases_of, split
from vllm_nvfp4.checkpoints.files import file_in_folder
from vllm_nvfp4.checkpoints.headers import DTYPE_BITS, read_file_header
from vllm_nvfp4.checkpoints.inventory import EMBEDDING, HEAD, part_of
from vllm_nvfp4.checkpoints.model_class import Kind, ModelClass, Place
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.checkpoints.units import fused_name
from vllm_nvfp4.numerics.formats import NVFP4

# A layer with fewer outputs than this share of its inputs is a gate or the like: it takes no room,
# and much depends on it.
_FEW_ROWS = 16
_16_BIT = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor: safetensors dtype name and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


class Source:
    """The safetensors files of a folder as one collection of tensors."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors"))
        if not (folder / "config.json").is_file() or not files:
            raise CheckpointError(
                str(folder),
                "checkpoint",
                f"{len(files)} .safetensors files, config.json "
                f"{'present' if (folder / 'config.json').is_file() else 'missing'}",
                "a Hugging Face folder with config.json and safetensors weights",
                "Give a folder that from_pretrained can load.",
            )
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self._part_of: dict[str, Part] = {}
        self._stacks: dict[str, TensorInfo] = {}  # those that were taken apart
        self._chosen: tuple[object, set[str], list[Kept]] | None = None
        self.tensors: dict[str, TensorInfo] = {}
        for path in files:
            file_in_folder(folder, path.name, str(folder), "Download the model again.")
            read_file_header(path, path.name)
            with safe_open(path, "pt") as reader:
                for name in reader.keys():  # noqa: SIM118 (not a mapping)
                    part = reader.get_slice(name)
                    self.tensors[name] = TensorInfo(part.get_dtype(), tuple(part.get_shape()))
                    self._file_of[name] = path
        self._own: dict[str, str] = {}  # the hub's names -> those of transformers' class
        names = class_names(self.tensors, folder, lambda _: self.model_class.model)
        if names is not None:
            self._names = names
            self._take_hub_names()

    def _take_hub_names(self) -> None:
        """Have what is stored as transformers' class has it under the hub's names."""
        stored, self.tensors = self.tensors, {}
        for own, info in stored.items():
            for name, made in self._names.back([(own, torch.empty(info.shape, device="meta"))]):
                if name == own:  # turned at most, which split() sees
                    self.tensors[own] = info
                    continue
                shape = tuple(made.shape)
                self.tensors[name] = TensorInfo(info.dtype, shape)
                self._own[name], self._file_of[name] = own, self._file_of[own]
                if (place := self.model_class.expert(name)) is not None:
                    rows = place.rows(shape[0])
                    self._part_of[name] = Part(own, place.expert, rows, shape, place.is_transposed)

    def load(self, name: str, device: torch.device | str) -> torch.Tensor:
        part = self._part_of.get(name)
        stored = part.stored if part else name
        own = self._own.get(stored, stored)
        with safe_open(self._file_of[name], "pt") as reader:
            if part:
                return part.read(reader.get_slice(own)).to(device)
            tensor = reader.get_tensor(own)
        if own != name:
            tensor = dict(self._names.back([(own, tensor)]))[name]
        return tensor.to(device)

    def load_finite(self, name: str, device: torch.device | str) -> torch.Tensor:
        """As :meth:`load`. Raises CheckpointError where it holds NaN or an infinity."""
        tensor = self.load(name, device)
        num_bad = int((~tensor.isfinite()).sum())
        if num_bad:
            raise CheckpointError(
                str(self.folder),
                name,
                f"{num_bad} of {tensor.numel()} weights are NaN or infinite",
                "finite weights",
                "Download the checkpoint again, or keep to another revision of it.",
            )
        return tensor

    def config(self) -> dict[str, Any]:
        """config.json. Raises CheckpointError where it says that the weights are quantised."""
        config, _ = read_config(self.folder)
        if "quantization_config" in config:
            raise CheckpointError(
                str(self.folder / "config.json"),
                "quantization_config",
                config["quantization_config"].get("quant_method", "a quantization_config"),
                "an unquantised checkpoint",
                "Start from the model's BF16 weights.",
            )
        return config

    def fingerprint(self) -> list[Any]:
        """What changes when the folder's weights or configuration do, without reading them all."""
        files = sorted({*self._file_of.values(), self.folder / "config.json"})
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]

    def vocabulary(self, with_embedding: bool) -> list[str]:
        """The stored weights with a row for each token that a format can be chosen for: lm_head's,
        if it has one of its own, and on demand the embedding's, which is lm_head's too where the
        two are tied."""
        parts = (HEAD, EMBEDDING) if with_embedding else (HEAD,)
        return sorted(
            name
            for name, info in self.tensors.items()
            if part_of(name.removesuffix(".weight"), info.shape) in parts
            and name.endswith(".weight")
            and info.dtype in _16_BIT
            and len(info.shape) == 2
            and info.shape[1] % NVFP4.block_size == 0
        )

    @cached_property
    def model_class(self) -> ModelClass:
        """Raises CheckpointError where transformers has no class for the model."""
        return ModelClass(self.folder)

    def quantizable(
        self, ignore: Sequence[str] = (), with_towers: bool = False
    ) -> tuple[set[str], list[Kept]]:
        """(weights to quantise; the other tensors of two or more dimensions, and why they stay).

        ignore:      fnmatch patterns of layer names that stay as they are, with the other shards of
                     their fused layers and the other experts of their blocks
        with_towers: vision and audio towers are quantised too
        Experts stacked in one tensor, where they are quantised, are from here on a tensor each.
        """
        if self._chosen is None or self._chosen[0] != (tuple(ignore), with_towers):
            places = {
                name: self.model_class.place(name, info)
                for name, info in self.tensors.items()
                if len(info.shape) >= 2
            }
            kept: list[Kept] = []
            linear = {
                name
                for name, place in places.items()
                if self._is_asked(name, place, ignore, with_towers, kept)
            }
            linear = self._without_shards_of_ignored(linear, places, kept)
            linear = self._split_stacks(linear, places, kept)
            linear = self._of_good_shape(linear, places, kept)
            if not linear:
                raise CheckpointError(
                    str(self.folder),
                    "weights",
                    f"{len(self.tensors)} tensors, none to quantise: "
                    + "; ".join(sorted({f"{k.kind} ({k.reason})" for k in kept})),
                    "linear layers in repeated blocks with K a multiple of 16, in 16 or 32 bits",
                    "Check the model and the ignore patterns.",
                )
            self._chosen = (tuple(ignore), with_towers), linear, kept
        return set(self._chosen[1]), list(self._chosen[2])

    def _is_asked(
        self,
        name: str,
        place: Place,
        ignore: Sequence[str],
        with_towers: bool,
        kept: list[Kept],
    ) -> bool:
        info = self.tensors[name]
        kind = place.kind
        if kind is Kind.TOWER and with_towers:
            kind = Kind.LINEAR if self.model_class.is_linear(place.module) else Kind.OTHER
        reason = _REASONS.get(kind, "")
        if info.dtype not in _16_BIT:
            reason = f"stored as {info.dtype}"
        elif matches(name.removesuffix(".weight"), ignore):
            reason = _IGNORED
        if reason:
            kept.append(Kept(name, kind.value, reason, info.num_bytes))
        return not reason

    def _without_shards_of_ignored(
        self, linear: set[str], places: dict[str, Place], kept: list[Kept]
    ) -> set[str]:
        """Engines have no fused layer, and no experts of a block, of which a part is quantised."""
        ignored = {k.name for k in kept if k.reason == _IGNORED}
        fused = {fused_name(name) for name in ignored}
        modules = {places[name].module for name in ignored} - {""}
        also = {n for n in linear if fused_name(n) in fused or places[n].module in modules}
        kept += [
            Kept(n, Kind.LINEAR.value, _IGNORED, self.tensors[n].num_bytes) for n in sorted(also)
        ]
        return linear - also

    def _split_stacks(
        self, linear: set[str], places: dict[str, Place], kept: list[Kept]
    ) -> set[str]:
        """The same with each stack replaced by its experts, there and in ``tensors``."""
        layers: dict[str, dict[str, str]] = defaultdict(dict)
        for name in sorted(linear):
            if places[name].kind is Kind.STACK:
                leaf = self.model_class.parameter(name).rpartition(".")[2]
                layers[places[name].module][leaf] = name
        shapes = {name: info.shape for name, info in self.tensors.items()}
        for module, stacks in layers.items():
            linear -= set(stacks.values())
            biases = biases_of(stacks, shapes)
            in_turns = not self.model_class.is_concatenated(module)
            try:
                parts = split(stacks, shapes, biases, in_turns)
            except ValueError as error:
                kept += [
                    Kept(n, Kind.STACK.value, str(error), self.tensors[n].num_bytes)
                    for n in stacks.values()
                ]
                continue
            taken = {*stacks.values(), *biases.values()}
            self._stacks |= {stored: self.tensors.pop(stored) for stored in taken}
            kept[:] = [k for k in kept if k.name not in taken]
            for name, part in parts.items():
                self._part_of[name] = part
                self.tensors[name] = TensorInfo(self._stacks[part.stored].dtype, part.shape)
                self._file_of[name] = self._file_of[part.stored]
            weights = {name for name, part in parts.items() if len(part.shape) == 2}
            places |= dict.fromkeys(weights, Place(Kind.LINEAR, module))
            linear |= weights
        return linear

    def restack(self, quantized: set[str]) -> None:
        """Have stacks of which nothing is quantised as they are stored: not every model of an
        engine takes experts in 16 bits one by one."""
        layers: dict[str, list[str]] = defaultdict(list)
        for name, part in self._part_of.items():
            if part.stored in self._stacks:
                layers[name.rsplit(".", 3)[0]].append(name)
        for names in layers.values():
            if quantized.isdisjoint(names):
                for name in names:
                    del self.tensors[name]
                    stored = self._part_of.pop(name).stored
                    self.tensors[stored] = self._stacks[stored]

    def _of_good_shape(
        self, linear: set[str], places: dict[str, Place], kept: list[Kept]
    ) -> set[str]:
        """Without what NVFP4's blocks do not fit, and what is too small to be worth it; the shards
        of a fused layer alike."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name in sorted(linear):
            groups[fused_name(name)].append(name)
        good: set[str] = set()
        for names in groups.values():
            rows = sum(self.tensors[n].shape[0] for n in names)
            cols = self.tensors[names[0]].shape[1]
            reason = ""
            if cols % NVFP4.block_size:
                reason = f"K is not a multiple of {NVFP4.block_size}"
            elif rows * _FEW_ROWS < cols:
                reason = "few rows: a gate"
            if not reason:
                good |= {*names}
            kind = "odd shapes" if cols % NVFP4.block_size else "gates"
            if reason:
                kept += [Kept(n, kind, reason, self.tensors[n].num_bytes) for n in names]
        return good


_IGNORED = "left out as asked"
# Why what is not quantised by default is not.
_REASONS = {
    Kind.ROUTER: "vLLM builds them in 16 bits",
    Kind.HEAD: "--target-bits chooses a format for it",
    Kind.EMBEDDING: "--target-bits with --embedding chooses a format for it",
    Kind.TOWER: "--towers quantises them",
    Kind.OUTSIDE: "in no repeated block: heads, poolers, projections between spaces",
    Kind.TRANSPOSED: "vLLM transposes them while it loads, which packed codes do not bear",
    Kind.UNQUANTIZED: "vLLM has no quantised form of them",
    Kind.UNKNOWN: "transformers' class does not say what they are",
    Kind.OTHER: "no linear layers",
}
# Kinds that stay without anybody's having asked for it, where NVFP4 might have been expected.
UNASKED = (
    Kind.STACK.value,
    Kind.OUTSIDE.value,
    Kind.TRANSPOSED.value,
    Kind.UNQUANTIZED.value,
    Kind.UNKNOWN.value,
    "odd shapes",
)


@dataclass(frozen=True)
class Kept:
    """A stored tensor that is not quantised. kind: what it is, in the plural; reason: why not."""

    name: str
    kind: str
    reason: str
    num_bytes: int


def matches(name: str, patterns: Iterable[str]) -> bool:
    """fnmatch patterns, of the name or of what it lies below."""
    return any(
        fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"{p}.*") for p in patterns
    )
