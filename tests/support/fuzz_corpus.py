# SPDX-License-Identifier: Apache-2.0
"""The cases that were found once, kept as the entries in which each differs from its seed.

``python tests/support/fuzz_corpus.py "<seed>" <number> <mutation>...`` adds one; ``xzcat`` shows
them, a line for each.
"""

from __future__ import annotations

import base64
import json
import lzma
import sys
import tempfile
from pathlib import Path
from typing import Any

from fuzz_files import Files, Node, join_header, make_seeds, split_raw
from fuzz_mutations import apply

CORPUS = Path(__file__).parents[1] / "corpus" / "loader.json.xz"


def read_corpus() -> list[dict[str, Any]]:
    return json.loads(lzma.decompress(CORPUS.read_bytes()))


def entries_of(case: dict[str, Any], seed: Files) -> Files:
    """The entries of a kept case. Weights are the seed's; only headers are kept."""
    entries = {}
    for name, kept in case["entries"].items():
        data = base64.b64decode(kept["data"])
        if "body_of" in kept:
            data = join_header(data, split_raw(seed[kept["body_of"]].data)[1])
        entries[name] = Node(data, kept["kind"], kept["size"])
    return entries


def keep(seed_name: str, seed: Files, mutations: list[str], number: int) -> dict[str, Any]:
    """The case as it is kept. Raises ValueError where it is not small."""
    entries: dict[str, Any] = {}
    for name, node in apply(seed, mutations, number).items():
        if seed.get(name) == node:
            continue
        kept: dict[str, Any] = {"kind": node.kind, "size": node.size}
        data = node.data
        if name.endswith(".safetensors") and name in seed and node.kind == "file":
            header, body = split_raw(data)
            if body == split_raw(seed[name].data)[1]:
                data, kept["body_of"] = header, name
        kept["data"] = base64.b64encode(data).decode()
        entries[name] = kept
    if len(lzma.compress(json.dumps(entries).encode())) > 10_000:
        raise ValueError(f"{seed_name} {mutations} {number}: too large to be kept")
    return {"seed": seed_name, "from": [*mutations, number], "entries": entries}


def main(seed_name: str, number: str, *mutations: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        seed = make_seeds(Path(scratch))[seed_name]
    case = keep(seed_name, seed, list(mutations), int(number))
    lines = (json.dumps(c, separators=(",", ":")) for c in [*read_corpus(), case])
    CORPUS.write_bytes(lzma.compress(("[\n" + ",\n".join(lines) + "\n]\n").encode(), preset=9))


if __name__ == "__main__":
    main(*sys.argv[1:])
