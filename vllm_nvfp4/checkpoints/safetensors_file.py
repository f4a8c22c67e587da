# SPDX-License-Identifier: Apache-2.0
"""A safetensors file written one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from vllm_nvfp4.checkpoints.dtypes import dtype_name
from vllm_nvfp4.checkpoints.source import TensorInfo


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

    def leave_out(self) -> None:
        """Have a hole in the file for all tensors that are not written."""
        self._file.truncate(self._file.tell() + sum(info.num_bytes for _, info in self._left))
        self._left = []

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
        dtype = dtype_name(tensor.dtype)
        found = TensorInfo(dtype, tuple(tensor.shape))
        if name != expected_name or found != info:
            raise ValueError(
                f"{self.path}: got {name} {found}; the header says {expected_name} {info}"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._file.write(flat.view(torch.uint8).numpy().data)
