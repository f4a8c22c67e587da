# SPDX-License-Identifier: Apache-2.0
"""Calibration, two ranks, LoRA and multi-token prediction of one architecture of the sweep.

Each takes a Sweep whose model is quantised in ModelOpt's dialect, returns the cell of the table,
and raises ValueError, or whatever ends an engine, where it fails.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_nvfp4.testing.architectures import DRAFTS, write_architecture
from vllm_nvfp4.testing.checkpoints import edit_json, edit_tensors
from vllm_nvfp4.testing.drafts import hand_on_the_embedding, make_predictable
from vllm_nvfp4.testing.engine import engine
from vllm_nvfp4.testing.model_sweep import PROMPT, Measured, Sweep, serve, stored_matrices
from vllm_nvfp4.testing.tiny_models import build_tokenizer
from vllm_nvfp4.testing.twin import write_twin as write_dequantised

ROAD = "modelopt"
RANKS: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
_RANK = 4
_ADAPTED = r"(self_attn\.[qo]_proj|mlp\.(gate|down)_proj|mixer\.[qo]_proj|mamba\.out_proj)\.weight$"
# An adapter that is not used leaves the answer as it is.
_LEAST_CHANGE = 0.2
HEADS = ("right", "wrong")
_NUM_TOKENS = 18
_AHEAD = 2
# Enough for every expert of a tiny model to be reached.
_CALIBRATED = ("--method", "gptq", "--samples", "4", "--sample-length", "64")


def two_ranks(sweep: Sweep) -> str:
    """The largest difference of a log-probability from stock vLLM's on one rank; on two, where
    stock vLLM itself differs by more, as with latent attention on a CPU."""
    found = sweep.measure(ROAD, **RANKS)
    if found.deviation <= found.tolerance:
        return _close(found)
    dtype, twin = sweep.architecture.dtype, dequantised(sweep)
    expected, _ = serve(twin, dtype, quantization=None, **RANKS)
    answer, _ = serve(sweep.work / ROAD, dtype, **RANKS)
    close = _close(Measured(answer.deviation(expected), 0, "", found.tolerance))
    return f"{close} from stock on two, itself {found.deviation:.2g} off"


def dequantised(sweep: Sweep) -> Path:
    """The folder with the dequantised weights of what ``quantize`` wrote."""
    twin = sweep.work / "twin"
    shutil.rmtree(twin, ignore_errors=True)
    write_dequantised(sweep.plain, stored_matrices(sweep.work / ROAD, sweep.plain), twin)
    return twin


def _close(found: Measured) -> str:
    if found.deviation > found.tolerance:
        raise ValueError(f"differs by {found.deviation:.2g}, not at most {found.tolerance:.2g}")
    return f"{found.deviation:.2g}"


def adapted(sweep: Sweep) -> str:
    """The same with a LoRA adapter on both."""
    folder, dtype = sweep.work / ROAD, sweep.architecture.dtype
    plain = sweep.measure(ROAD)
    write_adapter(sweep.plain, sweep.work / "adapter")
    twin = dequantised(sweep)
    options = stock_options(sweep, "LoRA")
    expected, _ = serve(twin, dtype, quantization=None, **options)
    without, _ = serve(twin, dtype, quantization=None)
    answer, _ = serve(folder, dtype, **options)
    if expected.deviation(without) < _LEAST_CHANGE:
        raise ValueError("the adapter changes nothing")
    return _close(Measured(answer.deviation(expected), 0, "", plain.tolerance))


def write_adapter(plain: Path, folder: Path) -> Path:
    """A LoRA adapter with random weights for projections of a model; returns its folder."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    modules: set[str] = set()
    with safe_open(plain / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            if ".experts." in name or not re.search(_ADAPTED, name):
                continue
            rows, columns = file.get_slice(name).get_shape()
            module = name.removesuffix(".weight")
            modules.add(module.rpartition(".")[2])
            a = torch.randn(_RANK, columns, generator=generator) * columns**-0.5
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            b = torch.randn(rows, _RANK, generator=generator) * 0.3
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _RANK}
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": sorted(modules)})
    )
    return folder


def write_calibrated(sweep: Sweep) -> None:
    """Quantise the model by `--method gptq`. Before any engine of this process; see
    :meth:`Sweep.quantise`."""
    if not (sweep.plain / "tokenizer.json").exists():
        build_tokenizer().save_pretrained(sweep.plain)
    sweep.quantise_folder(sweep.plain, sweep.work / "gptq", ROAD, *_CALIBRATED)


def calibrated(sweep: Sweep) -> str:
    """The largest difference of a log-probability from stock vLLM's on the dequantised weights."""
    return _close(sweep.measure("gptq"))


def write_drafts(sweep: Sweep) -> None:
    """Quantise the model with a head for multi-token prediction that is always right, and with one
    that is wrong. Before any engine of this process; see :meth:`Sweep.quantise`."""
    draft = DRAFTS[sweep.architecture.name]
    for name in HEADS:
        plain = sweep.work / f"{name}-16"
        shutil.rmtree(plain, ignore_errors=True)
        write_architecture(plain, sweep.architecture)
        edit_json(plain / "config.json", draft.settings)

        def edit(tensors: dict[str, torch.Tensor], is_right: bool = name == "right") -> None:
            draft.add(tensors)
            make_predictable(tensors)
            if is_right:
                hand_on_the_embedding(tensors)

        edit_tensors(plain, edit)
        sweep.quantise_folder(plain, sweep.work / name, ROAD)


def multi_token(sweep: Sweep) -> str:
    """How many drafted tokens were taken of either head; both have to give the tokens that come
    without speculation."""
    dtype, method = sweep.architecture.dtype, DRAFTS[sweep.architecture.name].method
    alone, _ = ask(sweep.work / "right", dtype)
    cells = []
    for name in HEADS:
        tokens, (taken, drafted) = ask(sweep.work / name, dtype, method)
        if tokens != alone:
            raise ValueError(f"{name} head: {tokens}, without speculation {alone}")
        if drafted < _AHEAD or (taken / drafted > 0.9) != (name == "right"):
            raise ValueError(f"{name} head: {taken} of {drafted} tokens taken")
        cells.append(f"{taken}/{drafted}")
    return " and ".join(cells)


def ask(
    folder: Path, dtype: str, method: str = "", **options: Any
) -> tuple[list[int], tuple[int, int]]:
    """(greedy tokens after PROMPT, (drafted tokens that were taken, drafted)).

    method: of vLLM's speculative_config, "" for none; options: keywords of ``LLM``
    """
    from vllm import SamplingParams

    defaults: dict[str, Any] = {
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "limit_mm_per_prompt": {"image": 0, "video": 0, "audio": 0},
        "additional_config": {"nvfp4": {"kv_cache": "keep"}},
    }
    if method:
        defaults["speculative_config"] = {"method": method, "num_speculative_tokens": _AHEAD}
    parameters = SamplingParams(
        temperature=0, max_tokens=_NUM_TOKENS, ignore_eos=True, detokenize=False
    )
    with engine(folder, **(defaults | options)) as llm:
        request = {"prompt_token_ids": PROMPT}
        output = llm.generate([request], parameters, use_tqdm=False)[0].outputs[0]
        counts = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    spec = "vllm:spec_decode_num"
    taken = int(counts.get(f"{spec}_accepted_tokens", 0))
    return list(output.token_ids), (taken, int(counts.get(f"{spec}_draft_tokens", 0)))


def stock_options(sweep: Sweep, feature: str) -> dict[str, Any]:
    """Of :func:`serve`, with which vLLM runs a feature, with the plugin or without."""
    if feature == "TP 2":
        return RANKS
    if feature == "LoRA":
        return {"adapter": sweep.work / "adapter", "enable_lora": True, "max_lora_rank": 8}
    return {}


# What has to be written before any engine of the process.
WRITERS: dict[str, Callable[[Sweep], None]] = {"gptq": write_calibrated, "MTP": write_drafts}
FEATURES: dict[str, Callable[[Sweep], str]] = {
    "gptq": calibrated,
    "TP 2": two_ranks,
    "LoRA": adapted,
    "MTP": multi_token,
}
