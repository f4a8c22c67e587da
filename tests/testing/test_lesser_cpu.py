# SPDX-License-Identifier: Apache-2.0
"""A lesser CPU for the tests: what asks is told so in every process, a whole engine's too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lesser_cpu
import pytest
from serving_cases import NO_FP8

from vllm_nvfp4.testing.checkpoints import extract_fixture

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
ORDER = list(lesser_cpu.MACHINES)
OWN = lesser_cpu.machine_level()
LESSER = [x for x in lesser_cpu.LEVELS if OWN and ORDER.index(x) >= ORDER.index(OWN)]

PROBE = """
import json, os, re, sys
import torch
from vllm_nvfp4.kernels.cpu.jit import host_cpu

def probe(worker=None):
    import os, re, torch
    from vllm_nvfp4.kernels.cpu.jit import host_cpu
    cpu = host_cpu()
    found = {"pid": os.getpid(), "avx512": torch.cpu._is_avx512_supported(),
             "bf16": torch.cpu._is_avx512_bf16_supported(),
             "amx": torch.cpu._is_amx_tile_supported(),
             "own_avx512": cpu.has_avx512, "own_bf16": cpu.has_bf16_dot}
    maps = open("/proc/self/maps").read()
    found["extensions"] = sorted(set(re.findall(r"/vllm/(_C\\w*)\\.abi3\\.so", maps)))
    return found
"""
ENGINE = """
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    llm = LLM(sys.argv[1], quantization="nvfp4", enforce_eager=True, max_model_len=64,
              dtype="bfloat16", skip_tokenizer_init=True, kv_cache_memory_bytes=2**24)
    parameters = SamplingParams(max_tokens=3, detokenize=False, ignore_eos=True)
    [output] = llm.generate([{"prompt_token_ids": [3, 17, 200]}], parameters, use_tqdm=False)
    result = {"pid": os.getpid(), "workers": llm.collective_rpc(probe),
              "num_tokens": len(output.outputs[0].token_ids)}
    print("RESULT" + json.dumps(result))
"""


def run(level, *command):
    environment = os.environ | {
        lesser_cpu.VARIABLE: level,
        "PYTHONPATH": os.pathsep.join([str(Path(lesser_cpu.__file__).parent), str(ROOT)]),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # the probe is sent to the worker as code
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    command = [sys.executable, *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def result_of(done):
    lines = [x.partition("RESULT")[2] for x in done.stdout.splitlines() if "RESULT" in x]
    assert lines, done.stdout + done.stderr
    return json.loads(lines[-1])


@pytest.mark.parametrize("level", LESSER)
def test_whoever_asks_is_told_of_the_level_and_no_more(level):
    code = PROBE + 'print("RESULT" + json.dumps(probe() | {"env": dict(os.environ)}))'
    found = result_of(run(level, "-c", code))
    has_avx512, has_bf16 = level != "avx2", level == "avx512_bf16"
    assert (found["avx512"], found["own_avx512"]) == (has_avx512, has_avx512)
    assert (found["bf16"], found["own_bf16"]) == (has_bf16, has_bf16)
    assert found["amx"] is False
    assert found["env"]["ONEDNN_MAX_CPU_ISA"].startswith("AVX512" if has_avx512 else "AVX2")


@pytest.mark.vllm
def test_every_process_of_an_engine_has_the_lesser_cpu(tmp_path):
    """And a checkpoint that asks for an FP8 KV cache is served there, with one line about it."""
    script = tmp_path / "engine.py"
    script.write_text(PROBE + ENGINE)
    folder = extract_fixture("modelopt/nvfp4-kv8-llama", tmp_path)
    done = run("avx2", str(script), str(folder))
    result = result_of(done)
    assert result["num_tokens"] == 3
    [worker] = result["workers"]
    assert worker["pid"] != result["pid"]
    assert worker["extensions"] == ["_C_AVX2"]
    assert not any(worker[name] for name in ("avx512", "bf16", "amx", "own_avx512", "own_bf16"))
    lines = [x for x in (done.stdout + done.stderr).splitlines() if "nvfp4: KV cache" in x]
    assert len(lines) == 1, lines
    assert lines[0].endswith(f"KV cache in bfloat16, not in FP8 as the checkpoint asks: {NO_FP8}")


def test_a_level_that_is_unknown_or_comes_too_late_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.setenv(lesser_cpu.VARIABLE, "sse9")
    with pytest.raises(ValueError, match="sse9: unknown; levels are avx2, avx512, avx512_bf16"):
        lesser_cpu.install()
    monkeypatch.setenv(lesser_cpu.VARIABLE, "avx2")
    monkeypatch.setitem(sys.modules, "torch", sys)
    with pytest.raises(RuntimeError, match="avx2 comes too late: torch is loaded"):
        lesser_cpu.install()


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        ("fpu avx2 avx512f avx512_bf16 amx_tile", "amx"),
        ("fpu avx2 avx512f avx512_bf16", "avx512_bf16"),
        ("fpu avx2 avx512f", "avx512"),
        ("fpu avx2", "avx2"),
        ("fpu sse2", None),
    ],
)
def test_the_machines_own_level(flags, level, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert lesser_cpu.machine_level(cpuinfo) == level
