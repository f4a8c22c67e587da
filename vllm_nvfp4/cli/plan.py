# SPDX-License-Identifier: Apache-2.0
"""``vllm-nvfp4 plan MODEL``: what fits on a card, how fast it can be at best, what it costs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_nvfp4.cli import _plan_text
from vllm_nvfp4.cli._arguments import number, tokens, whole
from vllm_nvfp4.cli._files import check_can_write
from vllm_nvfp4.cli._online import ask_online
from vllm_nvfp4.gpus import Gpu
from vllm_nvfp4.planning import choose as choosing
from vllm_nvfp4.planning import rows as planning
from vllm_nvfp4.planning import vllm_kv
from vllm_nvfp4.planning.cards import find_card
from vllm_nvfp4.planning.find import find_shape, models
from vllm_nvfp4.planning.fit import Load, Setup
from vllm_nvfp4.planning.kv import nvfp4_obstacle
from vllm_nvfp4.planning.model import EMBEDDING_FORMATS
from vllm_nvfp4.planning.shapes import DecoderShape, Kept
from vllm_nvfp4.serving.progress import step

# Of the object that --json prints: docs/json.md.
SCHEMA = 1
_DOLLARS = number(what="dollars")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="memory, best speed and cost of a model on a card, from its configuration",
        description="Memory as the loader and the KV cache take it, the roofline of decoding and "
        "prefill, cost, and one configuration to run; from config.json, or from headers for a "
        "family that is not known. Built-in models: "
        f"{', '.join(models())}.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a built-in model, or a hub name")
    parser.add_argument("--gpu", default="RTX 4090", help="the card (default: RTX 4090)")
    parser.add_argument(
        "--context", type=tokens, help="tokens per sequence, such as 16k (default: 8192)"
    )
    parser.add_argument(
        "--concurrency", type=whole(), default=1, help="sequences at once (default: 1)"
    )
    parser.add_argument(
        "--prompt", type=tokens, help="tokens of a prompt, for the speed of prefill (default: 2048)"
    )
    parser.add_argument("--accuracy", choices=choosing.ACCURACIES, default="usual",
                        help="usual: plain NVFP4; high: attention stays in 16 bits")  # fmt: skip
    parser.add_argument("--kv-bits", type=int, choices=(4, 8, 16),
                        help="of the KV cache: 16, 8 for FP8 (default where the card can), "
                        "4 for NVFP4, which vLLM 0.32 and later have")  # fmt: skip
    for part in ("lm-head", "embedding"):
        parser.add_argument(f"--{part}", choices=EMBEDDING_FORMATS, default="keep",
                            help=f"format of {part} (default: keep, as stored)")  # fmt: skip
    price = parser.add_mutually_exclusive_group()
    price.add_argument("--price", type=_DOLLARS, metavar="USD", help="rent of one card, per hour")
    price.add_argument(
        "--buy", type=_DOLLARS, metavar="USD", help="price of one card that is used for 3 years"
    )
    parser.add_argument(
        "--electricity",
        type=_DOLLARS,
        default=0.15,
        metavar="USD",
        help="per kWh, for a card that was bought (default: 0.15)",
    )
    parser.add_argument(
        "--all-cards", action="store_true", help="also show the recommendation on every known card"
    )
    parser.add_argument("--details", action="store_true",
                        help="memory by part, every limit's formula, sources")  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write pictures into this folder")
    parser.add_argument("--plot-format", choices=("png", "svg", "pdf"), default="png",
                        help="of the pictures (default: png)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the plan; 0. Raises ValueError for wrong input."""
    if args.plot:
        check_can_write("--plot", args.plot, is_folder=True)
    gpu = find_card(args.gpu)
    shape = find_shape(args.model, _ask_vllm, ask_online)
    asked = _asked(args, shape)
    kv_bits = args.kv_bits or choosing.kv_bits_of(gpu)
    if kv_bits == 4 and (obstacle := nvfp4_obstacle(shape)):
        raise ValueError(f"--kv-bits 4: vLLM has no NVFP4 KV cache for {shape.name}: {obstacle}.")
    base = Setup(lm_head=args.lm_head, embedding=args.embedding, kv_bits=kv_bits)
    choice = choosing.choose(shape, asked.load, gpu, args.accuracy, base)
    setup = choice.found.setup if choice else None
    rows = planning.format_rows(asked, base, gpu, setup)
    chosen = rows[0] if choice else None
    cards = planning.card_rows(asked, setup or base) if args.all_cards or args.json else []
    # The same cards in BF16, as many as that needs; and what BF16 is often served on.
    same = planning.row_of(asked, Setup(fmt="bf16", kv_bits=base.kv_bits), gpu)
    baseline = planning.row_of(
        asked, Setup(fmt="bf16", kv_bits=16), find_card(choosing.BASELINE_GPU), False
    )
    command = None
    if chosen and choice:
        command = choosing.serve_command(shape, choice.found, asked.load, chosen.most_sequences)
    # The pictures first: a reader of the text (head, less) may be gone before its end.
    drawn: list[Path] = []
    if args.plot:
        from vllm_nvfp4.cli import _plan_pictures

        drawn = _plan_pictures.draw(args.plot, asked, gpu, rows, same, args.plot_format)
    if args.json:
        value = _head(asked, gpu) | {
            "formats": [row.to_json() for row in rows],
            "options": planning.option_rows(asked, gpu),
            "cards": [row.to_json() for row in cards],
            "recommended": chosen and chosen.to_json(),
            "reason": choice and choice.reason,
            "warning": "little spare memory" if chosen and chosen.is_tight else None,
            "command": command,
            "bf16_on_the_same_card": same.to_json(),
            "bf16_on_a100": baseline.to_json(),
            "pictures": [str(path) for path in drawn],
        }
        print(json.dumps(value, indent=2))
        return 0
    _plan_text.print_plan(asked, gpu, rows, cards)
    if args.details:
        _plan_text.print_details(asked, gpu, rows)
    compared = [*([chosen] if chosen else []), same, *([baseline] if args.details else [])]
    _plan_text.print_costs(compared)
    _plan_text.print_choice(asked, choice, chosen, command)
    for path in drawn:
        print(path)
    return 0


def _ask_vllm(config: Mapping[str, Any]) -> tuple[Kept, ...]:
    """What vLLM's own model keeps of a sequence; its import takes a while."""
    if not vllm_kv.is_vllm_here():
        return ()
    with step("Asking vLLM what each layer keeps of a sequence", sys.stderr):
        kept = vllm_kv.ask_vllm(config)
    if not kept:
        print("vllm-nvfp4 plan: this vLLM does not build the model: its cache is computed from "
              "config.json", file=sys.stderr)  # fmt: skip
    return kept


def _asked(args: argparse.Namespace, shape: DecoderShape) -> planning.Asked:
    context = min(8192, shape.max_context) if args.context is None else args.context
    if not 1 <= context <= shape.max_context:
        raise ValueError(f"--context {context}: {shape.name} takes 1 to {shape.max_context}.")
    prompt = min(2048, context) if args.prompt is None else args.prompt
    if not 1 <= prompt <= context:
        raise ValueError(f"--prompt {prompt}: needs 1 to {context}, the context.")
    if shape.tie_word_embeddings and len({args.lm_head, args.embedding} - {"keep"}) > 1:
        raise ValueError(
            f"--lm-head {args.lm_head} --embedding {args.embedding}: {shape.name} has one tensor "
            "for both; set only one of the two, or both to the same format."
        )
    load = Load(context, args.concurrency)
    return planning.Asked(shape, load, prompt, args.electricity, args.price, args.buy)


def _head(asked: planning.Asked, gpu: Gpu) -> dict[str, Any]:
    shape = asked.shape
    return {
        "schema": SCHEMA,
        "basis": planning.BASIS,
        "model": shape.name,
        "hub": shape.hub,
        "gpu": gpu.name,
        "gpu_source": f"{gpu.source}; entered {gpu.date}",
        "gpu_memory_source": gpu.cuda_source,
        "context": asked.load.context,
        "concurrency": asked.load.concurrency,
        "prompt": asked.prompt,
        "max_context": shape.max_context,
        "notes": list(shape.notes),
        "four_bit_paths": _plan_text.four_bit_paths(asked, gpu),
        "checkpoint_bytes": planning.checkpoint_sizes(shape),
    }
