#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Peak memory of loading a 16-bit model through vLLM, as it is and quantised while it loads.

    python benchmarks/bench_load_memory.py --out benchmarks/results/load_memory_cpu.csv

The model is random, of the shape given below, 1.5e9 parameters by default. Each variant loads in a
process of its own; memory is what the process holds beside files (RssAnon), read every 5 ms while
``load_model`` runs, above what it held before. On vLLM's CPU backend; needs about 8 GB.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import header

MIB = 2**20
VARIANTS = {
    "bf16": {},
    "nvfp4 rtn": {"quantization": "nvfp4", "online_method": "rtn"},
    "nvfp4 mse": {"quantization": "nvfp4", "online_method": "mse"},
}


def write_random_model(folder: Path, num_layers: int) -> int:
    """A BF16 checkpoint with random weights; returns the bytes of its safetensors files."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from vllm_nvfp4.testing.tiny_models import build_tokenizer

    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def load(model: str, variant: str) -> dict[str, float]:
    """Load the model; MiB at the peak and afterwards, above what was held before."""
    from vllm import LLM
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    found: dict[str, float] = {}
    load_model = BaseModelLoader.load_model

    def watched(self: object, *args: object, **kwargs: object) -> object:
        before, peak, done = anonymous_bytes(), [0], threading.Event()

        def watch() -> None:
            while not done.is_set():
                peak[0] = max(peak[0], anonymous_bytes())
                time.sleep(0.005)

        thread = threading.Thread(target=watch)
        thread.start()
        result = load_model(self, *args, **kwargs)
        done.set()
        thread.join()
        found["peak MiB"] = (peak[0] - before) / MIB
        found["after MiB"] = (anonymous_bytes() - before) / MIB
        return result

    BaseModelLoader.load_model = watched
    options = dict(VARIANTS[variant])
    arguments: dict[str, object] = {"quantization": options.pop("quantization", None)}
    if options:
        arguments["additional_config"] = {"nvfp4": options | {"kv_cache": "keep"}}
    LLM(model, enforce_eager=True, max_model_len=128, max_num_seqs=2, dtype="bfloat16", **arguments)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print("RESULT", json.dumps(load(*args.worker)))
        return 0
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        size = write_random_model(Path(scratch), args.layers)
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--worker", scratch, variant]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if done.returncode or not lines:
                print(f"{variant}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
                return 1
            found = json.loads(lines[0].removeprefix("RESULT "))
            rows.append((variant, f"{size / MIB:.0f}", *(f"{v:.0f}" for v in found.values())))
            print("{:12} checkpoint {:>6} MiB  peak {:>6}  after {:>6}".format(*rows[-1]))
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows(("# " + key, value) for key, value in header())
            writer.writerow(("variant", "checkpoint MiB", "peak MiB", "after MiB"))
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
