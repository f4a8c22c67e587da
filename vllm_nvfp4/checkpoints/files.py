# SPDX-License-Identifier: Apache-2.0
"""The way to a checkpoint's files: nothing outside its folder is opened, nothing is read without a
bound, and JSON comes back as a table or as one CheckpointError."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vllm_nvfp4.checkpoints.spec import CheckpointError

# The index of the largest models has about 20 MB; a header, about 150 bytes a tensor. 100 MB is
# the safetensors library's own limit for a header.
MAX_JSON_BYTES = 100_000_000


def file_in_folder(folder: Path, name: str, found_in: str, todo: str) -> Path | None:
    """folder/name if it is a regular file of the folder, None if nothing is there.

    name: a plain file name; found_in: what names it, for messages
    A link may lead out of the folder in one case: from a snapshot of a Hugging Face cache into the
    ``blobs`` folder of the same repository (models--x/snapshots/<commit>/f -> ../../blobs/<hash>),
    which is how that cache stores every file.
    Raises CheckpointError for a path with folders in it, for a link that leads elsewhere or
    nowhere, and for a pipe, a device or a folder in the file's place.
    """
    is_plain = name.isprintable() and not {"/", "\\"} & set(name) and len(name.encode()) <= 255
    if name in ("", ".", "..") or not is_plain:
        what = (
            "a path that leaves the folder" if ".." in name or name[:1] == "/" else "no file name"
        )
        raise CheckpointError(
            found_in, repr(name), what, "the name of a file in the folder", "Correct the index."
        )
    path = folder / name
    is_link = path.is_symlink()
    if not is_link and not path.exists():
        return None
    try:
        root, target = folder.resolve(), path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        raise CheckpointError(name, "file", "a broken link", f"the file {name}", todo) from None
    blobs = root.parent.parent / "blobs"
    in_cache = root.parent.name == "snapshots" and target.parent == blobs
    if not (target.is_relative_to(root) or in_cache):
        raise CheckpointError(
            name,
            "link",
            f"a link to {target}",
            "a file in the folder, or in the blobs folder of the same Hugging Face cache entry",
            "Copy the file into the folder, or name the folder that holds it.",
        )
    if not target.is_file():
        raise CheckpointError(
            name, "file", "a folder, pipe or device", f"a regular file {name}", todo
        )
    return path


def read_table(path: Path, label: str, todo: str, is_strict: bool = False) -> dict[str, Any]:
    """The JSON object in a file; ``label`` names it in messages.

    Raises CheckpointError for a file that is too large, and as :func:`parse_table` does.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(
            label, "size", f"{size} bytes", f"a JSON object of {MAX_JSON_BYTES} at most", todo
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(label, "contents", error, "a JSON object", todo) from error
    return parse_table(raw, label, "contents", todo, is_strict)


def parse_table(
    raw: bytes, label: str, what: str, todo: str, is_strict: bool = False
) -> dict[str, Any]:
    """The JSON object that UTF-8 text holds.

    is_strict: refuse a name that occurs twice in one object, and NaN and infinities: JSON has none,
               but models' own configurations do
    Raises CheckpointError for bytes that are no such thing, and for nesting deeper than the
    interpreter's stack.
    """
    hooks: dict[str, Any] = {}
    if is_strict:
        hooks = {"object_pairs_hook": _each_name_once, "parse_constant": _refuse_constant}
    try:
        value = json.loads(raw.decode("utf-8"), **hooks)
    except RecursionError:
        raise CheckpointError(label, what, "nesting without end", "a JSON object", todo) from None
    except UnicodeDecodeError as error:
        found = f"{error.reason} at byte {error.start}"
        raise CheckpointError(label, what, found, "JSON in UTF-8", todo) from None
    except ValueError as error:
        raise CheckpointError(label, what, error, "a JSON object", todo) from error
    if not isinstance(value, dict):
        raise CheckpointError(label, what, type(value).__name__, "a JSON object", todo)
    return value


def _each_name_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} twice in one object")
    return table


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which JSON does not have")
