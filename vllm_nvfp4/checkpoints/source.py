# SPDX-License-Identifier: Apache-2.0
"""A folder of 16-bit safetensors weights, and which of them are quantised together."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_nvfp4.checkpoints.detect import read_config
from vllm_nvfp4.checkpoints.files import file_in_folder
from vllm_nvfp4.checkpoints.headers import read_file_header
from vllm_nvfp4.checkpoints.inventory import EMBEDDING, HEAD, part_of
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.numerics.formats import NVFP4

# Layers that serving engines fuse: their shards share one global scale.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
# The order in which a decoder layer computes; each shard's name stands for its whole group.
_COMPUTED = ("q_proj", "o_proj", "gate_proj", "w1", "down_proj", "w2")
DEFAULT_IGNORE = ("lm_head", "*embed_tokens*", "*vision*", "*visual*", "*audio*")
_LINEAR = re.compile(r"(^|\.)layers\.\d+\..*(_proj|\.w[123])\.weight$")
_DECODER_LAYER = re.compile(r"^(.*?\blayers\.(\d+)\.)")
_16_BIT = ("BF16", "F16", "F32")
# safetensors' name of each dtype, and its bits.
DTYPES = {
    torch.uint8: ("U8", 8),
    torch.float8_e4m3fn: ("F8_E4M3", 8),
    torch.bfloat16: ("BF16", 16),
    torch.float16: ("F16", 16),
    torch.float32: ("F32", 32),
    torch.float64: ("F64", 64),
    torch.int32: ("I32", 32),
    torch.int64: ("I64", 64),
    torch.bool: ("BOOL", 8),
}
_BITS = dict(DTYPES.values())


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor: safetensors dtype name and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        if self.dtype not in _BITS:
            raise ValueError(f"safetensors dtype {self.dtype}; known are {', '.join(_BITS)}")
        return math.prod(self.shape) * _BITS[self.dtype] // 8


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
        self.tensors: dict[str, TensorInfo] = {}
        for path in files:
            file_in_folder(folder, path.name, str(folder), "Download the model again.")
            read_file_header(path, path.name)
            with safe_open(path, "pt") as reader:
                for name in reader.keys():  # noqa: SIM118 (not a mapping)
                    part = reader.get_slice(name)
                    self.tensors[name] = TensorInfo(part.get_dtype(), tuple(part.get_shape()))
                    self._file_of[name] = path

    def load(self, name: str, device: torch.device | str) -> torch.Tensor:
        with safe_open(self._file_of[name], "pt") as reader:
            return reader.get_tensor(name).to(device)

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

    def quantizable(self, ignore: Sequence[str]) -> tuple[set[str], list[str]]:
        """(weights to quantise, linear layers that cannot be: K is not a multiple of 16)."""
        linear = {n for n, i in self.tensors.items() if _is_linear(n, i, ignore)}
        odd = {n for n in linear if self.tensors[n].shape[1] % NVFP4.block_size}
        if linear == odd:
            raise CheckpointError(
                str(self.folder),
                "weights",
                f"{len(self.tensors)} tensors, none to quantise",
                "linear layers under `layers.<i>.` with K a multiple of 16, in 16 or 32 bits",
                "Check the model and the ignore patterns.",
            )
        return linear - odd, sorted(n.removesuffix(".weight") for n in odd)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """fnmatch patterns, or names of whole subtrees."""
    return any(fnmatch.fnmatchcase(name, p) or name.startswith(p + ".") for p in patterns)


def _is_linear(name: str, info: TensorInfo, ignore: Sequence[str]) -> bool:
    return (
        _LINEAR.search(name) is not None
        and info.dtype in _16_BIT
        and len(info.shape) == 2
        and not matches(name.removesuffix(".weight"), ignore)
    )


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
    prefixes = {m[1] for n in shown if (m := _DECODER_LAYER.match(n))}
    for name in names:
        match = _DECODER_LAYER.match(name)
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
            parent, _, leaf = name.removesuffix(".weight").rpartition(".")
            shards = next((shards for shards in FUSED if leaf in shards), (leaf,))
            key = f"{parent}.{'+'.join(shards)}"
            rank[key] = (*_COMPUTED, shards[0]).index(shards[0])
        groups.setdefault(key, []).append(name)
    return tuple(tuple(groups[key]) for key in sorted(groups, key=rank.__getitem__))
