# SPDX-License-Identifier: Apache-2.0
"""What the project stands on: licences that are compatible, and a wheel that anyone can rebuild."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


licences, supply = load_script("licences"), load_script("supply")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("MIT License", licences.PERMISSIVE),
        ("Apache-2.0 AND MIT", licences.PERMISSIVE),
        ("3-Clause BSD License", licences.PERMISSIVE),
        ("MPL-2.0 AND MIT", licences.WEAK),
        ("LGPL-2.1-only", licences.WEAK),
        ("GNU Lesser General Public License v3 (LGPLv3)", licences.WEAK),
        ("LicenseRef-NVIDIA-Proprietary", licences.PROPRIETARY),
        ("GPL-3.0-or-later", ""),
        ("GNU General Public License v2 (GPLv2)", ""),
        ("GNU Affero General Public License v3", ""),
        ("AGPL-3.0", ""),
        ("MIT AND GPL-2.0-only", ""),
        ("Ask the author", ""),
        ("", ""),
    ],
)
def test_kinds_of_licences(text, kind):
    assert licences.kind_of(text) == kind


def test_no_installed_package_has_a_licence_that_will_not_do():
    found = {name: licences.licence_of(name) for name in licences.locked_packages()}
    installed = {name: licence for name, licence in found.items() if licence}
    assert {"numpy", "torch", "safetensors"} <= installed.keys()
    assert {name: x.text for name, x in installed.items() if not x.kind} == {}


def test_the_list_of_licences_holds_what_the_package_needs_itself():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = set(re.findall(r"^\| ([\w.-]+) \|", licences.TARGET.read_text(), re.MULTILINE))
    for requirement in project["dependencies"]:
        assert re.match(r"[\w-]+", requirement)[0] in listed


def test_a_licence_that_will_not_do_fails_the_run(monkeypatch, capsys):
    monkeypatch.setattr(licences, "locked_packages", lambda: {"numpy": {"cpu"}})
    monkeypatch.setattr(licences, "kind_of", lambda text: "")
    monkeypatch.setattr(sys, "argv", ["licences.py", "--check"])
    assert licences.main() == 1
    assert "numpy: found the licence" in capsys.readouterr().out


def test_two_builds_in_other_folders_times_and_umasks_give_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(supply, "DIST", tmp_path)
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    text = supply.build_twice()
    (wheel,) = tmp_path.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert digest in text
    assert (tmp_path / "SHA256SUMS").read_text() == f"{digest}  {wheel.name}\n"
    entries = zipfile.ZipFile(wheel).infolist()
    assert {entry.external_attr >> 16 & 0o777 for entry in entries} <= {0o644, 0o664}
    assert {entry.date_time for entry in entries} == {(2020, 1, 1, 0, 0, 0)}


def test_builds_that_differ_are_noticed(tmp_path, monkeypatch):
    def build(umask, scratch):
        scratch.mkdir(parents=True)
        (scratch / "a.whl").write_text(str(umask))
        return scratch / "a.whl"

    monkeypatch.setattr(supply, "DIST", tmp_path)
    monkeypatch.setattr(supply, "build_wheel", build)
    with pytest.raises(RuntimeError, match="two builds of the same sources"):
        supply.build_twice()


@pytest.mark.parametrize(
    ("dependencies", "words"),
    [
        ([{"name": "a", "skip_reason": "x"}], "NOT RUN the package index's advisory service"),
        (
            [{"name": "a", "version": "1", "vulns": [{"id": "CVE-1"}]}],
            "FAILED  1 packages looked up; known vulnerabilities: a 1: CVE-1",
        ),
        (
            [{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "x"}],
            "known vulnerabilities: 0; not known to the advisory service: 1 (b)",
        ),
        ([{"name": "a", "version": "1", "vulns": []}], "ok      no known vulnerability in 1"),
    ],
)
def test_what_an_audit_says(dependencies, words, monkeypatch, capsys):
    def answer(*command):
        Path(command[command.index("-o") + 1]).write_text(
            json.dumps({"dependencies": dependencies})
        )

    monkeypatch.setattr(supply, "tool", Path)
    monkeypatch.setattr(supply, "run", answer)
    monkeypatch.setattr(supply, "STEPS", {"advisories": supply.audit})
    assert supply.main() == (0 if words.startswith("ok") else 1)
    assert words in capsys.readouterr().out
