# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that people publish, in miniature: a few layers of each kind as their headers, the
quantisation config that comes with them, and how each layer of vLLM's model must come out.

The configurations have the lists, globs, regular expressions and gaps that the public ones have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_nvfp4.checkpoints.headers import TensorHeader

N, K = 256, 128
_BF16 = ("BF16", (N, K))
_NVFP4 = {"weight_scale": ("F8_E4M3", (N, K // 16))}
# How a layer [N, K] of each form is stored: leaf -> (dtype, shape).
STORED: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "bf16": {"weight": _BF16},
    "nvfp4": {
        "weight": ("U8", (N, K // 2)),
        **_NVFP4,
        "weight_scale_2": ("F32", ()),
        "input_scale": ("F32", ()),
    },
    "w4a16": {"weight": ("U8", (N, K // 2)), **_NVFP4, "weight_scale_2": ("F32", ())},
    "ct": {
        "weight_packed": ("U8", (N, K // 2)),
        **_NVFP4,
        "weight_global_scale": ("F32", (1,)),
        "input_global_scale": ("F32", (1,)),
    },
    "fp8": {
        "weight": ("F8_E4M3", (N, K)),
        "weight_scale": ("F32", ()),
        "input_scale": ("F32", ()),
    },
    "fp8row": {"weight": ("F8_E4M3", (N, K)), "weight_scale": ("BF16", (N, 1))},
    "fp8block": {"weight": ("F8_E4M3", (N, K)), "weight_scale": ("F32", (N // 128, K // 128))},
    "mxfp8": {"weight": ("F8_E4M3", (N, K)), "weight_scale": ("U8", (N, K // 32))},
}
EXPERTS = 4
_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_NVFP4_GROUP = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
_QWEN_VL_MOE = "vllm.model_executor.models.qwen3_5:Qwen3_5MoeForConditionalGeneration"
_QWEN_VL = "vllm.model_executor.models.qwen3_5:Qwen3_5ForConditionalGeneration"
_NEMOTRON_H = "vllm.model_executor.models.nemotron_h:NemotronHForCausalLM"

Layers = Mapping[str, str]


@dataclass(frozen=True)
class Published:
    """One checkpoint.

    stored:  the file's name of each layer -> its form
    config:  quantization_config
    model:   "module:class" of vLLM's model, None where only the file's names are asked
    asked:   vLLM's name of each layer -> the form that it must come out in; experts by the name
             of the layer that holds them
    """

    name: str
    stored: Layers
    config: dict[str, Any]
    model: str | None = None
    asked: Layers = field(default_factory=dict)

    def headers(self) -> dict[str, TensorHeader]:
        return headers_of(self.stored)


def headers_of(stored: Layers) -> dict[str, TensorHeader]:
    """The headers of layers of these forms."""
    return {
        f"{name}.{leaf}": TensorHeader("model.safetensors", dtype, shape, 0, 0)
        for name, form in stored.items()
        for leaf, (dtype, shape) in STORED[form].items()
    }


def modelopt(ignore: list[str], algo: str = "NVFP4", **entries: Any) -> dict[str, Any]:
    config = {"quant_method": "modelopt", "quant_algo": algo, "ignore": ignore, **entries}
    if algo == "NVFP4":
        group = {"input_activations": _NVFP4_GROUP, "weights": _NVFP4_GROUP, "targets": ["Linear"]}
        config["config_groups"] = {"group_0": group}
    return config


def legacy(ignore: list[str]) -> dict[str, Any]:
    body = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}
    producer = {"name": "modelopt", "version": "0.37.0"}
    return {"producer": producer, "quantization": {**body, "exclude_modules": ignore}}


def compressed(groups: dict[str, Any], ignore: list[str], **entries: Any) -> dict[str, Any]:
    config = {"quant_method": "compressed-tensors", "ignore": ignore, **entries}
    layout = "nvfp4-pack-quantized" if len(groups) == 1 else "mixed-precision"
    return {"format": layout, "config_groups": groups, **config}


def nvfp4_group(targets: list[str]) -> dict[str, Any]:
    weights = {**_NVFP4_GROUP, "strategy": "tensor_group", "symmetric": True}
    inputs = {**weights, "dynamic": "local"}
    layout = "nvfp4-pack-quantized"
    return {"format": layout, "targets": targets, "weights": weights, "input_activations": inputs}


def fp8_group(targets: list[str], by_block: bool = False) -> dict[str, Any]:
    base = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = {**base, "strategy": "block" if by_block else "channel", "dynamic": False}
    if by_block:
        weights["block_structure"] = [128, 128]
    inputs = {**base, "strategy": "group" if by_block else "token", "dynamic": True}
    layout = "float-quantized"
    return {"format": layout, "targets": targets, "weights": weights, "input_activations": inputs}


def table(stored: Layers, by_parent: bool = False) -> dict[str, Any]:
    """ModelOpt's table of a mixed checkpoint; experts one by one, or by their parent's name."""
    algos: dict[str, dict[str, Any]] = {
        "w4a16": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "nvfp4": {"quant_algo": "NVFP4", "group_size": 16},
        "fp8": {"quant_algo": "FP8"},
        "mxfp8": {"quant_algo": "MXFP8", "group_size": 32},
        "fp8block": {"quant_algo": "FP8_PB_WO", "group_size": 128},
    }
    listed = {name: algos[form] for name, form in stored.items() if form in algos}
    if by_parent:
        listed = {re.sub(r"\.experts\.\d+\..*", ".experts", n): a for n, a in listed.items()}
    return listed


def experts(prefix: str, form: str, leaves: tuple[str, ...] = _MLP) -> dict[str, str]:
    return {f"{prefix}.{e}.{leaf}": form for e in range(EXPERTS) for leaf in leaves}


def qwen(
    attention: str,
    mlp: str,
    gdn: str,
    shared: str = "",
    head: str = "bf16",
    mtp_experts: str = "bf16",
    has_fc: bool = True,
) -> tuple[dict[str, str], dict[str, str]]:
    """(stored, asked) of Qwen3.5 with one gated-delta-net layer and one of attention; with experts
    where ``shared``, the form of the shared one, is given. Routers and MTP are in 16 bits."""
    ours, theirs = "model.language_model.layers", "language_model.model.layers"
    stored = {f"{ours}.0.linear_attn.{n}": gdn for n in ("in_proj_qkv", "in_proj_z", "out_proj")}
    stored |= {f"{ours}.0.linear_attn.in_proj_{n}": "bf16" for n in "ab"}
    stored |= {f"{ours}.3.self_attn.{n}": attention for n in _QKVO}
    asked = {f"{theirs}.0.linear_attn.{n}": gdn for n in ("in_proj_qkvz", "out_proj")}
    asked |= {f"{theirs}.0.linear_attn.in_proj_ba": "bf16"}
    asked |= {f"{theirs}.3.self_attn.{n}": attention for n in ("qkv_proj", "o_proj")}
    for i in (0, 3):
        if not shared:
            stored |= {f"{ours}.{i}.mlp.{n}": mlp for n in _MLP}
            asked |= {f"{theirs}.{i}.mlp.{n}": mlp for n in ("gate_up_proj", "down_proj")}
            continue
        stored |= experts(f"{ours}.{i}.mlp.experts", mlp)
        stored |= {f"{ours}.{i}.mlp.shared_expert.{n}": shared for n in _MLP}
        stored |= {f"{ours}.{i}.mlp.{n}": "bf16" for n in ("gate", "shared_expert_gate")}
        asked |= {f"{theirs}.{i}.mlp.experts": mlp, f"{theirs}.{i}.mlp.gate": "bf16"}
        asked |= {f"{theirs}.{i}.mlp.shared_expert_gate": "bf16"}
        for n in ("gate_up_proj", "down_proj"):
            asked[f"{theirs}.{i}.mlp.shared_expert.{n}"] = shared
    stored |= {"lm_head": head, "model.visual.blocks.0.attn.qkv": "bf16"}
    asked |= {"language_model.lm_head": head, "visual.blocks.0.attn.qkv": "bf16"}
    stored |= {f"mtp.layers.0.self_attn.{n}": "bf16" for n in _QKVO}
    asked |= {"mtp.layers.0.self_attn.qkv_proj": "bf16"}
    if has_fc:
        stored["mtp.fc"] = asked["mtp.fc"] = "bf16"
    if shared:
        stored |= experts("mtp.layers.0.mlp.experts", mtp_experts)
        asked["mtp.layers.0.mlp.experts"] = mtp_experts
    return stored, asked


def nemotron(mixer: str, head: str) -> tuple[dict[str, str], dict[str, str]]:
    """(stored, asked) of a hybrid: two Mamba layers, of which one is left alone, and experts."""
    up_down = ("up_proj", "down_proj")
    stored = {f"backbone.layers.0.mixer.{n}": mixer for n in ("in_proj", "out_proj")}
    stored |= {f"backbone.layers.4.mixer.{n}": "bf16" for n in ("in_proj", "out_proj")}
    stored |= {f"backbone.layers.5.mixer.{n}": "bf16" for n in _QKVO}
    stored |= {f"backbone.layers.1.mixer.shared_experts.{n}": "nvfp4" for n in up_down}
    stored |= {"backbone.layers.1.mixer.gate": "bf16", "lm_head": head}
    asked = {n.replace("backbone", "model", 1): f for n, f in stored.items()}
    asked = {n: f for n, f in asked.items() if not n.endswith(("q_proj", "k_proj", "v_proj"))}
    asked["model.layers.5.mixer.qkv_proj"] = "bf16"
    asked["model.layers.1.mixer.experts"] = "nvfp4"
    stored |= experts("backbone.layers.1.mixer.experts", "nvfp4", up_down)
    stored |= {"mtp.layers.0.mixer.q_proj": "bf16", "mtp.layers.0.eh_proj": "bf16"}
    asked["mtp.layers.0.eh_proj"] = "bf16"
    return stored, asked


def _qwens() -> list[Published]:
    cases = []
    stored, asked = qwen("fp8", "nvfp4", "fp8", "nvfp4", head="w4a16")
    cases.append(
        Published(
            "nvidia/Qwen3.6-35B-A3B-NVFP4",  # experts by their parent's name, and mtp in no list
            stored,
            modelopt(["mtp.layers.0*"], "MIXED_PRECISION", quantized_layers=table(stored, True)),
            _QWEN_VL_MOE,
            asked,
        )
    )
    stored, asked = qwen("fp8", "nvfp4", "fp8")
    for name in ("nvidia/Qwen3.6-27B-NVFP4", "RadixArk/Qwen3.8-27B-NVFP4"):
        config = modelopt(["lm_head", "mtp*"], "MIXED_PRECISION", quantized_layers=table(stored))
        cases.append(Published(name, stored, config, _QWEN_VL, asked))
    layers = "model.language_model.layers.*"
    stored, asked = qwen("bf16", "nvfp4", "bf16", "bf16")
    globs = ["lm_head", "model.visual*", f"{layers}.linear_attn*", f"{layers}.mlp.shared_expert*"]
    globs += [f"{layers}.mlp.gate", f"{layers}.self_attn*", "mtp.layers.0*"]
    name = "nvidia/Qwen3.5-397B-A17B-NVFP4"
    cases.append(Published(name, stored, modelopt(globs), _QWEN_VL_MOE, asked))
    patterns = ["lm_head", "re:.*visual.*", r"re:.*linear_attn\..*", "re:.*shared_expert.*"]
    patterns += [r"re:.*mlp\.gate$", r"re:.*self_attn\..*", "mtp*"]
    name = "the same with regular expressions"
    cases.append(Published(name, stored, modelopt(patterns), _QWEN_VL_MOE, asked))
    stored, asked = qwen("bf16", "nvfp4", "bf16", "bf16", mtp_experts="fp8block")
    config = modelopt(["lm_head"], "MIXED_PRECISION", quantized_layers=table(stored, True))
    name = "nvidia/Qwen3.8-Flash-Next-NVFP4"
    cases.append(Published(name, stored, config, _QWEN_VL_MOE, asked))
    return cases


def _others() -> list[Published]:
    cases = []
    layer = "language_model.model.layers.3"
    stored = {f"{layer}.self_attn.{n}": "mxfp8" for n in _QKVO} | {"lm_head": "bf16"}
    stored |= experts(f"{layer}.block_sparse_moe.experts", "nvfp4", ("w1", "w2", "w3"))
    config = modelopt(["lm_head"], "MIXED_PRECISION", quantized_layers=table(stored))
    cases.append(Published("nvidia/MiniMax-M3-NVFP4", stored, config))
    stored = experts("model.language_model.layers.3.mlp.experts", "nvfp4")
    stored |= experts("model.language_model.layers.45.mlp.experts", "mxfp8") | {"lm_head": "bf16"}
    config = modelopt(["lm_head"], "MIXED_PRECISION", quantized_layers=table(stored, True))
    cases.append(Published("GLM-5.3-Flash-NVFP4", stored, config))

    left = [f"backbone.layers.4.mixer.{n}_proj" for n in ("in", "out")]
    left += [f"backbone.layers.5.mixer.{n}" for n in _QKVO]
    left += [f"backbone.layers.{i}.mixer.conv1d" for i in (0, 4)]
    stored, asked = nemotron("nvfp4", "bf16")
    name = "nvidia/Nemotron-3-Nano-30B-A3B-NVFP4"
    cases.append(Published(name, stored, legacy(["lm_head", *left]), _NEMOTRON_H, asked))
    stored, asked = nemotron("fp8", "w4a16")
    left += ["backbone.embeddings", "backbone.layers.1.mixer.gate", "mtp*"]
    config = modelopt(left, "MIXED_PRECISION", quantized_layers=table(stored))
    name = "nvidia/Nemotron-3.5-Lightning-30B-A3B-NVFP4"
    cases.append(Published(name, stored, config, _NEMOTRON_H, asked))

    layers = "model.language_model.layers"
    stored = {f"{layers}.0.self_attn.{n}": "bf16" for n in _QKVO}
    stored |= {f"{layers}.0.mlp.{n}": "nvfp4" for n in _MLP}
    rest = [
        "lm_head",
        "model.embed_vision.embedding_projection",
        f"{layers}.0.per_layer_input_gate",
    ]
    rest += ["model.vision_tower.encoder.layers.0.mlp.fc1"]
    stored |= dict.fromkeys(rest, "bf16")
    globs = ["lm_head", "model.embed_vision*", f"{layers}.*.self_attn*", "model.vision_tower*"]
    cases.append(
        Published(
            "nvidia/Gemma-4-31B-IT-NVFP4",
            stored,
            legacy([*globs, f"{layers}.*.per_layer*"]),
            "vllm.model_executor.models.gemma4_mm:Gemma4ForConditionalGeneration",
            {
                "language_model.model.layers.0.self_attn.qkv_proj": "bf16",
                "language_model.model.layers.0.self_attn.o_proj": "bf16",
                "language_model.model.layers.0.mlp.gate_up_proj": "nvfp4",
                "language_model.model.layers.0.mlp.down_proj": "nvfp4",
                "language_model.lm_head": "bf16",
                "embed_vision.embedding_projection": "bf16",
            },
        )
    )
    layer = "model.layers.0"
    stored = {f"{layer}.self_attn.{n}": "bf16" for n in _QKVO} | {"lm_head": "bf16"}
    stored |= experts(f"{layer}.block_sparse_moe.experts", "nvfp4", ("w1", "w2", "w3"))
    config = modelopt(["lm_head", "model.layers.*.self_attn*"])
    config |= {"weights": _NVFP4_GROUP, "input_activations": _NVFP4_GROUP}
    del config["config_groups"]
    asked = {f"{layer}.self_attn.qkv_proj": "bf16", f"{layer}.self_attn.o_proj": "bf16"}
    asked |= {"lm_head": "bf16", f"{layer}.block_sparse_moe.experts": "nvfp4"}
    model = "vllm.model_executor.models.minimax_m2:MiniMaxM2ForCausalLM"
    cases.append(Published("MiniMax-M2-NVFP4", stored, config, model, asked))
    stored = {f"{layer}.self_attn.q_proj": "fp8", f"{layer}.mlp.gate_proj": "bf16"}
    stored |= {f"{layer}.mlp.down_proj": "nvfp4"}
    listed = table(stored) | {f"{layer}.mlp.gate_proj": {"quant_algo": "UNQUANTIZED"}}
    config = modelopt([], "MIXED_PRECISION", quantized_layers=listed)
    cases.append(Published("mixed, with an entry UNQUANTIZED", stored, config))
    return cases


def _compressed_qwens() -> list[Published]:
    attention = r"re:.*self_attn\.(q|k|v|o)_proj$"
    gdn = r"re:.*linear_attn\.(in_proj_qkv|in_proj_z|out_proj)$"
    mlp = r"re:.*mlp\.(gate|up|down)_proj$"
    cases = []
    stored, asked = qwen("fp8row", "ct", "fp8row", head="fp8row")
    rows = fp8_group([attention, gdn, "re:.*lm_head", r"re:.*layers\.(62|63)\.mlp\..*_proj$"])
    ignore = [f"model.language_model.layers.0.linear_attn.in_proj_{n}" for n in "ab"]
    ignore += ["model.visual.blocks.0.attn.qkv", "re:^mtp.*"]
    config = compressed({"group_0": rows, "group_1": nvfp4_group([mlp])}, ignore)
    cases.append(Published("unsloth/Qwen3.8-27B-NVFP4", stored, config, _QWEN_VL, asked))

    stored, asked = qwen("ct", "ct", "bf16", "ct", has_fc=False)
    ignore = [n for n, form in stored.items() if form == "bf16" and not n.startswith("mtp")]
    config = compressed({"group_0": nvfp4_group(["Linear"])}, ignore)
    cases.append(Published("RedHatAI/Qwen3.6-35B-A3B-NVFP4", stored, config, _QWEN_VL_MOE, asked))

    stored, asked = qwen("fp8block", "ct", "fp8block", "fp8block")
    shared = r"re:.*shared_expert\.(gate|up|down)_proj$"
    blocks = fp8_group([attention, gdn, shared], by_block=True)
    experts_ = nvfp4_group([r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"])
    ignore = ["lm_head", "re:^mtp.*", "re:.*mlp.gate$", "re:.*shared_expert_gate$"]
    config = compressed({"group_0": blocks, "group_1": experts_}, ignore)
    name = "community Qwen3.6-35B-A3B, FP8 by squares beside NVFP4"
    cases.append(Published(name, stored, config, _QWEN_VL_MOE, asked))
    return cases


PUBLISHED = [*_qwens(), *_others(), *_compressed_qwens()]
