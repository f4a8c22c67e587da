# SPDX-License-Identifier: Apache-2.0
"""A run of `quantize` that is killed, wherever it was, goes on to the bytes of a whole one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from vllm_nvfp4.checkpoints.quantizer import DataFree
from vllm_nvfp4.checkpoints.work import work_folder
from vllm_nvfp4.checkpoints.write import WriteOptions, write_resumable
from vllm_nvfp4.testing.tiny_models import write_model

# What is there when the kill comes, by the moment.
MOMENTS = {
    "inside_a_file": "model-00003-of-00003.part",
    "between_two_files": "model-00002-of-00003.safetensors",
    "before_the_index": "model-00003-of-00003.safetensors",
    "before_the_config": "model.safetensors.index.json",
    "before_it_appears": "config.json",
}
# A process for each moment, forked before torch has threads; the kill leaves no time for clean-up.
SCRIPT = """
import dataclasses, os, signal, sys
from pathlib import Path
from vllm_nvfp4.checkpoints import write

def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)

class Quantizer(write.DataFree):
    def finish(self, unit, weights):
        if moment == "between_two_files" and unit.prefix == "model.layers.0.":
            kill()

def progress(layer):
    if moment == "inside_a_file" and layer == "model.layers.1.mlp.gate_proj":
        kill()

source, target = map(Path, sys.argv[1:3])
for moment in sys.argv[3:]:
    child = os.fork()
    if child:
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, moment
        continue
    if moment == "before_the_index":
        write._Job._write_index = kill
    if moment == "before_the_config":
        write._Job.complete = kill
    finish = kill if moment == "before_it_appears" else None
    options = write.WriteOptions(progress=progress, finish=finish)
    write.write_resumable(source, target / moment, Quantizer("mse"), options)
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_kill_at_any_moment_costs_nothing_but_time(tmp_path):
    source = write_model(tmp_path / "source", "llama")
    whole = tmp_path / "whole"
    write_resumable(source, whole, DataFree("mse"), WriteOptions())
    command = [sys.executable, "-c", SCRIPT, str(source), str(tmp_path), *MOMENTS]
    subprocess.run(command, check=True)
    for moment, last in MOMENTS.items():
        target = tmp_path / moment
        assert not target.exists(), moment
        left = work_folder(target) / "checkpoint"
        assert (left / last).is_file(), moment
        # Nothing loads a folder without config.json; one that has it has every file.
        if (left / "config.json").exists():
            index = json.loads((left / "model.safetensors.index.json").read_text())
            assert all((left / name).is_file() for name in index["weight_map"].values())
            assert moment == "before_it_appears"
        write_resumable(source, target, DataFree("mse"), WriteOptions())
        assert files_of(target) == files_of(whole), moment
        assert not work_folder(target).exists(), moment
