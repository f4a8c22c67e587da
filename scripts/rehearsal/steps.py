# SPDX-License-Identifier: Apache-2.0
"""The steps of the walk. Each returns what it found in a few words, and raises where it ends."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from docs_architectures import is_refused, read_rows

from rehearsal import stage
from rehearsal.weights import compare_with_file
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.testing.architectures import ARCHITECTURES, write_architecture
from vllm_nvfp4.testing.checkpoints import (
    extract_fixture,
    fixture_names,
    make_legacy,
    to_gpt_oss_mxfp4,
    write_adapter,
)
from vllm_nvfp4.testing.tiny_models import build_tokenizer, write_model

SHORT = ("modelopt/nvfp4-kv8-llama", "moe_modelopt/nvfp4-qwen3")
GRAPHS = ("modelopt/nvfp4-qwen3", "modelopt/mixed-llama", "moe_modelopt/nvfp4-qwen3")
_ONLINE = ("llama", "gemma3", "qwen3_moe", "qwen2.5-vl")
_DTYPES = ("auto", "fp8", "nvfp4")
_NOT_QUANTISED = "not quantised"
# Type of the KV cache -> bits, as plan counts them.
CACHES = {"bfloat16": 16, "fp8": 8, "nvfp4": 4}


def need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def import_vllm() -> str:
    """vLLM takes the machine for one with CUDA, by NVML alone."""
    import vllm
    from vllm.platforms import current_platform

    need(current_platform.is_cuda(), f"the platform is {type(current_platform).__name__}")
    name, capability = current_platform.get_device_name(), current_platform.get_device_capability()
    return f"vLLM {vllm.__version__}, torch {torch.__version__}: {name}, {capability}"


def register() -> str:
    """By the entry point that pip installed."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    need("nvfp4" in QUANTIZATION_METHODS, "the entry point has not registered nvfp4")
    return f"vllm-nvfp4 {importlib.metadata.version('vllm-nvfp4')} by its entry point"


def names_of_vllm() -> str:
    """Everything that the package takes from vLLM, imported."""
    import check_vllm

    missing = []
    for name in check_vllm.imports():
        module, _, attribute = name.rpartition(".")
        if not hasattr(importlib.import_module(module), attribute):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                missing.append(name)
    calls = check_vllm.CALLS
    missing += [" or ".join(places) for places in calls if not any(map(_is_there, places))]
    need(not missing, f"not there: {', '.join(missing)}")
    return f"{len(check_vllm.imports())} imports, {len(check_vllm.CALLS)} attributes"


def _is_there(name: str) -> bool:
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            fields = getattr(found, "__dataclass_fields__", {})
            if attribute in fields and not hasattr(found, attribute):
                return True
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def command_line() -> str:
    """`vllm serve MODEL --quantization nvfp4` as vLLM's parser takes it."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser, server = FlexibleArgumentParser(), ServeSubcommand()
    server.subparser_init(parser.add_subparsers(dest="subparser"))
    line = ["serve", "MODEL", "--quantization", "nvfp4_ada", "--kv-cache-dtype", "nvfp4"]
    args = parser.parse_args(line)
    server.validate(args)
    need(args.quantization == "nvfp4_ada", f"--quantization is {args.quantization}")
    return " ".join(["vllm", *line])


def attention() -> str:
    """The backend that vLLM selects for each type of the KV cache, at the usual head sizes."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    found = []
    with set_current_vllm_config(VllmConfig()):
        for dtype in _DTYPES:
            for size in (64, 128):
                try:
                    backend = get_attn_backend(size, torch.bfloat16, dtype)
                    found.append(f"{dtype}/{size} {backend.get_name()}")
                except ValueError:
                    found.append(f"{dtype}/{size} refused")
    need("auto/128 refused" not in found, f"no attention at all: {found}")
    return ", ".join(found)


def checkpoints() -> list[str]:
    """Every stored checkpoint, the older form of one, gpt-oss, and 16-bit models to quantise."""
    online = [f"16-bit/{family}" for family in _ONLINE]
    stored = [*fixture_names(), *fixture_names(experts=True)]
    return [*stored, "legacy/mixed-llama", "mxfp4/gpt_oss", *online]


def checkpoint(name: str, folder: Path) -> Path:
    """The checkpoint of that name below ``folder``."""
    tool, _, rest = name.partition("/")
    target = folder / name.replace("/", "-")
    if target.exists():
        return target
    if tool == "16-bit" and rest in ARCHITECTURES:
        build_tokenizer().save_pretrained(write_architecture(target, ARCHITECTURES[rest]))
        return target
    if tool == "16-bit":
        return write_model(target, rest)
    if tool == "quantised":
        source = str(checkpoint(f"16-bit/{rest}", folder))
        command = ["quantize", source, "-o", str(target), "--method", "rtn", "--no-check"]
        need(main(command) == 0, _NOT_QUANTISED)
        return target
    if tool == "mxfp4":
        return to_gpt_oss_mxfp4(write_model(target, rest))
    if tool == "legacy":
        return make_legacy(extract_fixture(f"modelopt/{rest}", target))
    return extract_fixture(name, target)


def load(name: str, folder: Path) -> str:
    """Configure, build, load, pack for the CUDA kernels; what is packed is what was stored."""
    path = checkpoint(name, folder)
    config = stage.engine_config(path, **_options(name))
    model = stage.load(config)
    compared = compare_with_file(model, path)
    usual = type(stage.engine_config(path).quant_config).__name__
    native = "" if usual == "NvFp4Config" else f"; vLLM's {usual} by default"
    return f"{compared}; {_attention_layers(model, config)}{native}"


def architectures(folder: Path) -> str:
    """Every architecture of `make models`, as it is and as `quantize` writes it: for a GPU vLLM has
    classes of its own, and its CPU backend refuses some."""
    kinds, failed = ("16-bit", "quantised"), []
    names = [f"{kind}/{name}" for name in ARCHITECTURES for kind in kinds]
    # All are written before one is loaded: vLLM changes transformers' classes and configurations.
    for name in names:
        try:
            checkpoint(name, folder)
        except ValueError as error:
            failed.append(f"{name} ({error})")
    for name in (name for name in names if (folder / name.replace("/", "-")).exists()):
        try:
            with stage.one_process():
                load(name, folder)
        except Exception as error:
            traceback.print_exc()
            failed.append(f"{name} ({type(error).__name__})")
    is_known = failed == [f"quantised/gpt2 ({_NOT_QUANTISED})"]  # vLLM transposes its weights
    need(is_known, f"of {len(names)} not loaded: {', '.join(failed)}")
    refused = [r["architecture"] for r in read_rows() if is_refused(r)]
    return f"{len(names) - 1} loaded, in 16 bits and quantised, {', '.join(refused)} too"


def _options(name: str) -> dict[str, Any]:
    """A quantised lm_head as well where a 16-bit model has one of its own; this plugin's kernels
    on a card that has vLLM's."""
    options: dict[str, Any] = {"native_blackwell": False}
    if name == "16-bit/llama":
        options["lm_head"] = "fp8"
    return {"additional_config": {"nvfp4": options}}


def _attention_layers(model: Any, config: Any) -> str:
    """Type, backend and bytes of the KV cache."""
    from vllm_nvfp4.compat import versions

    kinds = set()
    for module in model.modules():
        if isinstance(module, versions.attention_classes()):
            layer: Any = module
            if (spec := layer.get_kv_cache_spec(config)) is None:
                continue  # an encoder's keeps nothing
            if hasattr(layer.attn_backend, "customize_spec"):  # as of vLLM 0.32
                spec = layer.attn_backend.customize_spec(spec)
            size = spec.page_size_bytes // spec.block_size
            impl = type(layer.impl).__name__.removesuffix("Impl")
            kinds.add(f"KV {layer.kv_cache_dtype} in {impl}, {size} bytes a token")
    return ", ".join(sorted(kinds))


def kv_cache(dtype: str, folder: Path) -> str:
    """A model with heads of 128 elements: vLLM sets aside the bytes that plan says."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from vllm_nvfp4.compat import versions
    from vllm_nvfp4.planning.find import find_shape
    from vllm_nvfp4.planning.kv import token_bytes

    if dtype == "nvfp4" and versions.vllm_version() < versions.Version("0.32"):
        return "not in this release"
    path = folder / "heads-of-128"
    if not path.exists():
        sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 128, "head_dim": 128}
        heads: dict[str, Any] = {
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
        }
        shape = LlamaConfig(vocab_size=288, max_position_embeddings=256, **sizes, **heads)
        made = AutoModelForCausalLM.from_config(shape).to(torch.bfloat16)
        made.config.architectures = ["LlamaForCausalLM"]
        made.save_pretrained(path)
        build_tokenizer().save_pretrained(path)
    config = stage.engine_config(path, kv_cache_dtype=dtype)
    found = _attention_layers(stage.load(config), config)
    planned = token_bytes(find_shape(str(path)), CACHES[dtype])
    need(f", {planned} bytes a token" in found, f"{found}; plan says {planned}")
    return found


def lora(folder: Path) -> str:
    """vLLM's adapters on the plugin's layers."""
    from vllm.config import set_current_vllm_config
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    path = checkpoint("modelopt/w4a16-llama", folder)
    adapter = write_adapter(path, folder)
    config = stage.engine_config(path, enable_lora=True, max_lora_rank=8)
    model = stage.load(config)
    with set_current_vllm_config(config):
        manager = LRUCacheWorkerLoRAManager(
            config, torch.device("cpu"), getattr(model, "embedding_modules", {})
        )
        manager.create_lora_manager(model, config)
        need(manager.add_adapter(LoRARequest("adapter", 1, str(adapter))), "not taken")
    wrapped = [type(m).__name__ for m in model.modules() if type(m).__name__.endswith("WithLoRA")]
    return f"{len(wrapped)} layers wrapped, one adapter loaded"


def graph(name: str, folder: Path) -> str:
    """Compile the model for the card at hand, with 8-bit activations, which layers as small as
    these would not get by themselves."""
    options = {"nvfp4": {"activation": "8"}}
    config = stage.engine_config(checkpoint(name, folder), additional_config=options)
    model = stage.load(config)
    torch._dynamo.reset()
    with stage.compiled_for_the_card() as written:
        try:
            stage.run_without_memory(model, config, tokens=300)
        except torch.AcceleratorError as error:
            # Where the first of the compiled graphs begins to run, all of them are compiled.
            *_, last = traceback.extract_tb(error.__traceback__)
            if "empty_strided_cuda" not in (last.line or ""):
                raise
    kernels = sum(code.count("async_compile.triton(") for code in written)
    rounded = sum("_a8" in code or "_scaled_mm" in code for code in written)
    need(rounded > 0, "no graph takes 8-bit activations")
    return (
        f"{len(written)} graphs, {rounded} of them with 8-bit activations, {kernels} Triton "
        "kernels in machine code, up to the first allocation"
    )


def kernels() -> str:
    """Machine code for the card, from csrc/ by the NVRTC that pip installed."""
    from vllm_nvfp4.compat import versions
    from vllm_nvfp4.kernels.cuda import cubins, devices

    arch = versions.device_arch()
    need(arch is not None, "no card")
    wanted = devices.wanted_kernels(int(arch or 0), "nvfp4", (torch.bfloat16,))
    images = cubins.prepare(wanted, int(arch or 0))
    return f"{len(images)} for sm_{arch}"


def worker(folder: Path) -> str:
    """The worker of a GPU up to its first call that needs one, which it makes for real: in a
    process that does not preload the runtime's stand-in."""
    path = checkpoint("modelopt/w4a16-llama", folder)
    code = (
        "from pathlib import Path\n"
        "from rehearsal import stage\n"
        "from vllm.v1.worker.gpu_worker import Worker\n"
        f"config = stage.engine_config(Path({str(path)!r}))\n"
        "Worker(config, 0, 0, 'tcp://127.0.0.1:0', is_driver_worker=True).init_device()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        last = [line for line in lines if "Error" in line][-1:] or lines[-1:]
        raise RuntimeError(" ".join(last))
    return "init_device"
