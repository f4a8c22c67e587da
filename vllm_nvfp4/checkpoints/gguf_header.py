# SPDX-License-Identifier: Apache-2.0
"""The head of a GGUF file, looked through before a library is given the file.

Readers of GGUF trust its counts: they make an object of every element of every array, and a layer
for every one that block_count names. Here each length is held against the file's own, in memory
that does not grow with what the file says. Source: the GGUF specification, versions 2 and 3.

    "GGUF" | version u32 | tensors u64 | entries u64
    entries:  key string | type u32 | value
    tensors:  name string | dims u32 | dim u64 ... | type u32 | offset u64
    string:   length u64 | bytes;  array: type u32 | length u64 | elements
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_nvfp4.checkpoints.spec import CheckpointError

_HEAD_BYTES = 24
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Of the types with values of one size, the struct code.
_SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
# A vocabulary of 262,144 has 1.4 million elements in its four arrays.
_MAX_ELEMENTS = 8 << 20
_MAX_NAME = 1 << 16
_MAX_DIMS = 4
_MAX_EXPERTS = 100_000  # of all layers
_AGAIN = "Download the file again."


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a head. kind: ggml's type; offset: of its data, from where all data begins"""

    kind: int
    dims: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Head:
    """The head of one file.

    entries: the value of each, None for an array; spans: where it stands in the file, key included
    alignment, begin: of the data
    """

    path: Path
    version: int
    entries: Mapping[str, Any]
    spans: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, TensorEntry]
    alignment: int
    begin: int

    def refuse(self, what: str, found: object, needed: str, todo: str) -> CheckpointError:
        return CheckpointError(str(self.path), f"GGUF, {what}", found, needed, todo)


class _Reader:
    """Reads forward through the bytes of a file; every length is checked before it is used."""

    def __init__(self, path: Path, data: mmap.mmap | bytes) -> None:
        self.path, self.data, self.offset = path, data, 0
        self.num_elements = 0

    def refuse(self, what: str, found: object, needed: str) -> CheckpointError:
        return CheckpointError(str(self.path), f"GGUF, {what}", found, needed, _AGAIN)

    def skip(self, size: int, what: str) -> int:
        """Step over ``size`` bytes; returns where they begin."""
        begin, left = self.offset, len(self.data) - self.offset
        if size > left:
            raise self.refuse(what, f"{size} bytes at {begin}", f"at most the file's last {left}")
        self.offset += size
        return begin

    def number(self, code: str, what: str) -> Any:
        size = struct.calcsize(f"<{code}")
        return struct.unpack_from(f"<{code}", self.data, self.skip(size, what))[0]

    def string(self, what: str) -> str:
        size = self.number("Q", what)
        begin = self.skip(size, what)
        return bytes(self.data[begin : begin + min(size, _MAX_NAME)]).decode("utf-8", "replace")

    def value(self, kind: int, what: str) -> Any:
        """A scalar or a string; None for an array, which is stepped over."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self._skip_array(what)
        raise self.refuse(what, f"a value of type {kind}", "a type from 0 to 12")

    def _skip_array(self, what: str) -> None:
        kind, length = self.number("I", what), self.number("Q", what)
        self.num_elements += length
        if self.num_elements > _MAX_ELEMENTS:
            raise self.refuse(what, f"an array of {length}", f"{_MAX_ELEMENTS} elements in all")
        if kind in _SCALARS:
            self.skip(length * struct.calcsize(f"<{_SCALARS[kind]}"), what)
        elif kind == _STRING:
            for _ in range(length):
                self.skip(self.number("Q", what), what)
        else:
            raise self.refuse(what, f"an array of type {kind}", "one of numbers or strings")


def read_head(path: Path) -> Head:
    """Raises CheckpointError unless every part of the head lies in the file, and every tensor's
    bytes too."""
    size = path.stat().st_size
    if size < _HEAD_BYTES:
        raise CheckpointError(str(path), "GGUF", f"{size} bytes", "a whole GGUF file", _AGAIN)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _read(_Reader(path, data))


def _read(reader: _Reader) -> Head:
    magic, version = bytes(reader.data[:4]), struct.unpack_from("<I", reader.data, 4)[0]
    if magic != b"GGUF" or version not in _VERSIONS:
        raise reader.refuse("head", f"{magic!r} version {version}", "a whole GGUF file, 2 or 3")
    reader.offset = 8
    num_tensors, num_entries = reader.number("Q", "tensors"), reader.number("Q", "entries")
    entries: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(num_entries):  # an entry has bytes: the loop ends with the file
        begin = reader.offset
        key = reader.string("a key")
        if key in entries:
            raise reader.refuse(key, "it twice", "each key once")
        entries[key] = reader.value(reader.number("I", key), key)
        spans[key] = begin, reader.offset
    tensors: dict[str, TensorEntry] = {}
    for _ in range(num_tensors):
        name = reader.string("a tensor's name")
        if name in tensors:
            raise reader.refuse(name, "it twice", "each tensor once")
        tensors[name] = _tensor(reader, name)
    alignment = entries.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise reader.refuse("general.alignment", alignment, "a power of two")
    begin = -(-reader.offset // alignment) * alignment
    for name, tensor in tensors.items():
        end = begin + tensor.offset + tensor.num_bytes
        if end > len(reader.data):
            needed = f"an end within the file's {len(reader.data)}"
            raise reader.refuse(name, f"an end at byte {end}", needed)
    return Head(reader.path, version, entries, spans, tensors, alignment, begin)


def _tensor(reader: _Reader, name: str) -> TensorEntry:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    num_dims = reader.number("I", name)
    if num_dims > _MAX_DIMS:
        raise reader.refuse(name, f"{num_dims} dimensions", f"at most {_MAX_DIMS}")
    dims = [reader.number("Q", name) for _ in range(num_dims)]
    kind, offset = reader.number("I", name), reader.number("Q", name)
    if kind not in {int(known) for known in GGML_QUANT_SIZES}:
        raise reader.refuse(name, f"type {kind}", "a type that the package gguf knows")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if dims and dims[0] % block:
        raise reader.refuse(name, f"rows of {dims[0]}", f"a multiple of {block}")
    return TensorEntry(kind, tuple(dims), offset, math.prod(dims) // block * block_bytes)


def check_sizes(head: Head, num_tensors: int) -> None:
    """Raises CheckpointError where the layers that a model's head announces are more than its
    tensors, or its experts more than any model's."""
    entries = head.entries
    architecture = entries.get("general.architecture")
    if not isinstance(architecture, str):
        raise head.refuse("general.architecture", architecture, "a name", _AGAIN)
    key = f"{architecture}.block_count"
    layers, experts = entries.get(key), entries.get(f"{architecture}.expert_count", 0)
    if type(layers) is not int or not 0 < layers <= num_tensors:
        raise head.refuse(key, layers, f"a number up to its {num_tensors} tensors", _AGAIN)
    if type(experts) is not int or not 0 <= experts * layers <= _MAX_EXPERTS:
        raise head.refuse(f"{architecture}.expert_count", experts, "a number of experts", _AGAIN)
