# SPDX-License-Identifier: Apache-2.0
"""Write an NVFP4 checkpoint in ModelOpt's dialect from a BF16 one, one layer in memory at a time.

Per quantised layer P of shape [N, K]:
    P.weight          uint8 [N, K/2], the low nibble holds even k
    P.weight_scale    float8_e4m3fn [N, K/16]; multiplies
    P.weight_scale_2  float32 []; multiplies, one value for all the shards of a fused layer
Weights only: quant_algo is W4A16_NVFP4, which stores no input_scale. Source of the names and of
config.json's quantization_config: NVIDIA ModelOpt's Hugging Face export.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.numerics.formats import NVFP4
from vllm_nvfp4.numerics.quantize import nvfp4_global_scale, quantize_nvfp4
from vllm_nvfp4.numerics.weight import BlockScaledWeight

INDEX_NAME = "model.safetensors.index.json"
# Layers that serving engines fuse: their shards share weight_scale_2.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_QUANTIZED = re.compile(r"(^|\.)layers\.\d+\..*(_proj|\.w[123])\.weight$")
DEFAULT_IGNORE = ("lm_head", "*embed_tokens*", "*vision*", "*visual*", "*audio*")
# Below torch's grain size: no step of a piece is worth a second thread to it.
_PIECE_ELEMENTS = 32_768
_16_BIT = ("BF16", "F16", "F32")
# safetensors' name of each dtype, and its bits.
_DTYPES = {
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
_BITS = dict(_DTYPES.values())
# Rewritten here, or read by other tools only; every other file goes along as it is.
_NOT_COPIED = ("*.safetensors", INDEX_NAME, "config.json", "*.bin", "*.pt", "*.pth", "*.gguf")


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


@dataclass
class WriteReport:
    """What became of the model: bytes of all weights and of the quantised layers, and names."""

    bytes_before: int = 0
    bytes_after: int = 0
    layer_bytes_before: int = 0
    layer_bytes_after: int = 0
    quantized: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


class SafetensorsWriter:
    """A safetensors file whose tensors are written one by one, in the order of ``entries``.

    The header holds every tensor's place and comes first; dtypes and shapes are known before the
    values are, so that no more than one tensor has to be in memory.
    """

    def __init__(self, path: Path, entries: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self._left = list(entries.items())
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, info in entries.items():
            end = offset + info.num_bytes
            header[name] = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format wants the data at a multiple of 8
        self._file: BinaryIO = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None and self._left:
            raise ValueError(f"{self.path}: {len(self._left)} announced tensors were not written")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor; it must be the one, and of the dtype and shape, announced."""
        expected_name, info = self._left.pop(0) if self._left else ("nothing more", None)
        dtype = _DTYPES[tensor.dtype][0] if tensor.dtype in _DTYPES else str(tensor.dtype)
        found = TensorInfo(dtype, tuple(tensor.shape))
        if name != expected_name or found != info:
            raise ValueError(
                f"{self.path}: got {name} {found}; the header says {expected_name} {info}"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._file.write(flat.view(torch.uint8).numpy().data)


class _Source:
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
            with safe_open(path, "pt") as reader:
                for name in reader.keys():  # noqa: SIM118 (not a mapping)
                    part = reader.get_slice(name)
                    self.tensors[name] = TensorInfo(part.get_dtype(), tuple(part.get_shape()))
                    self._file_of[name] = path

    def load(self, name: str, device: torch.device | str) -> torch.Tensor:
        with safe_open(self._file_of[name], "pt") as reader:
            return reader.get_tensor(name).to(device)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) or name.startswith(p + ".") for p in patterns)


def _is_quantized(name: str, info: TensorInfo, ignore: Sequence[str]) -> bool:
    layer = name.removesuffix(".weight")
    return (
        _QUANTIZED.search(name) is not None
        and info.dtype in _16_BIT
        and len(info.shape) == 2
        and info.shape[1] % NVFP4.block_size == 0
        and not _matches(layer, ignore)
    )


def _groups(names: Iterable[str], quantized: set[str]) -> list[list[str]]:
    """Tensor names in order, each shard of a fused layer drawn to the first of its siblings."""
    groups: dict[str, list[str]] = {}
    for name in names:
        key = name
        if name in quantized:
            parent, _, leaf = name.removesuffix(".weight").rpartition(".")
            fused = next((shards for shards in FUSED if leaf in shards), None)
            key = f"{parent}.{'+'.join(fused)}" if fused else name
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _planned(name: str, info: TensorInfo, quantized: set[str]) -> dict[str, TensorInfo]:
    if name not in quantized:
        return {name: info}
    rows, cols = info.shape
    return {
        name: TensorInfo("U8", (rows, cols // 2)),
        f"{name}_scale": TensorInfo("F8_E4M3", (rows, cols // NVFP4.block_size)),
        f"{name}_scale_2": TensorInfo("F32", ()),
    }


def quantization_config(ignore: Sequence[str]) -> dict[str, Any]:
    """config.json's entry for weights in NVFP4 and activations as they come."""
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4.block_size}
    return {
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
        "ignore": list(ignore),
        "quant_algo": "W4A16_NVFP4",
        "producer": {"name": "vllm-nvfp4"},
        "quant_method": "modelopt",
    }


def write_nvfp4(
    source: Path,
    target: Path,
    *,
    method: str = "mse",
    ignore: Sequence[str] = DEFAULT_IGNORE,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> WriteReport:
    """Quantise the linear layers of the decoder blocks of ``source`` into a new folder ``target``.

    source:   Hugging Face folder with 16- or 32-bit safetensors weights
    target:   must not exist; it appears whole, or not at all
    method:   see :func:`vllm_nvfp4.numerics.quantize.quantize_nvfp4`
    ignore:   fnmatch patterns of layer names that stay as they are
    progress: called with the name of each layer before it is quantised
    Layers whose K is not a multiple of 16 stay as they are; ``WriteReport.kept`` names every
    matrix that did, and so does the new checkpoint's ignore list.

    Raises CheckpointError if ``source`` is not such a folder, is quantised already, or has no
    layer to quantise; FileExistsError if ``target`` exists.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it or choose another folder")
    checkpoint = _Source(source)
    config = json.loads((source / "config.json").read_text())
    if "quantization_config" in config:
        found = config["quantization_config"].get("quant_method", "a quantization_config")
        raise CheckpointError(
            str(source / "config.json"),
            "quantization_config",
            found,
            "an unquantised checkpoint",
            "Start from the model's BF16 weights.",
        )
    quantized = {n for n, i in checkpoint.tensors.items() if _is_quantized(n, i, ignore)}
    if not quantized:
        raise CheckpointError(
            str(source),
            "weights",
            f"{len(checkpoint.tensors)} tensors, none to quantise",
            "linear layers under `layers.<i>.` with K a multiple of 16, in 16 or 32 bits",
            "Check the model and the ignore patterns.",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        report = _write_weights(checkpoint, folder, quantized, method, device, progress)
        # A tied lm_head is not stored, but engines build it and ask whether it is quantised.
        ignored = dict.fromkeys([*report.kept, "lm_head"])
        config["quantization_config"] = quantization_config(list(ignored))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for path in source.iterdir():
            if path.is_file() and not _matches(path.name, _NOT_COPIED):
                shutil.copyfile(path, folder / path.name)
        folder.rename(target)
    return report


def _quantize(tensor: torch.Tensor, method: str, shared: torch.Tensor) -> BlockScaledWeight:
    """quantize_nvfp4, on a CPU in pieces of rows that stay in the cache, a thread for each core.

    torch's own threads would meet at a barrier after each of some two hundred small steps.
    """
    if tensor.device.type != "cpu":
        return quantize_nvfp4(tensor, method, shared)
    rows = max(1, _PIECE_ELEMENTS // tensor.shape[1])
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        parts = list(
            pool.map(lambda part: quantize_nvfp4(part, method, shared), tensor.split(rows))
        )
    return BlockScaledWeight(
        torch.cat([p.codes for p in parts]),
        torch.cat([p.block_scale.view(torch.uint8) for p in parts]).view(torch.float8_e4m3fn),
        torch.cat([p.global_scale for p in parts]),
        NVFP4,
    )


def _write_weights(
    checkpoint: _Source,
    folder: Path,
    quantized: set[str],
    method: str,
    device: torch.device | str,
    progress: Callable[[str], None] | None,
) -> WriteReport:
    report = WriteReport()
    groups = _groups(checkpoint.tensors, quantized)
    entries: dict[str, TensorInfo] = {}
    for name in (n for group in groups for n in group):
        info = checkpoint.tensors[name]
        planned = _planned(name, info, quantized)
        entries |= planned
        after = sum(i.num_bytes for i in planned.values())
        report.bytes_before += info.num_bytes
        report.bytes_after += after
        if name in quantized:
            report.layer_bytes_before += info.num_bytes
            report.layer_bytes_after += after
            report.quantized.append(name.removesuffix(".weight"))
        elif len(info.shape) >= 2:
            report.kept.append(name.removesuffix(".weight"))
    with SafetensorsWriter(folder / "model.safetensors", entries) as writer:
        for group in groups:
            tensors = {name: checkpoint.load(name, device) for name in group}
            if group[0] not in quantized:
                for name, tensor in tensors.items():
                    writer.write(name, tensor)
                continue
            if progress is not None:
                progress(group[0].removesuffix(".weight"))
            shared = torch.stack([nvfp4_global_scale(t) for t in tensors.values()]).amax()
            for name, tensor in tensors.items():
                weight = _quantize(tensor, method, shared)
                writer.write(name, weight.codes)
                writer.write(f"{name}_scale", weight.block_scale)
                writer.write(f"{name}_scale_2", shared)
    return report
