# SPDX-License-Identifier: Apache-2.0
"""What each method of `vllm-nvfp4 quantize` costs a model, and how long it takes.

    python benchmarks/bench_quantize.py MODEL --wheel gensim-4.4.0-*.whl --csv FILE

MODEL is a folder of 16-bit safetensors. The text is the Wikipedia sample in the gensim wheel (CC
BY-SA; not part of this repository): every second article for the perplexity, the others for the
calibration, unless --calibration says otherwise. Every method sees the same tokens; weights are
dequantised and run in float32 with transformers. ppl_ratio and kl are against MODEL itself, kl the
mean over tokens of KL(MODEL || quantised). seconds is the CPU time of all threads of the command.
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
import zipfile
from pathlib import Path
from typing import Any

import common

METHODS = ("rtn", "mse", "hessian", "gptq")
FIELDS = ("method", "ppl", "ppl_ratio", "kl", "top1", "seconds", "peak_mib", "match")
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


def logits_of(model: Any, samples: Any) -> Any:
    """[num_samples, length, V] float32."""
    import torch

    with torch.inference_mode():
        return torch.cat([model(input_ids=sample[None]).logits.float() for sample in samples])


def compare(logits: Any, reference: Any, samples: Any) -> dict[str, float]:
    """Perplexity, mean KL from the reference and agreement of the most likely token."""
    import torch

    loss, kl, same = 0.0, 0.0, 0
    for mine, theirs, tokens in zip(logits, reference, samples, strict=True):
        log_mine, log_theirs = (torch.log_softmax(x[:-1], -1) for x in (mine, theirs))
        loss -= log_mine.gather(1, tokens[1:, None]).double().sum().item()
        kl += (log_theirs.exp() * (log_theirs - log_mine)).sum(-1).double().sum().item()
        same += int((log_mine.argmax(-1) == log_theirs.argmax(-1)).sum())
    count = samples.shape[0] * (samples.shape[1] - 1)
    ppl = torch.tensor(loss / count, dtype=torch.float64).exp().item()
    return {"ppl": ppl, "kl": kl / count, "top1": same / count}


def quantize(model: Path, target: Path, method: str, options: list[str]) -> tuple[float, float]:
    """(CPU seconds, MiB at the peak) of the command, imports included."""
    command = [sys.executable, "-m", "vllm_nvfp4.cli.main", "quantize", str(model)]
    command += ["-o", str(target), "--method", method, *options]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(common.ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    peak = re.search(r"peak memory (\d+) MiB", done.stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return seconds, float(peak[1]) if peak else float("nan")


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


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    import torch
    from transformers import AutoTokenizer

    from vllm_nvfp4.testing.engine import plain_model, reference_model

    texts = articles(args.wheel)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = tokenizer("\n\n".join(texts[::2]), verbose=False).input_ids
    samples = torch.tensor(tokens[: args.eval_samples * args.length]).view(-1, args.length)
    reference = logits_of(plain_model(args.model, torch.float32), samples)
    base = compare(reference, reference, samples)
    rows = [{"method": "bf16", **base, "ppl_ratio": 1.0, "match": True}]
    show(rows[-1])
    with tempfile.TemporaryDirectory() as temporary:
        other = Path(temporary) / "calibration.txt"
        other.write_text("\n\n".join(texts[1::2]))
        for method in args.methods:
            options = []
            if method in ("hessian", "gptq"):
                options = ["--calibration", args.calibration or str(other)]
                options += ["--samples", str(args.samples)]
            target = Path(temporary) / method
            seconds, peak = quantize(args.model, target, method, options)
            logits = logits_of(reference_model(target, torch.float32), samples)
            found = compare(logits, reference, samples)
            match = stored_matches(target, method, args.model)
            row = {"method": method, **found, "seconds": seconds, "peak_mib": peak, "match": match}
            rows.append(row | {"ppl_ratio": found["ppl"] / base["ppl"]})
            show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    cells = [f"{row['method']:>8}", f"ppl {row['ppl']:7.3f}", f"x {row['ppl_ratio']:.4f}"]
    cells += [f"kl {row['kl']:.4f}", f"top-1 {row['top1']:.3f}"]
    if "seconds" in row:
        cells += [f"{row['seconds']:6.1f} s", f"{row['peak_mib']:.0f} MiB"]
    print(" | ".join(cells), "|", "match" if row["match"] else "MISMATCH", flush=True)


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
    parser.add_argument("model", type=Path)
    parser.add_argument("--wheel", type=Path, required=True, help="gensim wheel")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--calibration", help="FILE or builtin, instead of the other articles")
    parser.add_argument("--samples", type=int, default=16, help="for the calibration")
    parser.add_argument("--eval-samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--csv", type=Path)
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    notes = common.header()
    notes.append(("text", f"{args.wheel.name}, {args.eval_samples} x {args.length} tokens"))
    text = args.calibration or "other articles of the same wheel"
    notes.append(("calibration", f"{text}, {args.samples} x 1024 tokens"))
    for name, value in notes:
        print(f"{name}: {value}")
    rows = measure(args)
    if args.csv:
        write_csv(args.csv, rows, notes)
    return 0 if all(row["match"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
