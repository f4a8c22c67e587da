# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts to measure quantisers on, made of a small dense model.

    python benchmarks/make_upcycled_moe.py MODEL OUT --wheel gensim-4.4.0-*.whl

MODEL is a 16-bit Llama (SmolLM2-135M). OUT is of transformers' class Glm4Moe, whose attention is
Llama's: the layers before --first-moe as they are; in the others, half of the MLP's neurons become
the shared expert, and the other half is copied into 8 routed experts, 2 a token. Up to here the
model computes what MODEL does. A router's rows are the centres of 8 clusters of its inputs, found
by spherical k-means without the mean's direction, so that each expert has a slice of the tokens of
its own, and a bias of the choice keeps the slices of a size; then the routed experts alone are
trained as a language model (AdamW), each on the tokens that it gets, which pulls them apart. The
text is every fourth Wikipedia article of the gensim wheel, from the second on:
bench_quantize_moe.py measures and calibrates on the others. Seeds are
fixed. The last lines say how far apart the experts are and how the tokens divide over them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import bench_quantize
import common
import torch

NUM_EXPERTS, TOP_K = 8, 2
# What becomes of the texts of the wheel: [start::step] of its articles.
EVALUATION, TRAINING, CALIBRATION = (slice(0, None, 2), slice(1, None, 4), slice(3, None, 4))
_LENGTH = 256
_CLUSTER_TOKENS = 64 * _LENGTH
_CLUSTER_ROUNDS = 20
# As DeepSeek-V3 balances: the bias that a router adds before it chooses grows for an expert with
# too few tokens.
_BALANCE_ROUNDS, _BALANCE_STEP = 400, 0.004
# Of a router's logits: weights of the two experts are then apart, and both count.
_LOGIT_DEVIATION = 1.5


def upcycled(dense: Any, first_moe: int) -> Any:
    """The mixture, float32; its routers are zero."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    kept = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "hidden_act"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "head_dim"),
    )
    source = dense.config
    half = source.intermediate_size // 2
    config = Glm4MoeConfig(
        **{name: getattr(source, name) for name in kept},
        rope_parameters={**source.rope_parameters, "partial_rotary_factor": 1.0},
        partial_rotary_factor=1.0,
        moe_intermediate_size=half,
        num_experts_per_tok=TOP_K,
        n_routed_experts=NUM_EXPERTS,
        n_shared_experts=1,
        first_k_dense_replace=first_moe,
        num_nextn_predict_layers=0,
    )
    model = Glm4MoeForCausalLM(config).float()
    state = {}
    for name, value in dense.state_dict().items():
        layer, _, leaf = name.removeprefix("model.layers.").partition(".mlp.")
        if not leaf or int(layer) < first_moe:
            state[name] = value
            continue
        columns = int(leaf.startswith("down"))
        shared, routed = value.split(half, columns)
        state[name.replace(".mlp.", ".mlp.shared_experts.")] = shared
        stack = f"model.layers.{layer}.mlp.experts."
        if columns:
            state[f"{stack}down_proj"] = routed.expand(NUM_EXPERTS, -1, -1)
        else:
            state.setdefault(f"{stack}gate_up_proj", [None, None])[leaf.startswith("up")] = routed
    for name, value in state.items():
        if isinstance(value, list):
            state[name] = torch.cat(value).expand(NUM_EXPERTS, -1, -1)
    report = model.load_state_dict(state, strict=False)
    rest = [n for n in report.missing_keys if ".gate." not in n]
    if rest or report.unexpected_keys:
        raise SystemExit(f"no value for {rest}, no place for {report.unexpected_keys}")
    return model.eval().requires_grad_(False)


def routers(model: Any) -> list[tuple[Any, Any]]:
    """(The mixture, its router) of each layer that has one."""
    return [(m, m.gate) for m in model.modules() if hasattr(m, "gate") and hasattr(m, "experts")]


def divide(model: Any, samples: torch.Tensor) -> None:
    """Give each router the centres of clusters of its inputs, in place."""
    inputs: dict[Any, list[torch.Tensor]] = {mixture: [] for mixture, _ in routers(model)}
    hooks = [
        mixture.register_forward_pre_hook(lambda m, args: inputs[m].append(args[0].flatten(0, 1)))
        for mixture in inputs
    ]
    with torch.inference_mode():
        for part in samples.split(4):
            model.model(input_ids=part)
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(0)
    for mixture, router in routers(model):
        x = torch.cat(inputs[mixture])
        mean = torch.nn.functional.normalize(x.mean(0), dim=0)
        x = x - (x @ mean)[:, None] * mean
        unit = torch.nn.functional.normalize(x, dim=1)
        centre = unit[torch.randperm(len(unit), generator=generator)[:NUM_EXPERTS]]
        for _ in range(_CLUSTER_ROUNDS):
            nearest = (unit @ centre.T).argmax(1)
            one_hot = torch.nn.functional.one_hot(nearest, NUM_EXPERTS).float()
            found = torch.nn.functional.normalize(one_hot.T @ unit, dim=1)
            centre = torch.where(one_hot.sum(0)[:, None] > 0, found, centre)
        router.weight.copy_(centre * (_LOGIT_DEVIATION / (x @ centre.T).std()))
        scores = (x @ router.weight.T).sigmoid()
        for _ in range(_BALANCE_ROUNDS):
            chosen = (scores + router.e_score_correction_bias).topk(TOP_K).indices
            share = torch.bincount(chosen.flatten(), minlength=NUM_EXPERTS) / chosen.numel()
            router.e_score_correction_bias += _BALANCE_STEP * (1 / NUM_EXPERTS - share).sign()


def train(model: Any, samples: torch.Tensor, args: argparse.Namespace) -> None:
    """Train the routed experts as a language model, in place: products in BF16, weights float32."""
    weights = [p for mixture, _ in routers(model) for p in mixture.experts.parameters()]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    started = time.monotonic()
    for step in range(args.steps):
        factor = min(1.0, (step + 1) / 10, 2 * (args.steps - step) / args.steps)
        for group in optimizer.param_groups:
            group["lr"] = args.rate * factor
        tokens = samples[torch.randint(len(samples), (args.batch,), generator=generator)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 or step + 1 == args.steps:
            print(f"step {step}: loss {loss:.3f}, {time.monotonic() - started:.0f} s", flush=True)
    model.requires_grad_(False)


def describe(model: Any, samples: torch.Tensor) -> None:
    """Print how far the experts are from their mean, and each layer's shares of the tokens."""
    counts: dict[Any, torch.Tensor] = {}

    def count(router: Any, args: Any, output: Any) -> None:
        counts[router] = torch.bincount(output[2].flatten(), minlength=NUM_EXPERTS)

    hooks = [router.register_forward_hook(count) for _, router in routers(model)]
    with torch.inference_mode():
        model.model(input_ids=samples[:: max(1, len(samples) // 16)])
    for hook in hooks:
        hook.remove()
    for mixture, router in routers(model):
        stack = mixture.experts.down_proj
        mean = stack.mean(0)
        distance = float((stack - mean).norm(dim=(1, 2)).mean() / mean.norm())
        shares = (100 * counts[router] / counts[router].sum()).round().int().tolist()
        print(f"experts {distance:.3f} of their norm apart; tokens {shares} %")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--wheel", type=Path, required=True, help="gensim wheel")
    parser.add_argument("--first-moe", type=int, default=24, help="layers before it stay dense")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4, help=f"samples of {_LENGTH} tokens")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    args = parser.parse_args()
    for name, value in common.header():
        print(f"{name}: {value}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = "\n\n".join(bench_quantize.articles(args.wheel)[TRAINING])
    tokens = torch.tensor(tokenizer(text, verbose=False).input_ids)
    samples = tokens[: len(tokens) // _LENGTH * _LENGTH].view(-1, _LENGTH)
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model = upcycled(dense, args.first_moe)
    with torch.inference_mode():
        probe = samples[:1]
        model_is_same = torch.allclose(model(probe).logits, dense(probe).logits, atol=1e-2)
    if not model_is_same:
        raise SystemExit("the mixture does not compute what the dense model does")
    divide(model, samples[: _CLUSTER_TOKENS // _LENGTH])
    train(model, samples, args)
    describe(model, samples)
    model.to(torch.bfloat16).save_pretrained(args.target)
    tokenizer.save_pretrained(args.target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
