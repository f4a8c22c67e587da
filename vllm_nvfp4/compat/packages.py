# SPDX-License-Identifier: Apache-2.0
"""How to install what is missing, in words that work whatever way this project was installed."""

from __future__ import annotations

from importlib import metadata

_DISTRIBUTION = "vllm-nvfp4"


def install_hint(extra: str) -> str:
    """``pip install`` of the packages that the extra ``extra`` of this project stands for.

    They are named themselves: ``vllm-nvfp4[extra]`` would be looked for in an index, where a clone
    is not. Where the metadata is not installed the clone's own extra is named.
    """
    try:
        required = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        required = []
    wanted = [
        requirement.strip()
        for requirement, _, marker in (line.partition(";") for line in required)
        if marker.replace("'", '"').replace(" ", "") == f'extra=="{extra}"'
    ]
    if not wanted:
        return f"pip install '.[{extra}]' in the folder of {_DISTRIBUTION}"
    return "pip install " + " ".join(f"'{name}'" for name in wanted)
