# SPDX-License-Identifier: Apache-2.0
"""Folders that machine code is loaded from: nobody but their owner may write to them."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def make_private(folder: Path) -> str | None:
    """Make the folder, mode 0700, if there is none; why it must not be used, or None if it may.

    What is read from it runs with this process's rights, so it has to belong to this process's
    user, and neither group nor others may write to it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.stat()
    except OSError as error:
        return str(error)
    if info.st_uid != os.geteuid():
        return f"it belongs to user {info.st_uid}, this process runs as {os.geteuid()}"
    if not is_private(info):
        return f"others may write to it (mode {stat.S_IMODE(info.st_mode):o}, needs 700)"
    return None if os.access(folder, os.W_OK | os.X_OK) else "not writable"


def is_private(info: os.stat_result) -> bool:
    """Whether a file or folder is this user's, and nobody else's to write to."""
    return info.st_uid == os.geteuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
