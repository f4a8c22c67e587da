# SPDX-License-Identifier: Apache-2.0
"""Memory and time in which `vllm-nvfp4 quantize` makes a checkpoint of a model of 7 to 8 billion.

    python benchmarks/bench_quantize_memory.py --scratch /tmp --csv FILE

The source has random BF16 weights in the true shapes, in shards; its decoder layers hold the same
values, on which neither memory nor time depends. It needs 16 GB in --scratch and is deleted
afterwards. --mse-layers is how many decoder layers `mse` is run on, embedding and lm_head whole: a
search over the scales of every layer takes long on few cores, and takes the same memory on each.

peak_rss_mib counts the pages of the mapped source file that happen to be in memory, which the
system takes back when it needs to; peak_anonymous_mib is what the process holds beside files.
match: layer 0's o_proj is bit for bit what the definition of the method gives.

    python benchmarks/bench_quantize_memory.py --said MODEL... --csv FILE

sets what the command says before it begins beside its peak, for 16-bit folders; match: within 5 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import make_random_checkpoint
import torch

SAID_FIELDS = ("model", "method", "samples", "said_mib", "peak_rss_mib", "said_over_peak", "match")
_SAID_SAMPLES = {"rtn": (0,), "mse": (0,), "hessian": (8,), "gptq": (8, 16)}
_MOST_WRONG = 0.05
FIELDS = (
    *("model", "method", "layers", "linear_weights", "source_mib", "peak_rss_mib"),
    *("peak_anonymous_mib", "cpu_seconds", "wall_seconds", "match"),
)
_LAYERS_PER_SHARD = 8
MIB = 2**20


def write_source(shape: Any, folder: Path) -> int:
    """The 16-bit model; returns its bytes. A tensor at a time, so that it needs little memory."""
    from vllm_nvfp4.checkpoints.safetensors_file import SafetensorsWriter
    from vllm_nvfp4.checkpoints.source import TensorInfo

    folder.mkdir()
    config = make_random_checkpoint.config_of(shape)
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generator = torch.Generator().manual_seed(0)
    sizes = make_random_checkpoint.projections(shape)
    one = {
        name: torch.randn(size, generator=generator).mul_(size[1] ** -0.5).bfloat16()
        for name, size in sizes.items()
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        one[norm] = torch.ones(shape.hidden_size, dtype=torch.bfloat16)
    outer = {"model.norm.weight": one["input_layernorm"]}
    table = torch.zeros(shape.vocab_size, shape.hidden_size, dtype=torch.bfloat16)
    outer |= {"model.embed_tokens.weight": table, "lm_head.weight": table}
    layers = range(shape.num_hidden_layers)
    shards = [
        {f"model.layers.{i}.{name}.weight": t for i in part for name, t in one.items()}
        for part in (layers[j : j + _LAYERS_PER_SHARD] for j in layers[::_LAYERS_PER_SHARD])
    ]
    for i, tensors in enumerate((*shards, outer)):
        path = folder / f"model-{i + 1:05d}-of-{len(shards) + 1:05d}.safetensors"
        entries = {name: TensorInfo("BF16", tuple(t.shape)) for name, t in tensors.items()}
        with SafetensorsWriter(path, entries) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def quantize(source: Path, target: Path, method: str, *options: str) -> dict[str, float]:
    """Run the command, and watch its memory every 20 ms."""
    command = [sys.executable, "-m", "vllm_nvfp4.cli.main", "quantize", "--no-check", str(source)]
    command += ["-o", str(target), "--method", method, *options]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(common.ROOT)}
    peaks = {"VmHWM": 0, "RssAnon": 0}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            for name in peaks:
                _, found, rest = status.partition(f"{name}:")
                if found:  # a process that has just ended has no memory
                    peaks[name] = max(peaks[name], int(rest.split()[0]))
            time.sleep(0.02)
        log.seek(0)
        lines = log.read()
        if process.returncode:
            raise SystemExit(lines)
    said = re.search(r"^memory: about (\d+) MiB", lines, re.M)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "said_mib": float(said[1]) if said else float("nan"),
        "peak_rss_mib": peaks["VmHWM"] / 1024,
        "peak_anonymous_mib": peaks["RssAnon"] / 1024,
        "cpu_seconds": after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime,
        "wall_seconds": time.monotonic() - started,
    }


def matches(source: Path, target: Path, method: str) -> bool:
    from vllm_nvfp4.checkpoints.source import Source
    from vllm_nvfp4.numerics.quantize import quantize_nvfp4

    layer = "model.layers.0.self_attn.o_proj"
    expected = quantize_nvfp4(Source(source).load(f"{layer}.weight", "cpu"), method)
    stored = Source(target)
    return bool(
        torch.equal(stored.load(f"{layer}.weight", "cpu"), expected.codes)
        and torch.equal(
            stored.load(f"{layer}.weight_scale", "cpu").view(torch.uint8),
            expected.block_scale.view(torch.uint8),
        )
    )


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for method in args.methods:
        shape = make_random_checkpoint.MODELS[args.model]
        layers = args.layers or shape.num_hidden_layers
        if method == "mse":
            layers = min(layers, args.mse_layers)
        shape = dataclasses.replace(shape, num_hidden_layers=layers)
        with tempfile.TemporaryDirectory(dir=args.scratch) as temporary:
            source, target = Path(temporary) / "source", Path(temporary) / method
            num_bytes = write_source(shape, source)
            found = quantize(source, target, method)
            sizes = make_random_checkpoint.projections(shape).values()
            yield {
                "model": args.model,
                "method": method,
                "layers": layers,
                "linear_weights": layers * sum(n * k for n, k in sizes),
                "source_mib": num_bytes / MIB,
                **found,
                "match": matches(source, target, method),
            }


def measure_said(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for model, (method, counts) in itertools.product(args.said, _SAID_SAMPLES.items()):
        for count in counts:
            options = ["--samples", str(count)] if count else []
            with tempfile.TemporaryDirectory(dir=args.scratch) as temporary:
                found = quantize(model, Path(temporary) / method, method, *options)
            share = found["said_mib"] / found["peak_rss_mib"]
            names = {"model": model.name, "method": method, "samples": count}
            is_near = abs(share - 1) <= _MOST_WRONG
            yield {**names, **found, "said_over_peak": f"{share:.3f}", "match": is_near}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    models = [name for name in make_random_checkpoint.FAMILIES if name.endswith("8B")]
    parser.add_argument("--model", choices=models, default="Llama-3.1-8B")
    parser.add_argument("--methods", nargs="+", choices=("rtn", "mse"), default=("rtn", "mse"))
    parser.add_argument("--layers", type=int, help="decoder layers; default: the model's own")
    parser.add_argument("--mse-layers", type=int, default=2)
    parser.add_argument("--said", type=Path, nargs="+", metavar="MODEL", help="see above")
    parser.add_argument("--scratch", type=Path, help="folder with 16 GB free")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    fields, found = FIELDS, measure(args)
    if args.said:
        fields, found = SAID_FIELDS, measure_said(args)
    elif args.scratch is None:
        parser.error("--scratch: needed without --said")
    rows = common.write_rows(args.csv, common.header(), fields, found, digits=".0f")
    return 0 if all(row["match"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
