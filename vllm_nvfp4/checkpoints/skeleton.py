# SPDX-License-Identifier: Apache-2.0
"""A model of a hub as a folder of configuration and headers: for what reads no weights, and for an
engine before it downloads them.

Of each safetensors file only the header is fetched; the folder's own file has that header and, in
place of the data, a hole of the same size, which takes no room on the disk.
"""

from __future__ import annotations

import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_nvfp4.checkpoints.files import MAX_JSON_BYTES, parse_table
from vllm_nvfp4.checkpoints.hub import ask_hub, hub_address, hub_headers
from vllm_nvfp4.checkpoints.locate import find_folder, is_path
from vllm_nvfp4.checkpoints.spec import CheckpointError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SECONDS = 30.0
_TODO = "Try again, or download the model: hf download"


@contextmanager
def folder_or_skeleton(
    model: str, revision: str = "main", while_loading: bool = False
) -> Iterator[Path]:
    """The folder of a model that is here, else a skeleton of the hub's, removed at the end.

    while_loading: vLLM loads the model, and of a hub name may have fetched the configuration alone:
                   its cached folder without weights is not taken
    Raises CheckpointError for a model that is nowhere, and for a hub that does not answer.
    """
    try:
        folder = find_folder(model, revision)
    except CheckpointError:
        if is_path(model):
            raise
    else:
        is_empty = not Path(model).is_dir() and not any(folder.glob("*.safetensors"))
        if not (while_loading and is_empty):
            yield folder
            return
    ask_hub(model, revision)
    with tempfile.TemporaryDirectory(prefix="vllm-nvfp4-headers-") as name:
        yield fetch(model, revision, Path(name))


def fetch(model: str, revision: str, target: Path) -> Path:
    """Write the skeleton of ``model`` into ``target``."""
    for name in ("config.json", "hf_quant_config.json", _INDEX):
        content = _get(model, revision, name)
        if content is not None:
            (target / name).write_bytes(content)
    index = target / _INDEX
    files = [_SINGLE]
    if index.is_file():
        table = parse_table(index.read_bytes(), f"{model}/{_INDEX}", "contents", f"{_TODO} {model}")
        weight_map = table.get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{model}/{_INDEX}", "weight_map", "none", "a table", _TODO)
        files = sorted({str(name) for name in weight_map.values()})
    for name in files:
        if "/" in name or name.startswith("."):
            raise CheckpointError(f"{model}/{_INDEX}", name, "a path", "a file name", "Report it.")
        _fetch_header(model, revision, name, target / name)
    return target


def write_hole(path: Path, header: bytes, num_bytes: int) -> None:
    """A safetensors file with this header and, in place of ``num_bytes`` of data, a hole."""
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + num_bytes)


def _fetch_header(model: str, revision: str, name: str, path: Path) -> None:
    """The header of one file, and nothing for as many bytes as its tensors have."""
    start = _get(model, revision, name, (0, 7))
    size = int.from_bytes(start or b"", "little")
    if start is None or len(start) != 8 or size > MAX_JSON_BYTES:
        found = "no such file" if start is None else f"a header of {size} bytes"
        raise CheckpointError(f"{model}/{name}", "header", found, "a safetensors file",
                              f"{_TODO} {model}")  # fmt: skip
    header = _get(model, revision, name, (8, 7 + size)) or b""
    tensors = parse_table(header, f"{model}/{name}", "header", f"{_TODO} {model}")
    ends = [
        t["data_offsets"][1]
        for t in tensors.values()
        if isinstance(t, dict) and isinstance(t.get("data_offsets"), list)
    ]
    write_hole(path, header, max((e for e in ends if isinstance(e, int)), default=0))


def _get(model: str, revision: str, name: str, span: tuple[int, int] | None = None) -> bytes | None:
    """A file of a model, or the bytes ``span`` of it, both ends included; None where it has none.

    Raises CheckpointError for every other answer.
    """
    request = urllib.request.Request(
        f"{hub_address()}/{model}/resolve/{revision}/{name}", headers=hub_headers()
    )
    if span:
        request.add_header("Range", f"bytes={span[0]}-{span[1]}")
    limit = span[1] - span[0] + 1 if span else MAX_JSON_BYTES
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            return response.read(limit)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        found = f"HTTP {error.code} {error.reason}"
    except (OSError, ValueError) as error:
        found = str(getattr(error, "reason", error))
    raise CheckpointError(f"{model}/{name}", "download", found, "the file", f"{_TODO} {model}")
