# SPDX-License-Identifier: Apache-2.0
"""Files and folders that a command line names, looked at before anything takes time."""

from __future__ import annotations

import os
from pathlib import Path


def check_text(flag: str, name: str) -> None:
    """Raise ValueError unless ``name`` is ``builtin`` or a file of UTF-8 text that is not empty."""
    if name == "builtin":
        return
    path = Path(name).expanduser()
    if not path.exists():
        raise ValueError(f"{flag} {name}: no such file; give a text file, or builtin")
    if path.is_dir():
        raise ValueError(f"{flag} {name}: a folder; needs a text file, or builtin")
    if not path.is_file():
        return  # a pipe can be read only once
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{flag} {name}: {error.reason} at byte {error.start}; needs plain UTF-8 text"
        ) from None
    except OSError as error:
        raise ValueError(f"{flag} {name}: {error.strerror}") from None
    if not text.strip():
        raise ValueError(f"{flag} {name}: the file is empty; needs text")


def check_can_write(flag: str, path: Path, is_folder: bool = False) -> None:
    """Raise ValueError where ``path`` cannot be made, with the folders above it.

    is_folder: it is to be a folder, which may be there; else a file, which would be replaced
    """
    above = path.expanduser().absolute()
    if above.exists() and above.is_dir() != is_folder:
        found = "a folder" if above.is_dir() else "a file, not a folder"
        raise ValueError(f"{flag} {path}: {above} is {found}")
    if not above.is_dir():
        above = above.parent
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise ValueError(f"{flag} {path}: {above} is a file, not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {path}: the folder {above} cannot be written to")
