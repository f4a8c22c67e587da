# SPDX-License-Identifier: Apache-2.0
"""The tensors of a folder of safetensors files, from the headers alone.

A safetensors file is an 8-byte little-endian header length, a JSON header, and the data that the
header's offsets cut up. Reading it here needs no torch and touches no weight, so a 400 GB folder
answers at once; and everything that can be wrong with the files is found before vLLM starts.
Source: https://github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from vllm_nvfp4.checkpoints.files import MAX_JSON_BYTES, file_in_folder, parse_table, read_table
from vllm_nvfp4.checkpoints.spec import CheckpointError

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = MAX_JSON_BYTES
# Far beyond any model, and small enough that no product or message of theirs is a burden.
_MAX_DIMS, _MAX_SIZE, _MAX_NAME = 16, 2**62, 1000
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_AGAIN = "Download the file again."

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True)
class TensorHeader:
    """One stored tensor.

    file:         name of its file in the folder
    dtype, shape: as safetensors names them, e.g. "F8_E4M3"
    start, end:   its bytes in the file
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """name -> TensorHeader of every tensor in the folder, by the index file if there is one.

    Raises CheckpointError: no safetensors files, a shard that the index names and that is missing,
    a tensor that is not where the index says, a tensor in two files, a file that is truncated or
    not safetensors, and a path that leaves the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            str(folder), "path", "no folder", "a folder with a model", "Check the path."
        )
    index_path = file_in_folder(folder, INDEX, str(folder), _AGAIN)
    index = _read_index(index_path) if index_path else None
    files = sorted(set(index.values())) if index else _find_files(folder)
    tensors: dict[str, TensorHeader] = {}
    for name in files:
        for tensor, header in read_file_header(_shard_path(folder, name), name).items():
            if tensor in tensors:
                raise CheckpointError(
                    name,
                    tensor,
                    f"a second copy, also in {tensors[tensor].file}",
                    "each tensor once",
                    "Remove the file that does not belong to the checkpoint.",
                )
            tensors[tensor] = header
    if index is not None:
        _check_index(index, tensors)
    if not tensors:
        raise CheckpointError(str(folder), "tensors", "none", "at least one", _AGAIN)
    return tensors


def read_file_header(path: Path, label: str) -> dict[str, TensorHeader]:
    """The tensors of one safetensors file; ``label`` names it in messages."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if length < 2 or length > MAX_HEADER_BYTES or 8 + length > size:
            raise CheckpointError(
                label,
                "header",
                f"a header length of {length} in a file of {size} bytes",
                f"2 to {min(MAX_HEADER_BYTES, max(size - 8, 2))} bytes: the file is truncated or "
                "not safetensors",
                _git_lfs_hint(path) or _AGAIN,
            )
        raw = stream.read(length)
    if raw[:1] != b"{":  # the safetensors library takes no white space before it
        raise CheckpointError(label, "header", repr(raw[:1]), "a JSON object", _AGAIN)
    header = parse_table(raw, label, "header", _AGAIN, is_strict=True)
    _check_metadata(label, header.pop("__metadata__", {}))
    data_start = 8 + length
    tensors = {name: _parse_entry(label, name, e, data_start, size) for name, e in header.items()}
    _check_layout(label, tensors, data_start, size)
    return tensors


def _check_metadata(label: str, metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            label, "__metadata__", type(metadata).__name__, "a table of strings", _AGAIN
        )


def _parse_entry(
    label: str, name: str, entry: Any, data_start: int, file_size: int
) -> TensorHeader:
    def fail(found: object, needed: str) -> CheckpointError:
        return CheckpointError(label, name, found, needed, _AGAIN)

    if not name or not name.isprintable() or len(name) > _MAX_NAME:
        raise fail("such a name", f"a name of 1 to {_MAX_NAME} printable characters")
    if not isinstance(entry, dict):
        raise fail(repr(entry), "a table with dtype, shape and data_offsets")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise fail(f"dtype {dtype!r}", "one of " + ", ".join(DTYPE_BITS))
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise fail(f"shape {shape}, data_offsets {offsets}", "lists of non-negative integers")
    start, end = offsets[0] + data_start, offsets[1] + data_start
    num_bytes = prod(shape) * DTYPE_BITS[dtype] // 8
    if end - start != num_bytes:
        raise fail(f"{end - start} bytes", f"{num_bytes} bytes for {dtype} of shape {shape}")
    if end > file_size:
        raise fail(f"a file of {file_size} bytes", f"{end} bytes or more: the file is truncated")
    return TensorHeader(label, dtype, tuple(shape), start, end)


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(values, list)
        and len(values) <= _MAX_DIMS
        and all(type(v) is int and 0 <= v <= _MAX_SIZE for v in values)
    )


def _check_layout(
    label: str, tensors: Mapping[str, TensorHeader], data_start: int, file_size: int
) -> None:
    """Tensors follow each other without gap or overlap, up to the end of the file."""
    position = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            raise CheckpointError(
                label, name, f"data at byte {tensor.start}", f"at byte {position}", _AGAIN
            )
        position = tensor.end
    if position != file_size:
        raise CheckpointError(
            label, "file length", f"{file_size} bytes", f"{position} bytes", _AGAIN
        )


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_table(path, path.name, _AGAIN, is_strict=True).get("weight_map")
    if isinstance(weight_map, dict) and weight_map:
        if all(isinstance(file, str) for file in weight_map.values()):
            return weight_map
        weight_map = "a table with other values"
    raise CheckpointError(
        path.name, "weight_map", repr(weight_map)[:60], "tensor -> file name", _AGAIN
    )


def _check_index(index: Mapping[str, str], tensors: Mapping[str, TensorHeader]) -> None:
    for tensor, file in index.items():
        if tensor in tensors and tensors[tensor].file == file:
            continue
        found = f"it in {tensors[tensor].file}" if tensor in tensors else "no such tensor"
        raise CheckpointError(
            file, tensor, found, f"it in {file}, as {INDEX} says", "Download both files again."
        )


def _find_files(folder: Path) -> list[str]:
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    # A consolidated copy of the same weights in the vendor's own names: vLLM leaves it out too.
    sharded = [f for f in files if not f.startswith("consolidated")]
    if sharded:
        return sharded
    if files:
        return files
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            str(folder),
            "weights",
            f"only {pickles[0]} (pickle)",
            "safetensors files",
            "A pickle can run code when it is read, so it is not. Convert it: load the model with "
            "transformers and save_pretrained it.",
        )
    raise CheckpointError(
        str(folder),
        "weights",
        "no *.safetensors file",
        f"model.safetensors, or {INDEX} with its shards",
        "Name the folder that holds the model, and let its download finish.",
    )


def _shard_path(folder: Path, name: str) -> Path:
    """The file that the index names, or that the folder holds. vLLM reads nothing below it."""
    todo = "Let the download finish, or download this file again."
    path = file_in_folder(folder, name, INDEX, todo)
    if path is None:
        raise CheckpointError(name, "file", "nothing", f"this shard, named in {INDEX}", todo)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            INDEX, name, "no safetensors file", "names that end in .safetensors", _AGAIN
        )
    return path


def _git_lfs_hint(path: Path) -> str:
    with path.open("rb") as stream:
        is_pointer = stream.read(20).startswith(b"version https://git")
    return "It is a git-lfs pointer: run `git lfs pull` in the folder." if is_pointer else ""
