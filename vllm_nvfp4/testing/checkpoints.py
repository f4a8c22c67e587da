# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for tests: the stored fixtures, damage done to them, and dequantised twins."""

from __future__ import annotations

import functools
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_nvfp4.checkpoints.census import KV_SCALES
from vllm_nvfp4.checkpoints.detect import detect, read_config
from vllm_nvfp4.checkpoints.mxfp4 import SPEC as GPT_OSS
from vllm_nvfp4.checkpoints.spec import LayerSpec, Role
from vllm_nvfp4.checkpoints.stacks import StoredAs
from vllm_nvfp4.checkpoints.validate import take_census

if TYPE_CHECKING:
    import torch

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures"
ARCHIVE = FIXTURES / "checkpoints.tar.xz"
# Written when one is asked for: (format, size of a Hadamard block).
_FP_QUANT = {"fp_quant/nvfp4-llama": ("nvfp4", 16), "fp_quant/mxfp4-llama": ("mxfp4", 64)}


@functools.cache
def _stored_files() -> dict[str, bytes]:
    """ "tool/name/file" -> contents. One archive, since the same weights lie in most of them."""
    with tarfile.open(ARCHIVE) as tar:
        return {member.name: _read(tar, member) for member in tar.getmembers()}


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    if stream is None:
        raise ValueError(f"{ARCHIVE}: {member.name} is not a file; write it with make_fixtures.py")
    return stream.read()


def fixture_names(*, experts: bool = False) -> list[str]:
    """Every dense checkpoint, or every mixture of experts, as "tool/name", e.g.
    "modelopt/nvfp4-kv8-llama"."""
    names = {name.rpartition("/")[0] for name in _stored_files()} | _FP_QUANT.keys()
    return sorted(name for name in names if name.startswith("moe_") == experts)


def extract_fixture(name: str, target: Path) -> Path:
    """Write the checkpoint "tool/name" below ``target``; returns its folder."""
    folder = target / name.rpartition("/")[2]
    if name in _FP_QUANT:
        from vllm_nvfp4.testing.fp_quant import write_fp_quant

        write_fp_quant(folder, *_FP_QUANT[name])
        return folder
    files = {n: data for n, data in _stored_files().items() if n.rpartition("/")[0] == name}
    if not files:
        every = [*fixture_names(), *fixture_names(experts=True)]
        raise ValueError(f"no fixture {name!r}; there are {', '.join(every)}")
    folder.mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        (folder / path.rpartition("/")[2]).write_bytes(data)
    return folder


def make_legacy(folder: Path) -> Path:
    """Leave a ModelOpt checkpoint's configuration in hf_quant_config.json alone, as before 0.31."""
    edit_json(folder / "config.json", lambda config: config.pop("quantization_config"))
    return folder


def forget_kv_cache(folder: Path) -> Path:
    """Have a checkpoint's config.json ask for no KV cache; returns its folder."""

    def edit(config: dict[str, Any]) -> None:
        quant_config = config["quantization_config"]
        for key in ("kv_cache_scheme", "kv_cache_quant_config"):
            quant_config.pop(key, None)
        for entry in quant_config.get("layer_quant_config", {}).values():
            entry["output_tensors"] = None

    edit_json(folder / "config.json", edit)
    return folder


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Apply ``edit`` to the JSON object in a file, in place."""
    value = json.loads(path.read_text(encoding="utf-8"))
    edit(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Apply ``edit`` to the tensors of model.safetensors, in place."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    path.unlink()
    save_file({k: v.contiguous() for k, v in tensors.items()}, str(path), metadata={"format": "pt"})
    return folder


def to_gpt_oss_mxfp4(folder: Path) -> Path:
    """Write the stacked experts of a BF16 model of family "gpt_oss" as MXFP4, in place."""
    import torch

    from vllm_nvfp4.numerics.quantize import quantize_mxfp4

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
            # [E, K, N] in BF16
            experts = [quantize_mxfp4(e.t().float()) for e in tensors.pop(name)]
            blocks = torch.stack([e.codes.unflatten(1, (-1, 16)) for e in experts])
            scales = torch.stack([e.block_scale.view(torch.uint8) for e in experts])
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}

    method = {"quant_method": "mxfp4"}
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=method))
    return edit_tensors(folder, edit)


def split_into_shards(folder: Path, num_shards: int = 2) -> Path:
    """Cut model.safetensors into shards with an index file."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    weight_map: dict[str, str] = {}
    for i in range(num_shards):
        file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        names = sorted(tensors)[i::num_shards]
        save_file({n: tensors[n].clone() for n in names}, str(folder / file))
        weight_map |= dict.fromkeys(names, file)
    path.unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def give_shards_their_own_scale(folder: Path) -> Path:
    """Multiply k_proj's and up_proj's weights by 2 and 4 through their global scale alone, so that
    the shards of the fused layers differ in it."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            factor = 2.0 if ".k_proj." in name else 4.0 if ".up_proj." in name else 1.0
            if name.endswith("weight_scale_2"):
                tensors[name] = tensors[name] * factor
            elif name.endswith("weight_global_scale"):
                tensors[name] = tensors[name] / factor

    return edit_tensors(folder, edit)


def dequantized_state_dict(folder: Path) -> dict[str, torch.Tensor]:
    """The checkpoint as a plain model: every quantised layer's weight in float32, [N, K].

    What the activations would go through is folded in: an AWQ scale s gives W diag(s), and
    FP-Quant's rotation H gives W H^T, since (x H) W^T = x (W H^T)^T. Activations are not rounded.
    KV cache scales are left out; all other tensors are as stored.
    """
    from safetensors import safe_open

    from vllm_nvfp4.checkpoints.convert import dequantize_layer

    _, quant_config = read_config(folder)
    census = take_census(folder, detect(quant_config))
    headers = {
        f"{name}.{leaf}": header
        for name, module in census.modules.items()
        for leaf, header in module.tensors.items()
    }
    state: dict[str, torch.Tensor] = {}
    files = {h.file: safe_open(folder / h.file, "pt") for h in headers.values()}
    stream = ((n, file.get_tensor(n)) for file in files.values() for n in file.keys())  # noqa: SIM118
    read = dict(census.as_read(stream))
    for module, stored in census.modules.items():
        spec = stored.spec
        tensors = {}
        for leaf in stored.tensors:
            if leaf in KV_SCALES:
                continue
            name = f"{module}.{leaf}" if module else leaf
            source = census.stored_as.get(name, StoredAs(name))
            tensor = read[source.name]
            if source.is_transposed and spec.is_quantized:
                tensor = tensor.mT
            tensors[leaf] = tensor
        unused = spec.names(Role.UNUSED)
        if census.is_stack(stored):
            if "bias" in tensors:
                state[f"{module}_bias"] = tensors.pop("bias")
            is_plain = not spec.is_quantized
            stack = tensors["weight"] if is_plain else _dequantized_stack(spec, tensors)
            parent, _, leaf = module.rpartition(".")
            if f"{parent}.gate_proj" in census.modules:  # of a model that takes them one by one
                state |= {f"{parent}.{e}.{leaf}.weight": one for e, one in enumerate(stack)}
            else:
                state[module] = stack
            tensors = {}
        elif spec.is_quantized and spec.algo != GPT_OSS.algo:
            state[f"{module}.weight"] = dequantize_layer(spec, tensors, module)
            tensors = {"bias": tensors["bias"]} if "bias" in tensors else {}
        for leaf, tensor in tensors.items():
            if leaf not in unused:
                state[f"{module}.{leaf}" if module else leaf] = tensor
    return state


def _dequantized_stack(spec: LayerSpec, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """[E, N, K] of experts that are stacked in three dimensions."""
    import torch

    from vllm_nvfp4.checkpoints.convert import dequantize_layer

    num_experts = max(len(t) for t in tensors.values() if t.dim() == 3)
    experts = []
    for e in range(num_experts):
        one = {n: t[e] if t.numel() > 1 else t for n, t in tensors.items()}
        experts.append(dequantize_layer(spec, one))
    return torch.stack(experts)


def write_dequantized(folder: Path, target: Path) -> Path:
    """Write the plain twin of a checkpoint, float32, loadable by transformers; returns target."""
    import shutil

    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        is_weights = path.suffix == ".safetensors" or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and path.name != "hf_quant_config.json":
            shutil.copy(path, target / path.name)
    edit_json(target / "config.json", _forget_quantization)
    state = {name: t.float().contiguous() for name, t in dequantized_state_dict(folder).items()}
    save_file(state, str(target / "model.safetensors"), metadata={"format": "pt"})
    return target


def _forget_quantization(config: dict[str, Any]) -> None:
    for key in ("quantization_config", "quantization"):
        config.pop(key, None)
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = "float32"


def write_adapter(folder: Path, target: Path, rank: int = 4) -> Path:
    """A LoRA adapter of a checkpoint, with random weights, on one row-parallel and two fused
    layers; returns its new folder below ``target``."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    config = json.loads((folder / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    width = config["num_attention_heads"] * config["head_dim"]
    shapes = {
        "self_attn.q_proj": (width, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (rows, cols) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, cols, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.05
    adapter = target / "adapter"
    adapter.mkdir(parents=True)
    save_file(tensors, str(adapter / "adapter_model.safetensors"))
    names = [module.rpartition(".")[2] for module in shapes]
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names})
    )
    return adapter
