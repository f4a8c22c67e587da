# SPDX-License-Identifier: Apache-2.0
"""One configuration to run, why, and the command that runs it."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace

from vllm_nvfp4.gpus import Gpu
from vllm_nvfp4.options import METHOD_NAME
from vllm_nvfp4.planning import fit as fitting
from vllm_nvfp4.planning.fit import Fit, Load, Setup
from vllm_nvfp4.planning.model import AS_STORED
from vllm_nvfp4.planning.shapes import ATTENTION_PATTERN, DecoderShape

ACCURACIES = ("usual", "high")
BASELINE_GPU = "A100-SXM4-80GB"
# Where vLLM's attention reads an FP8 KV cache.
_FP8_KV_ARCH = 89
_KV_WORDS = {4: "NVFP4", 8: "FP8", 16: "16-bit"}
_KV_FLAGS = {4: "nvfp4", 8: "fp8", 16: "bfloat16"}


@dataclass(frozen=True)
class Choice:
    """The recommended configuration and the reason for it, one sentence."""

    found: Fit
    reason: str


def kv_bits_of(gpu: Gpu) -> int:
    """8 where attention on the card reads FP8 keys and values, else 16."""
    return 8 if gpu.arch >= _FP8_KV_ARCH else 16


def choose(shape: DecoderShape, load: Load, gpu: Gpu, accuracy: str, base: Setup) -> Choice | None:
    """The first of these that fits, fewest cards first; None if nothing does on eight cards.

    usual: NVFP4 everywhere but lm_head and embedding; those in FP8 where only that makes it fit
    high:  attention's layers in 16 bits, the rest in NVFP4
    Both with FP8 keys and values where the card can. A quantised checkpoint is run as it is.

    base: what the user fixed; its lm_head, embedding and KV bits stand where they are not "keep"
    """
    kv_words = f"{_KV_WORDS[base.kv_bits]} KV cache"
    usual = replace(base, fmt=AS_STORED if shape.stored else "nvfp4")
    if accuracy == "high" and not shape.stored:
        what = f"attention in 16 bits, the rest in NVFP4, {kv_words}: accuracy asked is high"
        candidates = [(replace(usual, attention="bf16"), what)]
    else:
        what, why = "plain NVFP4", "4.5 bits per weight, the usual accuracy"
        if shape.stored:
            what, why = "the checkpoint as it is", "its layers are quantised already"
        candidates = [(usual, f"{what}, {kv_words}: {why}")]
        if "keep" in (base.lm_head, base.embedding):
            small = replace(
                usual,
                lm_head="fp8" if base.lm_head == "keep" else base.lm_head,
                embedding=_small_embedding(shape, base),
            )
            why = "lm_head and embedding in FP8, since 16-bit ones leave no room"
            candidates.append((small, f"{what}, {kv_words}; {why}"))
    for cards in fitting.CARD_COUNTS:
        for setup, reason in candidates:
            if not fitting.cards_that_can_share(shape, cards, setup.fmt):
                continue
            found = fitting.fit(shape, replace(setup, cards=cards), load, gpu)
            if found.is_fit:
                many = "" if cards == 1 else f"; fewer than {cards} cards do not hold it"
                return Choice(found, reason + many)
    return None


def _small_embedding(shape: DecoderShape, base: Setup) -> str:
    if base.embedding != "keep":
        return base.embedding
    # A tied weight has one format, which lm_head's option already sets.
    return base.lm_head if shape.tie_word_embeddings and base.lm_head != "keep" else "fp8"


# Sequences at once that a command allows where they fit: more gains little, and each takes logits.
_SEQUENCES = 64


def serve_command(shape: DecoderShape, found: Fit, load: Load, most_sequences: int) -> str:
    """The ``vllm-nvfp4 serve`` line of a configuration, quoted for a shell.

    An NVFP4 checkpoint is named where one is known and the configuration is its own; else the
    16-bit model, which is quantised while it loads.
    most_sequences: of the context asked for that fit at once; the line allows them
    """
    setup = found.setup
    # At least two: one alone makes a second request wait for the whole answer to the first.
    sequences = max(load.concurrency, min(most_sequences, _SEQUENCES), 2)
    options: dict[str, object] = {
        key: value
        for key, value in (("lm_head", setup.lm_head), ("embedding", setup.embedding))
        if value != "keep"
    }
    if setup.attention:
        options["online_ignore"] = [ATTENTION_PATTERN]
    words = [
        "vllm-nvfp4", "serve", shape.hub if setup.attention else shape.nvfp4 or shape.hub,
        "--max-model-len", str(load.context),
        "--max-num-seqs", str(sequences),
        "--max-num-batched-tokens", str(max(fitting.STEP_TOKENS, sequences)),
        "--gpu-memory-utilization", str(fitting.UTILIZATION),
        "--kv-cache-dtype", _KV_FLAGS[setup.kv_bits],
    ]  # fmt: skip
    if setup.cards > 1:
        words += ["--tensor-parallel-size", str(setup.cards)]
    if shape.has_vision:
        words += ["--language-model-only"]
    if options:
        words += ["--additional-config", json.dumps({METHOD_NAME: options})]
    return shlex.join(words)
