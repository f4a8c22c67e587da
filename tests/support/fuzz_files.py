# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders held in memory, so that thousands can be damaged and written out quickly."""

from __future__ import annotations

import json
import os
import shutil
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_nvfp4.testing.checkpoints import (
    extract_fixture,
    fixture_names,
    make_legacy,
    split_into_shards,
    to_gpt_oss_mxfp4,
    write_dequantized,
)
from vllm_nvfp4.testing.tiny_models import write_model

_KEPT = ("config.json", "hf_quant_config.json", "model.safetensors")


@dataclass(frozen=True)
class Node:
    """One entry of a folder.

    data: its bytes
    kind: "file", "link" (data is the target), "fifo" or "folder"
    size: of a sparse file that is longer than data; 0 for data's own
    """

    data: bytes = b""
    kind: str = "file"
    size: int = 0


Files = dict[str, Node]


def write_files(files: Files, folder: Path) -> Path:
    """Write the entries to a new folder. Names are as a file system takes them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, node in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if node.kind == "link":
            path.symlink_to(os.fsdecode(node.data))
        elif node.kind == "fifo":
            os.mkfifo(path)
        elif node.kind == "folder":
            path.mkdir()
        else:
            path.write_bytes(node.data)
            if node.size:
                os.truncate(path, node.size)
    return folder


def read_files(folder: Path) -> Files:
    names = [p.name for p in folder.iterdir() if p.name in _KEPT or "safetensors" in p.name]
    return {name: Node((folder / name).read_bytes()) for name in sorted(names)}


def make_legacy_seed(scratch: Path) -> Files:
    """A checkpoint with its configuration in hf_quant_config.json."""
    return read_files(make_legacy(extract_fixture("modelopt/nvfp4-kv8-llama", scratch / "legacy")))


def make_seeds(scratch: Path) -> dict[str, Files]:
    """Every stored checkpoint, and what they do not have: one with its configuration in the legacy
    file, one in shards with an index, 16-bit ones, and the stacked experts of gpt-oss."""
    seeds = {"legacy": make_legacy_seed(scratch)}
    for name in (*fixture_names(), *fixture_names(experts=True)):
        seeds[name] = read_files(extract_fixture(name, scratch / "stored" / name))
    for name in ("modelopt/nvfp4-kv8-llama", "compressed_tensors/mixed-llama"):
        folder = split_into_shards(extract_fixture(name, scratch / "sharded"), 3)
        seeds[f"sharded {name}"] = read_files(folder)
    for name in ("modelopt/w4a16-gemma3", "modelopt/nvfp4-qwen3"):
        plain = write_dequantized(extract_fixture(name, scratch / "quantized"), scratch / "plain")
        seeds[f"16-bit {name}"] = read_files(plain)
        shutil.rmtree(plain)
    folder = to_gpt_oss_mxfp4(write_model(scratch / "gpt-oss", "gpt_oss"))
    seeds["gpt-oss"] = read_files(folder)
    return dict(sorted(seeds.items()))


def weight_files(files: Files) -> list[str]:
    return [name for name in files if name.endswith(".safetensors")]


def split_raw(data: bytes) -> tuple[bytes, bytes]:
    """(header as bytes, the bytes after it); raises ValueError for what has no whole header."""
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else len(data)
    if length > len(data) - 8:
        raise ValueError("the header is cut off")
    return data[8 : 8 + length], data[8 + length :]


def split_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, the bytes after it) of a whole safetensors file; raises ValueError for another."""
    raw, body = split_raw(data)
    header = json.loads(raw)
    if not isinstance(header, dict):
        raise ValueError("not a table")
    return header, body


def join_header(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def with_data(files: Files, name: str, data: bytes) -> None:
    files[name] = replace(files.get(name, Node()), data=data, kind="file")
