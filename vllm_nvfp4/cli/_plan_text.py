# SPDX-License-Identifier: Apache-2.0
"""A plan as text for a terminal of 80 columns; formulas and sources only where asked for."""

from __future__ import annotations

import shlex
import textwrap

from vllm_nvfp4.gpus import Gpu
from vllm_nvfp4.kernels.paths import describe_on
from vllm_nvfp4.options import Options
from vllm_nvfp4.planning.choose import Choice
from vllm_nvfp4.planning.fit import CARD_COUNTS, UTILIZATION
from vllm_nvfp4.planning.model import Roofline
from vllm_nvfp4.planning.rows import BASIS, Asked, Row
from vllm_nvfp4.planning.shapes import DecoderShape

WIDTH = 80
_KV = {4: "NVFP4", 8: "FP8", 16: "16-bit"}


def say(text: str, indent: str = "") -> None:
    """A paragraph, wrapped."""
    print(textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent,
                        break_on_hyphens=False, break_long_words=False))  # fmt: skip


def print_plan(asked: Asked, gpu: Gpu, rows: list[Row], cards: list[Row]) -> None:
    """What fits and the limits of every format, the recommendation first; the table of cards."""
    load, setup, count = asked.load, rows[0].found.setup, rows[0].cards
    memory = f"{gpu.cuda_gib} GiB" if gpu.cuda_gib else f"{gpu.memory_gb} GB"
    say(
        f"{asked.shape.name} on {count} x {gpu.name}, each {memory}, of which vLLM may use "
        f"{UTILIZATION:.0%}: {rows[0].found.budget / 1e9:.2f} GB. {load.concurrency} x "
        f"{load.context} tokens at once, {_KV[setup.kv_bits]} KV cache. Speeds: {BASIS}."
    )
    print(f"\n{'':19}GB on each card        {'free':>6}  tok/s, at most  longest  at")
    print(f"{'':19}weights     KV  total         decode  prefill  context once")
    for row in rows:
        print(_line(row))
    mark = "> recommended. " if rows[0].is_recommended else ""
    say(f"{mark}total: with an estimate for activations, graphs and CUDA. decode: all sequences "
        f"together. prefill: a prompt of {asked.prompt} tokens.")  # fmt: skip
    for kind, path in four_bit_paths(asked, gpu).items():
        say(f"{kind}: {path}.")
    if cards:
        print(f"\n{'The recommendation on other cards':33} cards  decode  prefill bound by     W")
        for row in cards:
            print(_card_line(row))


def four_bit_paths(asked: Asked, gpu: Gpu) -> dict[str, str]:
    """Kind of four-bit layers -> which kernel runs them on the card, and why."""
    options = Options()
    paths = {"4-bit linear layers": describe_on(gpu, options)}
    if asked.shape.num_experts:
        paths["4-bit experts"] = describe_on(gpu, options, are_experts=True)
    return paths


def _line(row: Row) -> str:
    parts = row.found.weights
    mark = ">" if row.is_recommended else " "
    sizes = (parts.total, row.found.kv, row.found.total)
    text = f"{mark}{row.label:18.18}" + "".join(f"{size / 1e9:7.2f}" for size in sizes)
    if row.obstacle:
        return f"{text}  {row.obstacle}"
    return (
        f"{text}{row.spare:8.0%}{row.decode.tokens_per_s:9.1f}{row.prefill.tokens_per_s:9.0f}"
        f"{row.longest_context:9}{row.most_sequences:5}"
    )


def _card_line(row: Row) -> str:
    if row.obstacle:
        return f"{row.gpu.name:33} {row.obstacle}"
    watts = f"{row.cards * row.gpu.tdp_w:6.0f}" if row.gpu.tdp_w else "     ?"
    return (
        f"{row.gpu.name:33} {row.cards:5} {row.decode.tokens_per_s:7.1f} "
        f"{row.prefill.tokens_per_s:8.0f} {row.decode.bound:8} {watts}"
    )


def print_details(asked: Asked, gpu: Gpu, rows: list[Row]) -> None:
    """The memory by part, and every limit with the terms that it follows from."""
    print("\nGB on each card      linear lm_head  embed  other     KV  rest*  total")
    for row in rows:
        parts = row.found.weights
        sizes = (parts.linear, parts.lm_head, parts.embedding, parts.other, row.found.kv,
                 row.found.overhead, row.found.total)  # fmt: skip
        print(f"{row.label:20.20}" + "".join(f"{size / 1e9:7.2f}" for size in sizes))
    print("* activations, graphs and CUDA context: an estimate.")
    print("\ntok/s = tokens / max(bytes / bandwidth, arithmetic / rate)")
    for row in rows:
        for kind, step in (("decode", row.decode), ("prefill", row.prefill)):
            print(f"  {row.label}, {kind}, bound by {step.bound}:")
            print(textwrap.fill(terms(step), WIDTH, initial_indent="    ",
                                subsequent_indent="      ", break_on_hyphens=False))  # fmt: skip
    print()
    say(f"{gpu.name}: {gpu.source}; entered {gpu.date}. {gpu.cuda_source}")


def terms(step: Roofline) -> str:
    """The limit of one step and everything that it is computed from."""
    return (
        f"{step.tokens_per_s:.1f} tok/s = {step.tokens} / max("
        f"({step.weight_bytes / 1e9:.3f} + {step.kv_bytes / 1e9:.3f} GB) / {step.gbps:g} GB/s, "
        f"{step.linear_flops / 1e12:.4f} / {step.linear_tflops:g} + "
        f"{step.other_flops / 1e12:.4f} / {step.other_tflops:g} TFLOP)"
    )


def print_costs(rows: list[Row]) -> None:
    """Dollars at the limit of decoding: of the recommendation, and of what it is compared with."""
    print(f"\nCost at the limit of decoding, an {BASIS};\n--price or --buy sets yours")
    for row in rows:
        name = f"{row.label} on {row.cards} x {row.gpu.name}"
        if row.obstacle:
            print(f"  {name}\n    {row.obstacle}")
        elif row.cost is None:
            print(f"  {name}\n    no price is known; give --price or --buy")
        else:
            print(f"  {name}\n    ${row.dollars_per_million:.3f} per million tokens")
            say(
                f"${row.cost.per_h:.3f}/h, ${row.cost.per_month:,.0f} a month, up to "
                f"{row.cost.watts:.0f} W; {row.cost.basis}",
                "    ",
            )


def print_choice(
    asked: Asked, choice: Choice | None, chosen: Row | None, command: str | None
) -> None:
    """The recommendation, its reason, a warning where it is tight, and the line to run."""
    print()
    if choice is None or chosen is None or command is None:
        say(f"Recommended: nothing. {CARD_COUNTS[-1]} of these cards do not hold it in NVFP4; ask "
            "for less --context or --concurrency, or another --gpu.")  # fmt: skip
        return
    say(f"Recommended: {chosen.cards} x {chosen.gpu.name}, {choice.reason}.")
    if chosen.is_tight:
        say(
            f"Warning: only {chosen.spare:.1%} of the memory is spare, and the estimate of "
            "activations and graphs may be off by more. If vLLM runs out of memory, ask for less "
            "--context or --concurrency, or quantise lm_head and embedding: --lm-head fp8."
        )
    for assumed in asked.shape.notes:
        say(assumed)
    if asked.shape.has_vision:
        say("The vision tower is not part of the plan.")
    if note := _where_from(asked.shape, chosen):
        say(note)
    print(wrapped_command(command))


def _where_from(shape: DecoderShape, chosen: Row) -> str:
    if shape.stored or chosen.found.setup.attention:
        return ""
    if shape.nvfp4:
        return f"{shape.nvfp4} is an NVFP4 checkpoint of {shape.hub}."
    return f"No NVFP4 checkpoint of {shape.hub} is known here: it is quantised while it loads."


def wrapped_command(command: str) -> str:
    """A command line over several lines that a shell takes as one, flags with their values."""
    groups: list[str] = []
    for word in map(shlex.quote, shlex.split(command)):
        is_value = groups and groups[-1].startswith("-") and " " not in groups[-1]
        if (is_value and not word.startswith("-")) or len(groups) == 0:
            groups = [*groups[:-1], f"{groups[-1]} {word}"] if is_value else [word]
        else:
            groups.append(word)
    lines = ["  "]
    for group in groups:
        if len(lines[-1]) + len(group) + 3 > WIDTH and lines[-1].strip():
            lines[-1] += "\\"
            lines.append("    ")
        lines[-1] += f"{group} "
    return "\n".join(line.rstrip() for line in lines)
