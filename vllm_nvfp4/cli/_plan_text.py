# SPDX-License-Identifier: Apache-2.0
"""A plan as text: every limit with the terms that it follows from."""

from __future__ import annotations

from vllm_nvfp4.gpus import Gpu
from vllm_nvfp4.planning.choose import Choice
from vllm_nvfp4.planning.fit import UTILIZATION
from vllm_nvfp4.planning.model import Roofline
from vllm_nvfp4.planning.rows import Asked, Row
from vllm_nvfp4.planning.shapes import DecoderShape


def print_plan(asked: Asked, gpu: Gpu, rows: list[Row], cards: list[Row]) -> None:
    """Memory by format, the limits with their terms, and the table of cards if there is one."""
    load, setup = asked.load, rows[0].found.setup
    memory = f"{gpu.cuda_gib} GiB" if gpu.cuda_gib else f"{gpu.memory_gb} GB"
    print(
        f"{asked.shape.name} on {gpu.name}: {memory}, of which {UTILIZATION:.0%}, "
        f"{rows[0].found.budget / 1e9:.2f} GB, usable; {load.concurrency} x {load.context} tokens, "
        f"{setup.kv_bits}-bit KV cache, lm_head {setup.lm_head}, embedding {setup.embedding}\n"
    )
    print("GB on each card  linear lm_head  embed  other     KV  rest*  total  cards  "
          "longest context  sequences")  # fmt: skip
    for row in rows:
        parts = row.found.weights
        sizes = (parts.linear, parts.lm_head, parts.embedding, parts.other, row.found.kv,
                 row.found.overhead, row.found.total)  # fmt: skip
        text = " ".join(f"{size / 1e9:6.2f}" for size in sizes)
        fits = f"{row.cards}" if row.cards else "> 8"
        print(f"{row.found.setup.fmt:15} {text}  {fits:>5}  {row.longest_context:15}  "
              f"{row.most_sequences:9}")  # fmt: skip
    print("* activations, graphs and CUDA context: an estimate. cards: the fewest that hold it.\n")
    print("Limits, tokens / max(memory, arithmetic); nothing runs faster")
    for row in rows:
        _print_limits(row, f"{row.cards or 1} x {row.found.setup.fmt}")
    if cards:
        print("\ncard                      cards  decode tok/s  bound      prefill tok/s      W")
        for row in cards:
            if row.cards is None:
                print(f"{row.gpu.name:26}  > 8")
                continue
            print(
                f"{row.gpu.name:26} {row.cards:4} {row.decode.tokens_per_s:13.1f}  "
                f"{row.decode.bound:9} {row.prefill.tokens_per_s:14.0f} "
                f"{row.cards * row.gpu.tdp_w:6.0f}"
            )


def _print_limits(row: Row, name: str) -> None:
    for kind, step in (("decode", row.decode), ("prefill", row.prefill)):
        print(f"  {name:10} {kind:7} {terms(step)}")


def terms(step: Roofline) -> str:
    """The limit of one step and everything that it is computed from."""
    return (
        f"{step.tokens_per_s:8.1f} tok/s, {step.bound}: {step.tokens} / max("
        f"({step.weight_bytes / 1e9:.3f} + {step.kv_bytes / 1e9:.3f} GB) / {step.gbps:g} GB/s, "
        f"{step.linear_flops / 1e12:.4f} / {step.linear_tflops:g} + "
        f"{step.other_flops / 1e12:.4f} / {step.other_tflops:g} TFLOP)"
    )


def print_costs(asked: Asked, rows: list[Row]) -> None:
    """Cost of the recommendation and of BF16 on A100s, at the limit of decoding."""
    print("\nCost, every token at the limit of decoding; --price or --buy sets your own")
    for row in rows:
        setup = row.found.setup
        name = f"{row.cards or 1} x {row.gpu.name}, {setup.fmt}"
        if row.cards is None:
            print(f"  {row.gpu.name}, {setup.fmt}: eight cards do not hold it")
        elif row.cost is None:
            print(f"  {name}: no price is known; give --price or --buy")
        else:
            print(
                f"  {name}: ${row.cost.per_h:.3f}/h, ${row.cost.per_month:,.0f} a month, "
                f"${row.dollars_per_million:.3f} per million tokens, up to {row.cost.watts:.0f} W "
                f"({row.cost.basis})"
            )


def print_choice(shape: DecoderShape, choice: Choice | None, command: str | None) -> None:
    print()
    if choice is None:
        print("Recommended: nothing, eight of these cards do not hold it in NVFP4; ask for less "
              "--context or --concurrency, or another --gpu.")  # fmt: skip
        return
    cards = choice.found.setup.cards
    print(f"Recommended: {cards} card{'s' if cards > 1 else ''}, {choice.reason}.")
    if shape.has_vision:
        print("The vision tower is not part of the plan.")
    print(f"  {command}")
