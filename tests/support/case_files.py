# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as tools wrote them and people reported them, in miniature: lists that miss layers or
name others, tensors left out, tensors left over, experts in layouts of their own.

Each case is a model of ``architectures`` whose layers are stored in the forms of ``stored_forms``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from case_layouts import add_kv_scales, as_modelopt_stacks, drop, spread, stack_rows, stray
from published import compressed, legacy, modelopt, nvfp4_group
from stored_forms import stored_as

from vllm_nvfp4.testing.architecture import VOCAB_SIZE
from vllm_nvfp4.testing.architectures import ARCHITECTURES, write_architecture
from vllm_nvfp4.testing.checkpoints import edit_json, edit_tensors
from vllm_nvfp4.testing.drafts import add_layer_past_the_end, add_mtp
from vllm_nvfp4.testing.media import MEDIA

Tensors = dict[str, torch.Tensor]
_KEPT = r"conv1d|embed|norm|router|lm_head|shared_expert_gate|(mlp|mixer|block_sparse_moe)\.gate$"
_TOWER = r"visual|vision|projector"


@dataclass(frozen=True)
class Case:
    """One checkpoint.

    model:     name of the architecture
    config:    quantization_config
    kept:      regular expression of the layers in 16 bits, beside the tables, routers and towers
    form:      of the other layers, or what gives it for a layer's name
    tower:     of the layers of a tower
    settings:  edits config.json before anything else
    prepare:   edits the model in 16 bits, for the case and for what it is compared with
    spread:    renames tensors of stacks to one of each expert, in 16 bits
    finish:    edits the tensors as stored; returns what stacks are worth that it stores itself
    quantised: of vLLM's layers: part -> how many are held in fewer than 16 bits
    error:     what the check says, a regular expression; empty where the model will load
    hf_quant:  hf_quant_config.json
    """

    model: str
    config: Mapping[str, Any]
    quantised: Mapping[str, int] = field(default_factory=dict)
    kept: str = "$^"
    form: str | Callable[[str], str] = "nvfp4"
    tower: str = "bf16"
    settings: Callable[[dict[str, Any]], Any] = field(default=lambda config: None)
    prepare: Callable[[Tensors], Any] = field(default=lambda tensors: None)
    spread: Callable[[Tensors], Any] = field(default=lambda tensors: None)
    finish: Callable[[Tensors], Any] = field(default=lambda tensors: None)
    error: str = ""
    hf_quant: Mapping[str, Any] | None = None

    def form_of(self, layer: str) -> str:
        if re.search(f"{_KEPT}|{self.kept}", layer):
            return "bf16"
        if re.search(_TOWER, layer):
            return self.tower
        return self.form(layer) if callable(self.form) else self.form


def write_case(case: Case, folder: Path) -> Path:
    """Write the checkpoint; returns its folder."""
    write_plain(case, folder)

    def edit(tensors: Tensors) -> None:
        case.spread(tensors)
        for name in [n for n in tensors if n.endswith(".weight") and tensors[n].dim() == 2]:
            layer = name.removesuffix(".weight")
            stored, _ = stored_as(case.form_of(layer), tensors.pop(name))
            tensors |= {f"{layer}.{leaf}": tensor for leaf, tensor in stored.items()}
        case.finish(tensors)

    edit_tensors(folder, edit)
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=case.config))
    if case.hf_quant is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(case.hf_quant))
    return folder


def write_plain(case: Case, folder: Path) -> Path:
    """The same model in 16 bits; returns its folder."""
    write_architecture(folder, ARCHITECTURES[case.model])
    if media := MEDIA.get(case.model):
        media.write_processor(folder, VOCAB_SIZE)
    edit_json(folder / "config.json", case.settings)
    return edit_tensors(folder, case.prepare)


def matrices_of(case: Case, plain: Path) -> Iterator[torch.Tensor]:
    """What each quantised weight of the case is worth, [N, K] float32."""
    from safetensors.torch import load_file

    tensors = load_file(plain / "model.safetensors")
    case.spread(tensors)
    for name, tensor in tensors.items():
        form = case.form_of(name.removesuffix(".weight"))
        if name.endswith(".weight") and tensor.dim() == 2 and form != "bf16":
            yield stored_as(form, tensor)[1]
    yield from case.finish(tensors) or ()  # stacks that it stores


def _has_mtp(config: dict[str, Any]) -> None:
    config.get("text_config", config)["mtp_num_hidden_layers"] = 1


def _k_eq_v(config: dict[str, Any]) -> None:
    config |= {"attention_k_eq_v": True, "num_global_key_value_heads": 2}


def _ct(ignore: list[str], bits: int = 4) -> dict[str, Any]:
    group = nvfp4_group(["Linear"])
    if bits == 16:
        group["input_activations"] = None
    return compressed({"group_0": group}, ignore)


def _without_groups(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "config_groups"}


def _mixed_table() -> dict[str, Any]:
    projections = ("gate_proj", "up_proj", "down_proj")
    table: dict[str, Any] = {
        f"model.layers.{i}.mlp.experts.{e}.{p}": {"quant_algo": "NVFP4", "group_size": 16}
        for i in range(2)
        for e in range(8)
        for p in projections
    }
    for i in range(2):
        for p in "qkvo":
            table[f"model.layers.{i}.self_attn.{p}_proj"] = {"quant_algo": "FP8"}
    return {
        "producer": {"name": "modelopt", "version": "0.44.0"},
        "quantization": {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": None,
            "quantized_layers": table,
            "exclude_modules": ["lm_head"],
        },
    }


def _fp8_attention(layer: str) -> str:
    return "fp8" if "self_attn" in layer else "nvfp4"


_GDN_SHARDS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
_ROUTERS = ["re:.*mlp.gate$", "re:.*shared_expert_gate$"]
_KV8 = {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}


def _gdn_names(prefix: str) -> list[str]:
    return [f"{prefix}{i}.linear_attn.{n}" for i in range(3) for n in _GDN_SHARDS]


def _with_mtp(model: str, prefix: str, quantised: Mapping[str, int]) -> Case:
    """MTP in 16 bits; the list names its layer and not mtp.fc."""
    lists = ["lm_head", "*linear_attn*", "*mlp.gate", "*shared_expert_gate", "model.visual*"]
    return Case(
        model,
        modelopt([*lists, "mtp.layers.0*"]),
        quantised,
        kept="linear_attn|^mtp",
        settings=_has_mtp,
        prepare=partial(add_mtp, layer=f"{prefix}3."),
    )


def _with_kv_scales(model: str, quantised: Mapping[str, int]) -> Case:
    """An FP8 KV cache, with the scales as k_proj.k_scale and v_proj.v_scale."""
    lists = ["lm_head", "*mlp.gate", "*block_sparse_moe.gate", "*linear_attn*", "*vision*"]
    config = modelopt([*lists, "*visual*", "*projector*"], **_KV8)
    return Case(model, config, quantised, kept="linear_attn", finish=add_kv_scales)


def _with_tower(model: str, form: str, num_linear: int) -> Case:
    return Case(model, modelopt(["*lm_head"]), {"linear": num_linear}, tower=form)


_K, _QWEN = "model.layers.", "model.language_model.layers."
_GLM_TOWER = ("attn*", "down_proj", "merger.proj")
_DENSE_2, _MOE_2 = {"linear": 8}, {"linear": 4, "experts": 2}
_QWEN35, _QWEN35_MOE = {"linear": 10}, {"linear": 10, "experts": 4}
CASES: dict[str, Case] = {
    "mtp.fc in no list, Qwen3-Next": _with_mtp("qwen3-next", _K, _QWEN35_MOE),
    "mtp.fc in no list, Qwen3.5": _with_mtp("qwen3.5", _QWEN, _QWEN35),
    "a list of shards, fused in the file": Case(
        "qwen3-next",
        _ct([*_gdn_names(_K), "lm_head", *_ROUTERS]),
        _QWEN35_MOE,
        kept="linear_attn",
        form="ct",
    ),
    "lm_head without the wrapper's prefix": Case(
        "qwen3.5",
        _ct([*_gdn_names(_QWEN), "lm_head", "re:model.visual.*"]),
        _QWEN35,
        kept="linear_attn",
        form="ct",
    ),
    "lm_head with and without the prefix": Case(
        "qwen3.5",
        _ct([*_gdn_names(_QWEN), "re:model.visual.*", "lm_head", "language_model.lm_head"]),
        _QWEN35,
        kept="linear_attn",
        form="ct",
    ),
    "a draft layer past the end, in no list": Case(
        "glm4-moe",
        modelopt(["lm_head", "*mlp.gate"]),
        {"linear": 8, "experts": 1},
        kept=r"layers\.2\.",
        settings=lambda c: c.update(num_nextn_predict_layers=1),
        prepare=partial(add_layer_past_the_end, last=1),
    ),
    "a draft layer past the end, listed": Case(
        "glm4-moe",
        modelopt(["lm_head", "*mlp.gate", "model.layers.2*"]),
        {"linear": 8, "experts": 1},
        kept=r"layers\.2\.",
        settings=lambda c: c.update(num_nextn_predict_layers=1),
        prepare=partial(add_layer_past_the_end, last=1),
    ),
    "GDN quantised whole": Case("qwen3.5", modelopt(["lm_head", "model.visual*"]), {"linear": 19}),
    "strays beside in_proj_a": Case(
        "qwen3.5",
        modelopt(["lm_head", "model.visual*", "*in_proj_a", "*in_proj_b"]),
        {"linear": 16},
        kept="in_proj_[ab]$",
        finish=partial(stray, r"in_proj_[ab]\.weight$"),
    ),
    "a stray beside lm_head": Case(
        "qwen3", modelopt(["lm_head*"]), _DENSE_2, finish=partial(stray, r"^lm_head\.weight$")
    ),
    "experts that calibration did not reach": Case(
        "qwen3-moe",
        modelopt(["lm_head", "*mlp.gate"]),
        _MOE_2,
        finish=partial(drop, r"experts\.[25]\..*input_scale$"),
    ),
    "a layer without its global scale": Case(
        "qwen3",
        modelopt(["lm_head"]),
        finish=partial(drop, r"layers\.1\.self_attn\.k_proj\.weight_scale_2"),
        error=r"layers\.1\.self_attn\.k_proj.*weight_scale_2",
    ),
    "an expert without its global scale": Case(
        "qwen3-moe",
        modelopt(["lm_head", "*mlp.gate"]),
        finish=partial(drop, r"layers\.1\.mlp\.experts\.3\.up_proj\.weight_scale_2"),
        error=r"layers\.1\.mlp\.experts.*weight_scale_2",
    ),
    "values that are keys": Case(
        "gemma4",
        modelopt(["lm_head", "*per_layer*"]),
        {"linear": 16},
        kept="per_layer",
        settings=_k_eq_v,
        prepare=partial(drop, r"layers\.[13]\.self_attn\.v_proj"),
    ),
    "values that are keys, attention in 16 bits": Case(
        "gemma4",
        modelopt(["lm_head", "*per_layer*", "model.layers.*.self_attn*"]),
        _DENSE_2,
        kept="per_layer|self_attn",
        settings=_k_eq_v,
        prepare=partial(drop, r"layers\.[13]\.self_attn\.v_proj"),
    ),
    "KV scales of Gemma-3": _with_kv_scales("gemma3-vision", _DENSE_2),
    "KV scales of GLM-4-MoE": _with_kv_scales("glm4-moe", {"linear": 8, "experts": 1}),
    "KV scales of MiniMax-M2": _with_kv_scales("minimax-m2", _MOE_2),
    "KV scales of Qwen3.5": _with_kv_scales("qwen3.5", _QWEN35),
    "excluded, and in FP8 by blocks": Case(
        "qwen3-moe",
        modelopt(["lm_head", "*mlp.gate", "*self_attn*"]),
        {"experts": 2},
        form=lambda layer: "fp8block" if "self_attn" in layer else "nvfp4",
    ),
    "experts by projection, then number": Case(
        "qwen3-vl-moe",
        modelopt(["lm_head", "*mlp.gate", "*visual*"]),
        _MOE_2,
        spread=partial(spread, "{projection}.{expert}"),
    ),
    "experts by number, the model wants stacks": Case(
        "qwen3-vl-moe",
        modelopt(["lm_head", "*mlp.gate", "*visual*"]),
        _MOE_2,
        spread=partial(spread, "{expert}.{projection}"),
    ),
    "no config_groups": Case(
        "qwen3.5-moe",
        _without_groups(_ct(["lm_head", "re:.*linear_attn.*", "re:.*visual.*", *_ROUTERS])),
        _QWEN35_MOE,
        kept="linear_attn",
        form="ct",
        spread=partial(spread, "{expert}.{projection}"),
    ),
    "the rows of all experts in one matrix": Case(
        "qwen3-moe",
        _ct(["lm_head", *_ROUTERS]),
        _MOE_2,
        form=lambda layer: "bf16" if ".experts." in layer else "ct",
        finish=stack_rows,
    ),
    "a shared expert in no list, ModelOpt": Case(
        "qwen2-moe", modelopt(["lm_head", "*mlp.gate"]), _MOE_2, kept="shared_expert"
    ),
    "a shared expert in no list, compressed-tensors": Case(
        "qwen2-moe", _ct(["lm_head", *_ROUTERS]), _MOE_2, kept="shared_expert", form="ct"
    ),
    "MLA quantised whole, W4A16": Case(
        "glm4-moe-lite",
        _ct(["lm_head", "re:.*mlp.gate$"], bits=16),
        {"linear": 12, "experts": 1},
        form="ct16",
    ),
    "MLA quantised whole": Case(
        "deepseek-v2", modelopt(["lm_head", "*mlp.gate"]), {"linear": 12, "experts": 1}
    ),
    "Llama-4's experts one by one": Case(
        "llama4",
        _ct(["language_model.lm_head", "re:.*router", "re:.*vision.*", "re:.*projector.*"]),
        {"linear": 8, "experts": 1},
        form="ct",
        spread=partial(spread, "{expert}.{projection}"),
    ),
    "Llama-4's experts in ModelOpt's stacks": Case(
        "llama4",
        modelopt(["*lm_head", "*router", "*vision*", "*projector*"]),
        {"linear": 8, "experts": 1},
        finish=as_modelopt_stacks,
    ),
    "the table in hf_quant_config.json alone": Case(
        "qwen3-moe",
        modelopt(["lm_head"], algo="MIXED_PRECISION"),
        _MOE_2,
        form=_fp8_attention,
        hf_quant=_mixed_table(),
    ),
    "the table nested in config.json": Case(
        "qwen3-moe",
        {"quant_method": "modelopt", **_mixed_table()},
        _MOE_2,
        form=_fp8_attention,
    ),
    "regular expressions in ModelOpt's list": Case(
        "qwen3",
        modelopt(["lm_head", r"re:.*self_attn\..*"]),
        {"linear": 4},
        kept="self_attn",
    ),
    "W4A16 with scales of activations": Case(
        "qwen3", modelopt(["lm_head"], algo="W4A16_NVFP4", group_size=16), _DENSE_2
    ),
    "a tower in FP8": _with_tower("gemma3-vision", "fp8", 16),
    "a tower in NVFP4, Pixtral's": _with_tower("mistral3", "nvfp4", 18),
    "a tower in NVFP4, Qwen2.5-VL's": _with_tower("qwen2.5-vl", "nvfp4", 18),
    "a tower in NVFP4, Gemma-4's": _with_tower("gemma4-vision", "nvfp4", 22),
    "a tower in FP8 by rows, Qwen3-VL's": _with_tower("qwen3-vl", "fp8row", 20),
    "a tower in NVFP4, GLM-4V's": _with_tower("glm4v", "nvfp4", 19),
    "a tower in 16 bits, GLM-4V's": Case(
        "glm4v",
        modelopt(["lm_head", "*.gate_proj", "*.up_proj", *(f"*visual*{n}" for n in _GLM_TOWER)]),
        {"linear": 8},
    ),
    "stars at both ends": Case(
        "gemma4",
        legacy(["lm_head", "*per_layer*"]),
        {"linear": 16},
        kept="per_layer",
    ),
}


def check_served(name: str, work: Path) -> None:
    """On a real engine a case ends in its error, or gives the log-probabilities that stock vLLM
    gives on the same weights dequantised, within what their type rounds off."""
    from vllm_nvfp4.testing.model_sweep import TOLERANCE, serve, write_twin

    case = CASES[name]
    dtype, media = ARCHITECTURES[case.model].dtype, MEDIA.get(case.model)
    folder = write_case(case, work / "case")
    if case.error:
        with pytest.raises(Exception, match=case.error):
            serve(folder, dtype)
        return
    plain = write_plain(case, work / "plain")
    assert write_twin(plain, matrices_of(case, plain), work / "twin") == 0
    # As on a CPU without an FP8 KV cache, whose rounding would hide a layer's.
    with mock.patch("vllm_nvfp4.compat.kv_cache.obstacle", return_value="rounding"):
        answer, _ = serve(folder, dtype, media=media)
    expected, _ = serve(work / "twin", dtype, media=media, quantization=None)
    # Of BF16 it is three times what two kernels differ by here.
    limit = TOLERANCE[dtype] if dtype == "float32" else 0.2
    for one, other in zip((answer, *answer.shown), (expected, *expected.shown), strict=True):
        assert (deviation := one.deviation(other)) < limit, (deviation, one, other)


# Of MiniMax-M2 vLLM's CPU backend has no routing: make models, stock vLLM's column.
SERVED = [name for name, case in CASES.items() if case.model != "minimax-m2"]
