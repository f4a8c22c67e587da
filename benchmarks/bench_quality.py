# SPDX-License-Identifier: Apache-2.0
"""What each weight format costs a model, with activations in 16, 8 and 4 bits.

    python benchmarks/bench_quality.py MODEL --wheel gensim-4.4.0-*.whl --csv FILE

Model and text as in bench_quantize.py: every second article for the scores, the others for the
calibration of nvfp4-gptq. All rows see the same tokens. The arithmetic is simulated in float32 with
transformers: weights are dequantised, activations rounded before each quantised layer (8: E4M3 with
one scale per token; int8: INT8 with one scale per token and 64 columns; 4: NVFP4 by the absolute
maximum). Standard errors are by block bootstrap, paired with the 16-bit row.

a16_*: the same, from the same weights with 16-bit activations instead of from MODEL: what the
activations alone cost.
match: no weight is further from the original than its format allows; nvfp4-gptq: finite weights.

FILE is written after every row. Rows that it has already are not measured again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_quantize
import common
import numpy as np
import torch

FIELDS = (
    *("weights", "activations", "bits_per_weight", "layer_mib", "ppl", "ppl_increase_pct"),
    *("standard_error_pct", "kl", "kl_p99", "top1", "match"),
    *("a16_increase_pct", "a16_standard_error_pct", "a16_kl", "commit"),
)
FORMATS = ("bf16", "fp8", "int4", "mxfp4", "nvfp4-rtn", "nvfp4-mse", "nvfp4-gptq")
ACTIVATIONS = ("16", "8", "int8", "4")
INT4_GROUP = 128
# Largest error over the largest weight of the same block, row or group: half the widest step.
# FP8: half an ulp of 1/8; INT4: half of 2/15, and as much for the rounded zero point; FP4: half of
# 6 - 4, with MXFP4 clipping up to 8 to 6 and E4M3 rounding the scale.
_BOUNDS = {"bf16": 0.0, "fp8": 1 / 16, "int4": 2 / 15, "mxfp4": 0.25, "nvfp4-rtn": 0.24}


@dataclasses.dataclass(frozen=True)
class Format:
    """bits: per weight, scales included, of a layer with K columns; block: of one scale, 0 for a
    whole row; quantize: [N, K] float32 -> the same, rounded."""

    bits: Callable[[int], float]
    block: int
    quantize: Callable[[torch.Tensor], torch.Tensor]


def fp8_rows(weight: torch.Tensor) -> torch.Tensor:
    """E4M3 with one float32 scale per row."""
    from vllm_nvfp4.numerics.quantize import to_e4m3

    scale = weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return to_e4m3(weight / scale).float() * scale


def int4_groups(weight: torch.Tensor) -> torch.Tensor:
    """Four bits with a scale in FP16 and a zero point of four bits for each group of a row."""
    parts = []
    for group in weight.split(INT4_GROUP, dim=-1):
        low = group.amin(-1, keepdim=True).clamp(max=0)
        high = group.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 15).clamp(min=1e-6).half().float()
        zero = (-low / scale).round().clamp(0, 15)
        parts.append(((group / scale + zero).round().clamp(0, 15) - zero) * scale)
    return torch.cat(parts, -1)


def nvfp4(method: str) -> Callable[[torch.Tensor], torch.Tensor]:
    from vllm_nvfp4.numerics.quantize import quantize_nvfp4

    return lambda weight: quantize_nvfp4(weight, method).dequantize()


def formats() -> dict[str, Format]:
    from vllm_nvfp4.numerics.quantize import quantize_mxfp4

    return {
        "bf16": Format(lambda k: 16, 1, lambda w: w),
        "fp8": Format(lambda k: 8 + 32 / k, 0, fp8_rows),
        "int4": Format(lambda k: 4 + 20 * -(-k // INT4_GROUP) / k, INT4_GROUP, int4_groups),
        "mxfp4": Format(lambda k: 4.25, 32, lambda w: quantize_mxfp4(w).dequantize()),
        "nvfp4-rtn": Format(lambda k: 4.5, 16, nvfp4("rtn")),
        "nvfp4-mse": Format(lambda k: 4.5, 16, nvfp4("mse")),
        "nvfp4-gptq": Format(lambda k: 4.5, 16, lambda w: w),
    }


def within_bound(name: str, fmt: Format, weight: torch.Tensor, rounded: torch.Tensor) -> bool:
    if name not in _BOUNDS:
        return bool(rounded.isfinite().all())
    error = (rounded - weight).abs()
    for block, difference in zip(
        weight.split(fmt.block or weight.shape[-1], -1),
        error.split(fmt.block or weight.shape[-1], -1),
        strict=True,
    ):
        largest = block.abs().amax(-1, keepdim=True)
        if (difference > _BOUNDS[name] * largest * 1.001 + 1e-6).any():
            return False
    return True


def int8_groups(x: torch.Tensor) -> torch.Tensor:
    """INT8 with one float32 scale per row and 64 columns, as a8_variant=int8 has it."""
    from vllm_nvfp4.numerics.formats import INT8_GROUP
    from vllm_nvfp4.numerics.quantize import quantize_int8_per_group

    q, scale = quantize_int8_per_group(x)
    return q.float() * scale.repeat_interleave(INT8_GROUP, -1)[..., : x.shape[-1]]


def round_activation(x: torch.Tensor, activations: str) -> torch.Tensor:
    """x: [1, T, K] float32."""
    from vllm_nvfp4.numerics.quantize import quantize_nvfp4

    if activations == "16":
        return x
    if activations == "8":
        return fp8_rows(x)
    if activations == "int8":
        return int8_groups(x)
    return quantize_nvfp4(x.flatten(0, -2)).dequantize().view(x.shape)


class Quantised:
    """A transformers model whose quantised layers change format between runs."""

    def __init__(self, model: Any, layers: list[str]) -> None:
        self.model, self.activations = model, "16"
        modules = dict(model.named_modules())
        self.layers = {name: modules[name] for name in layers}
        self.original = {n: m.weight.detach().clone() for n, m in self.layers.items()}
        for module in self.layers.values():
            module.register_forward_pre_hook(
                lambda module, args: (round_activation(args[0], self.activations), *args[1:])
            )

    def set_weights(self, name: str, fmt: Format, stored: dict[str, torch.Tensor] | None) -> bool:
        match = True
        for layer, module in self.layers.items():
            original = self.original[layer]
            rounded = stored[f"{layer}.weight"] if stored else fmt.quantize(original)
            match &= within_bound(name, fmt, original, rounded)
            module.weight.data.copy_(rounded)
        return match

    def size(self, fmt: Format) -> tuple[float, float]:
        """(bits per weight, MiB) of the quantised layers."""
        bits = sum(w.numel() * fmt.bits(w.shape[1]) for w in self.original.values())
        return bits / sum(w.numel() for w in self.original.values()), bits / 8 / 2**20

    def logits(self, samples: torch.Tensor) -> Iterator[torch.Tensor]:
        """[length, V] float32 of each sample."""
        for sample in samples:
            with torch.inference_mode():
                yield self.model(input_ids=sample[None]).logits[0].float()


def scores_of(logits: Iterator[torch.Tensor], reference: list[torch.Tensor], samples: Any) -> Any:
    from vllm_nvfp4.quality.engine import Scores
    from vllm_nvfp4.quality.recorder import score

    found = [
        score(mine[:-1], tokens[1:], theirs[:-1])
        for mine, theirs, tokens in zip(logits, reference, samples, strict=True)
    ]
    return Scores(**{name: np.array([f[name] for f in found]) for name in ("nll", "kl", "same")})


def increases(scores: Any, base: Any) -> dict[str, Any]:
    """Row of vllm_nvfp4.quality.statistics by metric."""
    from vllm_nvfp4.quality.statistics import text_rows

    return {row.metric: row for row in text_rows(scores, base)}


def columns(scores: Any, base: Any) -> dict[str, Any]:
    """What a row says of its distance from MODEL."""
    rows = increases(scores, base)
    return {
        "ppl": rows["perplexity"].value,
        "ppl_increase_pct": rows["perplexity, %"].difference,
        "standard_error_pct": rows["perplexity, %"].standard_error,
        "kl": rows["KL, mean"].value,
        "kl_p99": rows["KL, 99th percentile"].value,
        "top1": rows["top-1 agreement"].value,
    }


def a16_columns(scores: Any, base: Any) -> dict[str, Any]:
    """What a row says of its distance from the same weights with 16-bit activations."""
    rows = increases(scores, base)
    return {
        "a16_increase_pct": rows["perplexity, %"].difference,
        "a16_standard_error_pct": rows["perplexity, %"].standard_error,
        "a16_kl": rows["KL, mean"].value,
    }


def measure(args: argparse.Namespace, done: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    from transformers import AutoTokenizer

    from vllm_nvfp4.checkpoints.source import Source
    from vllm_nvfp4.testing.engine import plain_model

    texts = bench_quantize.articles(args.wheel)
    tokens = AutoTokenizer.from_pretrained(args.model)("\n\n".join(texts[::2]), verbose=False)
    samples = torch.tensor(tokens.input_ids[: args.eval_samples * args.length])
    samples = samples.view(-1, args.length)
    quantized, _ = Source(args.model).quantizable()
    layers = sorted(name.removesuffix(".weight") for name in quantized)
    model = Quantised(plain_model(args.model, torch.float32), layers)
    reference = list(model.logits(samples))
    base = scores_of(iter(reference), reference, samples)
    for name, fmt in formats().items():
        wanted = [a for a in args.activations if (name, a) not in done]
        if name not in args.formats or not wanted:
            continue
        stored = calibrated(args, "\n\n".join(texts[1::2])) if name == "nvfp4-gptq" else None
        match = model.set_weights(name, fmt, stored)
        bits, mib = model.size(fmt)
        model.activations = "16"
        a16 = list(model.logits(samples))
        a16_base = scores_of(iter(a16), a16, samples)
        for activations in wanted:
            model.activations = activations
            logits = a16 if activations == "16" else list(model.logits(samples))
            yield {
                "weights": name,
                "activations": activations,
                "bits_per_weight": bits,
                "layer_mib": mib,
                **columns(scores_of(iter(logits), reference, samples), base),
                "match": match,
                **a16_columns(scores_of(iter(logits), a16, samples), a16_base),
            }
        model.activations = "16"


def calibrated(args: argparse.Namespace, text: str) -> dict[str, torch.Tensor]:
    """The dequantised layers of `vllm-nvfp4 quantize --method gptq`."""
    from vllm_nvfp4.testing.checkpoints import dequantized_state_dict

    with tempfile.TemporaryDirectory() as temporary:
        other, target = Path(temporary) / "calibration.txt", Path(temporary) / "gptq"
        other.write_text(text)
        options = ["--calibration", str(other), "--samples", str(args.samples)]
        bench_quantize.quantize(args.model, target, "gptq", options)
        return dequantized_state_dict(target)


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['weights']:>10} {row['activations']:>4} | {row['bits_per_weight']:5.2f} bits "
        f"{row['layer_mib']:6.1f} MiB | ppl {row['ppl']:7.3f} "
        f"{row['ppl_increase_pct']:+7.2f} % +- {row['standard_error_pct']:.2f} | "
        f"kl {row['kl']:.4f} p99 {row['kl_p99']:.3f} | top-1 {row['top1']:.3f} | "
        f"over A16 {row['a16_increase_pct']:+.2f} % +- {row['a16_standard_error_pct']:.2f}, "
        f"kl {row['a16_kl']:.4f} | "
        f"{'match' if row['match'] else 'MISMATCH'}",
        flush=True,
    )


def write_csv(path: Path, rows: list[dict[str, Any]], notes: list[tuple[str, str]]) -> None:
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in notes)
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--wheel", type=Path, required=True, help="gensim wheel")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--activations", nargs="+", choices=ACTIVATIONS, default=ACTIVATIONS)
    parser.add_argument("--samples", type=int, default=16, help="for the calibration")
    parser.add_argument("--eval-samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--csv", type=Path)
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    notes = common.header()
    notes.append(("text", f"{args.wheel.name}, {args.eval_samples} x {args.length} tokens"))
    notes.append(("calibration", f"other articles of the same wheel, {args.samples} x 1024 tokens"))
    for name, value in notes:
        print(f"{name}: {value}")
    rows = bench_quantize.read_csv(args.csv) if args.csv else []
    for row in measure(args, {(row["weights"], row["activations"]) for row in rows}):
        rows.append({**row, "commit": dict(notes)["commit"]})
        rows.sort(key=lambda r: (FORMATS.index(r["weights"]), ACTIVATIONS.index(r["activations"])))
        show(row)
        if args.csv:
            write_csv(args.csv, rows, notes)
    return 0 if all(str(row["match"]) == "True" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
