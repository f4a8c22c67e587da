# SPDX-License-Identifier: Apache-2.0
"""A GGUF model in several files, as llama.cpp's gguf-split cuts it: NAME-00001-of-00003.gguf ...

The head of each says ``split.no`` (from 0), ``split.count`` and ``split.tensors.count`` (of all);
the first has all other entries. Source: llama.cpp, tools/gguf-split.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from vllm_nvfp4.checkpoints.gguf_header import Head, check_sizes, read_head

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_OF_SPLIT = "split."


def check_gguf(path: Path) -> list[Head]:
    """The heads of a model's files, of which ``path`` is the first. Raises CheckpointError unless
    each file is whole and they are all there."""
    head = read_head(path)
    count = head.entries.get("split.count", 0)
    heads = [head] if count in (0, 1) else _read_parts(head)
    check_sizes(head, sum(len(h.tensors) for h in heads))
    return heads


def tensor_types(heads: Sequence[Head]) -> dict[str, int]:
    """ggml's type of each tensor."""
    return {name: tensor.kind for head in heads for name, tensor in head.tensors.items()}


@contextlib.contextmanager
def as_one_file(heads: Sequence[Head], folder: Path) -> Iterator[Path]:
    """The model's file. One that is made of parts is in ``folder`` for as long as this lasts."""
    if len(heads) == 1:
        yield heads[0].path
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=folder) as temporary:
        path = Path(temporary) / "model.gguf"
        with path.open("wb") as file:
            _join(heads, file)
        yield path


def _read_parts(first: Head) -> list[Head]:
    number, count = (first.entries.get(f"split.{key}") for key in ("no", "count"))
    if type(number) is not int or type(count) is not int:
        raise first.refuse("split.no", number, "a number", "Download the file again.")
    name = _NAME.fullmatch(first.path.name)
    if name is None or (int(name[2]), int(name[3])) != (number + 1, count):
        needed = f"a name that ends in -{number + 1:05d}-of-{count:05d}.gguf, as its head says"
        raise first.refuse("name", first.path.name, needed, "Rename the file.")
    files = [
        first.path.with_name(f"{name[1]}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)
    ]
    if number:
        found = f"part {number + 1} of {count}"
        raise first.refuse("split.no", found, "the first part", f"Name {files[0]}")
    heads = [first]
    for i, path in enumerate(files[1:], 1):
        if not path.is_file():
            needed = f"all {count} parts side by side"
            raise first.refuse("parts", f"no file {path.name}", needed, "Download it too.")
        head = read_head(path)
        for key, value in (("split.no", i), ("split.count", count)):
            if head.entries.get(key) != value:
                raise head.refuse(
                    key, head.entries.get(key), str(value), "Download all parts again."
                )
        heads.append(head)
    total, named = sum(len(h.tensors) for h in heads), first.entries.get("split.tensors.count")
    if not total == len(tensor_types(heads)) == named:
        found = f"{total} in the parts, {len(tensor_types(heads))} of them by different names"
        raise first.refuse(
            "tensors", found, f"the {named} that it names", "Download all parts again."
        )
    return heads


def _join(heads: Sequence[Head], file: BinaryIO) -> None:
    """Write a head without the entries of the split, and the data of each part after the other."""
    first = heads[0]
    kept = [span for key, span in first.spans.items() if not key.startswith(_OF_SPLIT)]
    num_tensors = sum(len(h.tensors) for h in heads)
    file.write(b"GGUF" + struct.pack("<IQQ", first.version, num_tensors, len(kept)))
    with first.path.open("rb") as source:
        for begin, end in kept:
            source.seek(begin)
            file.write(source.read(end - begin))
    base = 0
    for head in heads:
        for name, tensor in head.tensors.items():
            raw = name.encode()
            file.write(struct.pack("<Q", len(raw)) + raw + struct.pack("<I", len(tensor.dims)))
            file.write(struct.pack(f"<{len(tensor.dims)}Q", *tensor.dims))
            file.write(struct.pack("<IQ", tensor.kind, base + tensor.offset))
        num_bytes = max(0, head.path.stat().st_size - head.begin)
        base = _aligned(base + num_bytes, first.alignment)
    for head in heads:
        file.write(bytes(_aligned(file.tell(), first.alignment) - file.tell()))
        with head.path.open("rb") as source:
            source.seek(head.begin)
            shutil.copyfileobj(source, file, 1 << 24)


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
