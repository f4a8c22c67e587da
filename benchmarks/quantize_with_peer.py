# SPDX-License-Identifier: Apache-2.0
"""Quantise a model with llm-compressor or ModelOpt, in an environment that has one of them.

    python benchmarks/quantize_with_peer.py LIBRARY METHOD MODEL OUT --samples FILE

Started by bench_quantize_peers.py, and needs nothing of this project. Weights only (W4A16), blocks
of 16, lm_head kept. FILE: safetensors with `tokens`, [num_samples, length] int64; data-free methods
leave it alone. The last line of the output is the CPU time of all threads, imports left out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

METHODS = {
    "llmcompressor": ("rtn", "mse", "imatrix", "gptq", "gptq-mse"),
    "modelopt": ("rtn", "mse", "local_hessian", "gptq", "awq_lite"),
}


def compress(
    model: Any, method: str, tokens: torch.Tensor, all_experts: bool, ignore: list[str]
) -> None:
    """llm-compressor's own presets. Data goes only to the methods that look at it."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    common = {"targets": "Linear", "scheme": "NVFP4A16", "ignore": ["lm_head", *ignore]}
    recipe = {
        "rtn": lambda: QuantizationModifier(**common),
        "mse": lambda: QuantizationModifier(**common, weight_observer="nvfp4_expanded_mse"),
        "imatrix": lambda: QuantizationModifier(**common, weight_observer="nvfp4_expanded_imatrix"),
        "gptq": lambda: GPTQModifier(**common),
        "gptq-mse": lambda: GPTQModifier(**common, weight_observer="nvfp4_expanded_mse"),
    }[method]()
    options: dict[str, Any] = {}
    if method not in ("rtn", "mse"):
        rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
        options = {
            "dataset": Dataset.from_dict(rows),
            "num_calibration_samples": len(tokens),
            "max_seq_length": tokens.shape[1],
            "shuffle_calibration_samples": False,
            "moe_calibrate_all_experts": all_experts,
        }
    oneshot(model=model, recipe=recipe, **options)


def optimise(model: Any, method: str, tokens: torch.Tensor) -> None:
    """ModelOpt's W4A16_NVFP4 with its other algorithms in place of `max`."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.W4A16_NVFP4_CFG)
    if method != "rtn":
        # The presets with these algorithms are W4A4; here the activations stay as they are.
        preset = {
            "mse": mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG,
            "local_hessian": mtq.NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG,
            "gptq": {**mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG, "algorithm": "gptq"},
            "awq_lite": mtq.NVFP4_AWQ_LITE_CFG,
        }[method]
        config = copy.deepcopy(preset)
        config["quant_cfg"] = [
            *config["quant_cfg"],
            {"quantizer_name": "*input_quantizer", "enable": False},
        ]

    def run(inner: Any) -> None:
        with torch.inference_mode():
            for sample in tokens:
                inner(input_ids=sample[None])

    mtq.quantize(model, config, run)


def load(library: str, folder: Path) -> Any:
    """The model in BF16; with llm-compressor each expert as linear layers, as it wants them."""
    context: Any = contextlib.nullcontext()
    if library == "llmcompressor":
        from llmcompressor.modeling.moe.linearize import load_quantizable_moe

        context = load_quantizable_moe()
    with context:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def export(library: str, model: Any, target: Path) -> None:
    if library == "llmcompressor":
        model.save_pretrained(target, save_compressed=True)
        return
    from modelopt.torch.export import export_hf_checkpoint

    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=target)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("library", choices=sorted(METHODS))
    parser.add_argument("method")
    parser.add_argument("model", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument(
        "--routed-tokens",
        action="store_true",
        help="llm-compressor: an expert sees the tokens that are routed to it, not all",
    )
    parser.add_argument(
        "--ignore", nargs="*", default=[], help="llm-compressor: layers to keep beside lm_head"
    )
    args = parser.parse_args()
    if args.method not in METHODS[args.library]:
        parser.error(f"{args.library} has {', '.join(METHODS[args.library])}; not {args.method}")
    tokens = load_file(args.samples)["tokens"]
    model = load(args.library, args.model)
    started = time.process_time()
    if args.library == "llmcompressor":
        compress(model, args.method, tokens, not args.routed_tokens, args.ignore)
    else:
        optimise(model, args.method, tokens)
    export(args.library, model, args.target)
    seconds = time.process_time() - started
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.target)
    print(f"\ncpu_seconds {seconds:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
