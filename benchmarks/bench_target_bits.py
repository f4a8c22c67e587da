# SPDX-License-Identifier: Apache-2.0
"""What `vllm-nvfp4 quantize --target-bits` reaches: bits per weight, perplexity and KL.

    python benchmarks/bench_target_bits.py MODEL --wheel gensim-4.4.0-*.whl --csv FILE

Model, text and calibration as in bench_quantize.py. Bits are the mean over the decoder's linear
layers, scales included; embedding and lm_head stay in 16 bits and are not counted. cpu_s is
the whole command's, the measurement of the sensitivities included; a row is written when known.
match: the file is within the budget, and all its weights are finite.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_quantize
import torch

FIELDS = (
    *("target_bits", "method", "bits_per_weight", "kl", "kl_se", "ppl", "ppl_ratio"),
    *("ppl_ratio_se", "top1", "cpu_s", "peak_mib", "match"),
)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from vllm_nvfp4.testing.engine import plain_model, reference_model

    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary) / "calibration.txt"
        samples = bench_quantize.texts_of(args, text)
        model = plain_model(args.model, torch.float32)
        base, reference = bench_quantize.scores_of(model, samples, None)
        del model
        for bits in args.target_bits:
            target = Path(temporary) / str(bits)
            options = ["--target-bits", str(bits)]
            if args.method != "mse":
                options += ["--calibration", str(text), "--samples", str(args.samples)]
            cost = bench_quantize.quantize(args.model, target, args.method, options)
            scores, _ = bench_quantize.scores_of(
                reference_model(target, torch.float32), samples, reference
            )
            finite = bench_quantize.stored_matches(target, args.method, args.model)
            # The command prints two decimals.
            match = finite and cost["bits_per_weight"] <= bits + 0.005
            found = bench_quantize.compared(scores, base)
            yield {"target_bits": bits, "method": args.method, **found, **cost, "match": match}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    bench_quantize.add_text_arguments(parser, eval_samples=8)
    parser.add_argument("--target-bits", type=float, nargs="+", default=(5.5,))
    parser.add_argument("--method", choices=("mse", "hessian", "gptq"), default="gptq")
    args = parser.parse_args()
    return bench_quantize.write(args, FIELDS, measure(args))


if __name__ == "__main__":
    sys.exit(main())
