# SPDX-License-Identifier: Apache-2.0
"""What each method of `vllm-nvfp4 quantize` costs a model, and how long it takes.

    python benchmarks/bench_quantize.py MODEL --wheel gensim-4.4.0-*.whl --csv FILE

MODEL is a folder of 16-bit safetensors. The text is the Wikipedia sample in the gensim wheel (CC
BY-SA; not part of this repository): every second article for the perplexity, the others for the
calibration, unless --calibration says otherwise. Every method sees the same tokens; weights are
dequantised and run in float32 with transformers. ppl_ratio and kl are against MODEL itself, kl the
mean over tokens of KL(MODEL || quantised); *_se are standard errors by a bootstrap over blocks of
tokens. cpu_s is the CPU time of all threads of the command, imports included, wall_s its duration
while load processes (a mean over the last minute, itself among them) wanted the cores.

FILE is written after every row. Methods that it has already are not measured again.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import html
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

METHODS = ("rtn", "mse", "gptq", "mr-gptq", "hessian")
FIELDS = (
    *("method", "bits_per_weight", "ppl", "ppl_ratio", "ppl_ratio_se", "kl", "kl_se", "top1"),
    *("cpu_s", "wall_s", "load", "peak_mib", "match", "commit"),
)
_MIN_CHARS = 2000


def articles(wheel: Path) -> list[str]:
    """The plain text of the articles in the gensim wheel, markup removed."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if "enwiki-latest" in n and n.endswith(".bz2"))
        xml = bz2.decompress(archive.read(name)).decode()
    bodies = [html.unescape(body) for body in re.findall(r"<text[^>]*>(.*?)</text>", xml, re.S)]
    plain = [_plain(b) for b in bodies if not b.lower().startswith("#redirect")]
    return [text for text in plain if len(text) > _MIN_CHARS]


def _plain(text: str) -> str:
    text = re.sub(r"<ref[^>/]*/>|<ref.*?</ref>|<!--.*?-->", "", text, flags=re.S)
    for _ in range(4):  # templates nest
        text = re.sub(r"\{\{[^{}]*\}\}|\{\|.*?\|\}", "", text, flags=re.S)
    link_in_caption = r"[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*"
    text = re.sub(rf"\[\[(?:File|Image|Category){link_in_caption}\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|<[^>]+>", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def scores_of(model: Any, samples: Any, reference: list[Any] | None) -> tuple[Any, list[Any]]:
    """(Scores against the reference's last hidden states, those of this model). The head is the
    same in all: no method quantises it."""
    import numpy as np
    import torch

    from vllm_nvfp4.quality.engine import Scores
    from vllm_nvfp4.quality.recorder import score

    found, states = [], []
    with torch.inference_mode():
        for i, tokens in enumerate(samples):
            hidden = model.get_decoder()(input_ids=tokens[None]).last_hidden_state[0, :-1]
            states.append(hidden)
            theirs = hidden if reference is None else reference[i]
            head = model.get_output_embeddings()
            found.append(score(head(hidden), tokens[1:], head(theirs)))
    fields = {name: np.array([f[name] for f in found]) for name in ("nll", "kl", "same")}
    return Scores(**fields), states


def compared(scores: Any, base: Any, block: int | None = None) -> dict[str, float]:
    """The quality columns of a row. block: as in statistics.text_rows"""
    from vllm_nvfp4.quality.statistics import BLOCK, text_rows

    rows = {row.metric: row for row in text_rows(scores, base, block=block or BLOCK)}
    ratio, kl = rows["perplexity, %"], rows["KL, mean"]
    return {
        "ppl": rows["perplexity"].value,
        "ppl_ratio": ratio.value / 100,
        "ppl_ratio_se": (ratio.standard_error or 0.0) / 100,
        "kl": kl.value,
        "kl_se": kl.standard_error or 0.0,
        "top1": rows["top-1 agreement"].value,
    }


def quantize(model: Path, target: Path, method: str, options: list[str]) -> dict[str, float]:
    """The cost columns of a row: what the command took."""
    command = [sys.executable, "-m", "vllm_nvfp4.cli.main", "quantize", "--no-check", str(model)]
    command += ["-o", str(target), "--method", method, *options]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(common.ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    wall = time.monotonic() - started
    peak = re.search(r"peak memory (\d+) MiB", done.stdout)
    bits = re.search(r"([\d.]+) bits per weight", done.stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "bits_per_weight": float(bits[1]) if bits else float("nan"),
        "cpu_s": after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime,
        "wall_s": wall,
        "load": os.getloadavg()[0],
        "peak_mib": float(peak[1]) if peak else float("nan"),
    }


def stored_matches(folder: Path, method: str, model: Path) -> bool:
    """The file holds a finite weight for each layer; for rtn the very bits of the definition."""
    from safetensors import safe_open

    from vllm_nvfp4.numerics.quantize import quantize_nvfp4
    from vllm_nvfp4.testing.checkpoints import dequantized_state_dict

    state = dequantized_state_dict(folder)
    if not all(tensor.isfinite().all() for tensor in state.values()):
        return False
    if method != "rtn":
        return True
    name = next(n for n in sorted(state) if n.endswith("down_proj.weight"))
    for path in model.glob("*.safetensors"):
        with safe_open(path, "pt") as reader:
            if name in reader.keys():  # noqa: SIM118 (not a mapping)
                expected = quantize_nvfp4(reader.get_tensor(name), "rtn").dequantize()
                return bool((state[name] == expected).all())
    return False


def texts_of(args: argparse.Namespace, calibration: Path, others: slice = slice(1, None, 2)) -> Any:
    """The tokens that every model is scored on, [eval_samples, length], of every second article,
    all there are with 0 samples; ``others`` are written to the file ``calibration``."""
    import torch
    from transformers import AutoTokenizer

    texts = articles(args.wheel)
    calibration.write_text("\n\n".join(texts[others]))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = tokenizer("\n\n".join(texts[::2]), verbose=False).input_ids
    args.eval_samples = args.eval_samples or len(tokens) // args.length
    return torch.tensor(tokens[: args.eval_samples * args.length]).view(-1, args.length)


def text_notes(
    args: argparse.Namespace, calibration: str = "other articles of the same wheel"
) -> list[tuple[str, str]]:
    """What the header of a results file says of the texts."""
    return [
        ("text", f"{args.wheel.name}, {args.eval_samples} x {args.length} tokens"),
        ("calibration", f"{calibration}, {args.samples} x 1024 tokens"),
    ]


def write(args: argparse.Namespace, fields: tuple[str, ...], rows: Iterator[Any]) -> int:
    """Write rows that say whether they ``match``; an exit status."""
    notes = [*common.header(), *text_notes(args)]
    written = common.write_rows(args.csv, notes, fields, rows)
    return 0 if all(row["match"] for row in written) else 1


def add_text_arguments(parser: argparse.ArgumentParser, eval_samples: int) -> None:
    """The model, the texts and the CSV, alike in every benchmark of quantisers."""
    parser.add_argument("model", type=Path)
    parser.add_argument("--wheel", type=Path, required=True, help="gensim wheel")
    parser.add_argument("--samples", type=int, default=16, help="for the calibration")
    parser.add_argument("--eval-samples", type=int, default=eval_samples)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--csv", type=Path)


def measure(args: argparse.Namespace, done: set[str]) -> Iterator[dict[str, Any]]:
    import torch

    from vllm_nvfp4.testing.engine import plain_model, reference_model

    with tempfile.TemporaryDirectory() as temporary:
        other = Path(temporary) / "calibration.txt"
        samples = texts_of(args, other)
        base, reference = scores_of(plain_model(args.model, torch.float32), samples, None)
        if "bf16" not in done:
            size = {"bits_per_weight": 16.0, "match": True}
            yield {"method": "bf16", **compared(base, base), **size}
        for method in args.methods:
            if method in done:
                continue
            options = []
            if method not in ("rtn", "mse"):
                options = ["--calibration", args.calibration or str(other)]
                options += ["--samples", str(args.samples)]
            target = Path(temporary) / method
            cost = quantize(args.model, target, method, options)
            model = reference_model(target, torch.float32)
            scores, _ = scores_of(model, samples, reference)
            match = stored_matches(target, method, args.model)
            yield {"method": method, **compared(scores, base), **cost, "match": match}


def show(row: dict[str, Any]) -> None:
    cells = [f"{row['method']:>8}", f"ppl {row['ppl']:7.3f}"]
    cells += [f"x {row['ppl_ratio']:.4f} +- {row['ppl_ratio_se']:.4f}"]
    cells += [f"kl {row['kl']:.4f}", f"top-1 {row['top1']:.3f}"]
    if "cpu_s" in row:
        cells += [f"{row['cpu_s']:6.1f} s CPU, {row['wall_s']:.1f} s at load {row['load']:.0f}"]
        cells += [f"{row['peak_mib']:.0f} MiB"]
    print(" | ".join(cells), "|", "match" if row["match"] else "MISMATCH", flush=True)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run, [] where there is none."""
    if not path.is_file():
        return []
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def write_csv(path: Path, rows: list[dict[str, Any]], notes: list[tuple[str, str]]) -> None:
    with path.open("w", newline="") as file:
        for name, value in notes:
            file.write(f"# {name}: {value}\n")
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_text_arguments(parser, eval_samples=16)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--calibration", help="FILE or builtin, instead of the other articles")
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    notes = common.header()
    commit = dict(notes)["commit"]
    notes += text_notes(args, args.calibration) if args.calibration else text_notes(args)
    for name, value in notes:
        print(f"{name}: {value}")
    rows = read_csv(args.csv) if args.csv else []
    for row in measure(args, {row["method"] for row in rows}):
        rows.append({**row, "commit": commit})
        show(row)
        if args.csv:
            write_csv(args.csv, rows, notes)
    return 0 if all(str(row["match"]) == "True" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
