#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The supply chain in one run: licences, the wheel built twice, its list of components, advisories.

Every step runs; the end is 1 if one failed. Into dist/ come the wheel, SHA256SUMS and, for each
lock, a CycloneDX list of components (vllm_nvfp4-<lock>.cdx.json). The audit needs PyPI's own
advisory service: a package that it does not know counts as a failure, and where it answers for
none the step says NOT RUN.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
TOOLS = ROOT / ".cache" / "supply"
LOCKS = sorted(path.stem[len("lock-") :] for path in (ROOT / "requirements").glob("lock-*.txt"))
# What a wheel is built from.
SOURCES = ("vllm_nvfp4", "csrc", "pyproject.toml", "setup.py", "LICENSE", "README.md")


def run(*command: str | Path, **options: object) -> str:
    """What a command printed. Raises RuntimeError, with the end of it, if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: {done.stdout.strip()[-600:]}")
    return done.stdout


def tool(name: str) -> Path:
    """A tool of requirements/supply.txt, installed if it is not there in this version."""
    pins = (ROOT / "requirements" / "supply.txt").read_text()
    stamp = TOOLS / "pins.txt"
    if not stamp.is_file() or stamp.read_text() != pins:
        shutil.rmtree(TOOLS, ignore_errors=True)
        venv.create(TOOLS, with_pip=True)
        requirements = ROOT / "requirements" / "supply.txt"
        run(TOOLS / "bin" / "python", "-m", "pip", "install", "--quiet", "-r", requirements)
        stamp.write_text(pins)
    return TOOLS / "bin" / name


def check_licences() -> str:
    return run(sys.executable, ROOT / "scripts" / "licences.py", "--check").strip()


def build_wheel(umask: int, scratch: Path) -> Path:
    """A wheel from a copy of the sources in a folder of its own, under another umask."""
    source = scratch / "source"
    old = os.umask(umask)
    try:
        source.mkdir(parents=True)
        for name in SOURCES:
            path = ROOT / name
            if path.is_dir():
                skipped = shutil.ignore_patterns("__pycache__", "cubins")
                # Not copy2: times and modes are to be those of now.
                shutil.copytree(path, source / name, ignore=skipped, copy_function=shutil.copyfile)
            else:
                shutil.copyfile(path, source / name)
        offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
        run(sys.executable, "-m", "pip", "wheel", *offline, "-w", scratch / "out", source)
    finally:
        os.umask(old)
    (wheel,) = (scratch / "out").glob("*.whl")
    return wheel


def build_twice() -> str:
    """The wheel in dist/; RuntimeError where a second build differs."""
    with tempfile.TemporaryDirectory() as scratch:
        wheels = [
            build_wheel(0o022, Path(scratch) / "a"),
            build_wheel(0o077, Path(scratch) / "b/c"),
        ]
        first, second = (hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels)
        if first != second:
            raise RuntimeError(f"two builds of the same sources: sha256 {first} and {second}")
        DIST.mkdir(exist_ok=True)
        shutil.copyfile(wheels[0], DIST / wheels[0].name)
        (DIST / "SHA256SUMS").write_text(f"{first}  {wheels[0].name}\n")
    return f"{wheels[0].name} sha256 {first}, the same from two builds"


def list_components() -> str:
    """dist/vllm_nvfp4-<lock>.cdx.json."""
    DIST.mkdir(exist_ok=True)
    counts = []
    for lock in LOCKS:
        source = ROOT / "requirements" / f"lock-{lock}.txt"
        target = DIST / f"vllm_nvfp4-{lock}.cdx.json"
        options = ("--pyproject", ROOT / "pyproject.toml", "--mc-type", "library")
        run(tool("cyclonedx-py"), "requirements", *options, "--output-reproducible",
            "--sv", "1.6", "--of", "JSON", "-o", target, source)  # fmt: skip
        count = len(json.loads(target.read_text())["components"])
        counts.append(f"{target.name} {count} components")
    return ", ".join(counts)


class NotRunError(RuntimeError):
    """A step had nothing to work with; the run ends with 1, as after a failure."""


def audit() -> str:
    """Raises RuntimeError for a known vulnerability and for a package that was not looked up,
    NotRunError where not one was: the service is out of reach."""
    looked_up: dict[str, list[dict[str, Any]]] = {}
    skipped: set[str] = set()
    for lock in LOCKS:
        # The advisories are those of the release: "+cpu" is a build of it.
        text = (ROOT / "requirements" / f"lock-{lock}.txt").read_text()
        with tempfile.TemporaryDirectory() as scratch:
            source, target = Path(scratch) / "lock.txt", Path(scratch) / "audit.json"
            source.write_text(re.sub(r"\+[a-z0-9.]+$", "", text, flags=re.MULTILINE))
            command = (tool("pip-audit"), "-r", source, "--no-deps", "--disable-pip", "-f", "json",
                       "-o", target, "--progress-spinner", "off")  # fmt: skip
            try:
                run(*command)
            except RuntimeError:
                if not target.is_file():  # it also ends so where it found something
                    raise
            for package in json.loads(target.read_text())["dependencies"]:
                if "skip_reason" in package:
                    skipped.add(package["name"])
                else:
                    looked_up[f"{package['name']} {package['version']}"] = package["vulns"]
    if not looked_up:
        raise NotRunError(
            f"the package index's advisory service answered for none of {len(skipped)} packages: "
            "nothing is known of their vulnerabilities. Run this where the service can be reached."
        )
    found = [f"{name}: {vuln['id']}" for name, vulns in looked_up.items() for vuln in vulns]
    if found or skipped:
        names = ", ".join(sorted(skipped)[:5]) + (", ..." if len(skipped) > 5 else "")
        raise RuntimeError(
            f"{len(looked_up)} packages looked up; known vulnerabilities: {', '.join(found) or 0}; "
            f"not known to the advisory service: {len(skipped)} ({names})"
        )
    return f"no known vulnerability in {len(looked_up)} packages of all locks"


STEPS: dict[str, Callable[[], str]] = {
    "licences": check_licences,
    "wheel": build_twice,
    "components": list_components,
    "advisories": audit,
}


def main() -> int:
    failed = False
    for name, step in STEPS.items():
        try:
            print(f"{name:11} ok      {step()}", flush=True)
        except RuntimeError as error:
            failed = True
            state = "NOT RUN" if isinstance(error, NotRunError) else "FAILED"
            print(f"{name:11} {state:7} {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
