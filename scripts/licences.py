#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write requirements/LICENCES.md: the licence of every locked package, and whether it will do.

The wheel of this project contains none of them. What it needs is that they may be used beside a
program under Apache-2.0, without terms that would spread to it: the strong copyleft of the GPL and
the AGPL is refused, and so is a licence that this file does not know.

No environment holds the packages of all locks: what is not installed here keeps its line, so that
the file is complete once this has run in an environment of each.

--check: write nothing; end with 1 if a licence is not compatible
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {path.stem[len("lock-") :]: path for path in (ROOT / "requirements").glob("lock-*.txt")}
TARGET = ROOT / "requirements" / "LICENCES.md"

PERMISSIVE, WEAK, PROPRIETARY = "permissive", "weak copyleft", "proprietary"
# In this order: "LGPL" and "Proprietary" decide, whatever else an expression names.
_KINDS = (
    (PROPRIETARY, r"proprietary|nvidia"),
    (WEAK, r"MPL|Mozilla|LGPL|Lesser General"),
    (
        PERMISSIVE,
        r"MIT|BSD|Apache|ISC\b|Python Software|PSF|CNRI|Unlicense|0BSD|CC0|BSL-1\.0|Zlib|"
        r"NCSA|HPND",
    ),
)
_REFUSED = re.compile(r"(?<!L)(?<!Lesser )\bA?GPL|(?<!Lesser )General Public", re.IGNORECASE)
# Metadata that says nothing, or less than the licence file beside it.
_READ_IN_THE_FILE = {
    "cuda-toolkit": "NVIDIA's name for its libraries, without files of its own",
    "oss-harmony": "Apache-2.0",
    "prometheus-fastapi-instrumentator": "ISC",
    "quack-kernels": "Apache-2.0",
    "setuptools": "MIT",
    "torchcodec": "BSD-3-Clause",
}


class Licence(NamedTuple):
    """A package's licence as its metadata words it, and its kind: "" for one that won't do."""

    text: str
    kind: str


def locked_packages() -> dict[str, set[str]]:
    """name -> the locks that hold it."""
    packages: dict[str, set[str]] = {}
    for lock, path in LOCKS.items():
        for name in re.findall(r"^([\w.-]+)==", path.read_text(), re.MULTILINE):
            packages.setdefault(name, set()).add(lock)
    return dict(sorted(packages.items()))


def licence_of(name: str) -> Licence | None:
    """The licence of an installed package; None for one that is not installed."""
    try:
        metadata: Any = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if name in _READ_IN_THE_FILE:
        text = _READ_IN_THE_FILE[name]
    elif not (text := metadata.get("License-Expression") or ""):
        classifiers = metadata.get_all("Classifier") or []
        found = [c.rpartition(" :: ")[2] for c in classifiers if c.startswith("License ::")]
        first_line = next(iter((metadata.get("License") or "").strip().splitlines()), "")
        text = ", ".join(c for c in found if c != "OSI Approved") or first_line[:80]
    return Licence(text, kind_of(text))


def kind_of(text: str) -> str:
    """The kind of a licence, or "" for one that is not compatible or not known."""
    if _REFUSED.search(text):
        return ""
    matching = (kind for kind, words in _KINDS if re.search(words, text, re.IGNORECASE))
    return next(matching, "")


def recorded(name: str, text: str) -> Licence | None:
    """A package's licence as the file's text has it."""
    found = re.search(rf"^\| {re.escape(name)} \| (.*) \| (.*) \| .* \|$", text, re.MULTILINE)
    return Licence(found[1], found[2]) if found else None


def report(licences: dict[str, Licence | None], locks: dict[str, set[str]]) -> str:
    """The file's text."""
    lines = [
        "<!-- SPDX-License-Identifier: Apache-2.0. Written by scripts/licences.py -->",
        "# Licences of the locked packages",
        "",
        "vllm-nvfp4 is under Apache-2.0. Its wheel holds none of these packages; they are",
        "installed beside it. Weak copyleft covers a package's own files. The proprietary ones are",
        "NVIDIA's and Intel's runtime libraries, free to use, which vLLM and the tests ask for.",
        "",
        "| package | licence | kind | locks |",
        "| --- | --- | --- | --- |",
    ]
    every = set().union(*locks.values())
    for name, licence in licences.items():
        if licence is not None:
            text = licence.text.replace("|", "/")
            held = "all" if locks[name] == every else ", ".join(sorted(locks[name]))
            lines.append(f"| {name} | {text} | {licence.kind} | {held} |")
    absent = [name for name, licence in licences.items() if licence is None]
    if absent:
        lines += ["", "Not installed where this was written: " + ", ".join(absent) + "."]
    return "\n".join(lines) + "\n"


def main() -> int:
    locks = locked_packages()
    licences = {name: licence_of(name) for name in locks}
    installed = {name: licence for name, licence in licences.items() if licence is not None}
    bad = {name: licence.text for name, licence in installed.items() if not licence.kind}
    for name, text in bad.items():
        print(f"{name}: found the licence {text or 'nothing'!r}; needed a known, compatible one")
    if "--check" not in sys.argv[1:]:
        text = TARGET.read_text()
        TARGET.write_text(
            report({name: x or recorded(name, text) for name, x in licences.items()}, locks)
        )
    print(f"licences: {len(installed)} of {len(licences)} packages looked at, {len(bad)} bad")
    return 1 if bad or not installed else 0


if __name__ == "__main__":
    sys.exit(main())
