# SPDX-License-Identifier: Apache-2.0
"""Which KV cache an engine is configured with, and what is said of it, on devices of each kind."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
from serving_cases import NO_FP8, warnings_of

from vllm_nvfp4.compat import versions
from vllm_nvfp4.testing.architectures import ARCHITECTURES, write_architecture
from vllm_nvfp4.testing.checkpoints import extract_fixture

pytestmark = pytest.mark.vllm

ERROR = "error"
# (option kv_cache, --kv-cache-dtype) -> the type with a device that can hold FP8, and of those that
# cannot on a CPU and on a GPU, where vLLM may find a backend for what was asked for by name.
ASKED = {
    ("auto", "auto"): ("fp8", "auto", "auto"),
    ("keep", "auto"): ("fp8", "auto", "auto"),
    ("fp8", "auto"): ("fp8", ERROR, "fp8"),
    ("keep", "fp8"): ("fp8", ERROR, "fp8"),
    ("auto", "fp8_e4m3"): ("fp8", ERROR, "fp8"),
    ("auto", "fp8_e5m2"): ("fp8_e5m2", ERROR, "fp8_e5m2"),
    ("fp8", "bfloat16"): ("bfloat16", "bfloat16", "bfloat16"),
}
DEVICES = {
    "CPU with AVX-512": (0, None, ""),
    "CPU with AVX2": (1, None, NO_FP8),
    "8.9": (0, (8, 9), ""),
    "8.6": (2, (8, 6), "compute capability 8.6 is below 8.9"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "is_declared"),
    [
        ("modelopt/nvfp4-kv8-llama", True),
        ("compressed_tensors/nvfp4-kv8-llama", True),
        ("modelopt/w4a16-llama", False),
    ],
)
def test_the_type_is_one_that_the_device_can_hold(device, name, is_declared, tmp_path, monkeypatch):
    column, capability, obstacle = DEVICES[device]
    folder = extract_fixture(name, tmp_path)
    monkeypatch.setattr(versions, "device_capability", lambda: capability)
    for question in ("_is_avx512_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, question, lambda: obstacle != NO_FP8)
    for (option, flag), outcomes in ASKED.items():
        expected = outcomes[column]
        is_kept = (option, flag) == ("keep", "auto") and not is_declared
        with warnings_of("layers.kv_cache") as lines:
            if expected == ERROR:
                given = f"--kv-cache-dtype {flag}" if flag != "auto" else "option kv_cache=fp8"
                with pytest.raises(ValueError) as error:
                    configured(folder, option, flag)
                assert str(error.value).startswith(f"{given}: {obstacle}. Leave it out")
                assert lines == []
                continue
            assert configured(folder, option, flag) == ("auto" if is_kept else expected)
        gives_way = flag == "auto" and expected == "auto" and not is_kept
        asked = " as the checkpoint asks" if is_declared else ""
        line = f"nvfp4: KV cache in bfloat16, not in FP8{asked}: {obstacle}"
        assert lines == ([line] if gives_way else [])


def engine_config(folder, option, flag, dtype="auto"):
    import vllm_nvfp4

    vllm_nvfp4.register()
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(folder), max_model_len=64, enforce_eager=True, quantization="nvfp4", dtype=dtype,
        kv_cache_dtype=flag, additional_config={"nvfp4": {"kv_cache": option}},
        skip_tokenizer_init=True,
    ).create_engine_config()  # fmt: skip


def configured(folder, option, flag, dtype="auto"):
    """The type that an engine is configured with, "fp8" also under its longer name; the attention
    layers, left to themselves, would have the same."""
    from vllm.config import set_current_vllm_config

    config = engine_config(folder, option, flag, dtype)
    dtype = config.cache_config.cache_dtype
    with set_current_vllm_config(config):
        scheme = config.quant_config.kv_cache_scheme
    assert flag != "auto" or (scheme is None) == (dtype == "auto")
    return dtype.removesuffix("_e4m3")


def test_a_type_that_no_cpu_can_hold_gives_way_too(tmp_path):
    from vllm_nvfp4.testing.checkpoints import edit_json

    folder = extract_fixture("modelopt/nvfp4-kv8-llama", tmp_path)

    def declare(config):
        config["quantization_config"].pop("kv_cache_scheme", None)
        config["quantization_config"]["kv_cache_quant_algo"] = "NVFP4"

    edit_json(folder / "config.json", declare)
    with warnings_of("layers.kv_cache") as lines:
        assert configured(folder, "keep", "auto") == "auto"
    why = "vLLM's CPU backend has no KV cache of type nvfp4"
    assert lines == [f"nvfp4: KV cache in bfloat16, not in NVFP4 as the checkpoint asks: {why}"]


@pytest.mark.parametrize("flag", ["bfloat16", "float16"])
def test_a_cpu_has_no_cache_in_16_bits_beside_a_model_in_32(flag, tmp_path):
    folder = extract_fixture("modelopt/nvfp4-kv8-llama", tmp_path)
    with pytest.raises(ValueError, match=f"^--kv-cache-dtype {flag}: no cache in 16 bits .*auto"):
        configured(folder, "auto", flag, "float32")
    assert configured(folder, "keep", "bfloat16", "bfloat16") == "bfloat16"


# A worker: gets the engine's configuration from another process, and builds the model.
WORKER = """
import json, pickle, sys, torch
from vllm_nvfp4.compat.meta_model import build_model, frame_of

configs = pickle.load(sys.stdin.buffer)
torch.cpu._is_avx512_supported = lambda: True
found = []
for config in configs:
    with frame_of(config):
        model = build_model(config)
    layers = config.compilation_config.static_forward_context.values()
    kept = {
        f"{x.kv_cache_dtype} by {type(getattr(x, 'quant_method', None)).__name__}"
        for x in layers if hasattr(x, "kv_cache_dtype")
    }
    methods = {n: getattr(m, "quant_method", None) for n, m in model.named_modules()}
    parts = {n.split(".")[0] for n, m in methods.items() if "Online" in type(m).__name__}
    found.append([sorted(kept), sorted(parts)])
print(json.dumps(found))
"""


def test_a_worker_builds_as_the_process_that_made_its_config(tmp_path, monkeypatch):
    """LFM2's class gives its attention no quantization config; GLM-4V's marks its tower, which is
    not quantised while it loads."""
    for question in ("_is_avx512_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, question, lambda: True)
    names = ("lfm2", "glm4v")
    folders = [write_architecture(tmp_path / n, ARCHITECTURES[n]) for n in names]
    configs = [engine_config(folder, "auto", "auto") for folder in folders]
    done = subprocess.run(
        [sys.executable, "-c", WORKER],
        input=pickle.dumps(configs), stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == [
        [["fp8 by NvFp4KVCacheMethod"], ["model"]],
        [["fp8 by NvFp4KVCacheMethod"], ["language_model"]],
    ]
