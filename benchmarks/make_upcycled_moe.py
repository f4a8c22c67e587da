# SPDX-License-Identifier: Apache-2.0
"""Make a mixture of experts of a real dense model, to measure quantisers of experts on.

    python benchmarks/make_upcycled_moe.py SMOLLM2 OUT
    python benchmarks/bench_quantize.py OUT --wheel gensim-4.4.0-*.whl --csv FILE

SMOLLM2 is the 16-bit folder that vllm_nvfp4.testing.smollm2 makes. In every sixth layer its MLP
becomes 8 experts, two a token: each starts as a copy and is trained for some steps, alone, on a
slice of its own of the built-in text. The router sends a token to the experts whose slices had
inputs most like it. The class is Qwen2-MoE's, whose attention is Llama's without biases; its shared
expert, which this model has no use for, is zero. Everything is drawn from one seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vllm_nvfp4.quantize.calibration import Calibration

NUM_EXPERTS, CHOSEN = 8, 2
EVERY = 6
# Of the router's logits over the tokens it is made from: neither one expert alone nor all alike.
SPREAD = 1.5
_SHARED = 16
_DECODER = "model.layers"


def slices(tokenizer: Any, length: int, steps: int) -> torch.Tensor:
    """[experts, steps, length] int64: an eighth of the built-in text for each expert, from its
    beginning and again where it ends."""
    text = Calibration().read()
    tokens = torch.tensor(tokenizer(text, verbose=False).input_ids)
    each = len(tokens) // NUM_EXPERTS
    parts = tokens[: each * NUM_EXPERTS].view(NUM_EXPERTS, each)
    return parts.repeat(1, -(-steps * length // each))[:, : steps * length].unflatten(
        1, (steps, length)
    )


def train(model: Any, layers: list[int], batches: torch.Tensor, rate: float) -> dict[str, Any]:
    """One expert: the MLPs of some layers trained on some batches; the model is as before again.

    Returns the trained weights by name, and by layer the mean of what went into the MLP.
    """
    mlps = {i: model.model.layers[i].mlp for i in layers}
    before = {
        i: {n: p.detach().clone() for n, p in mlp.named_parameters()} for i, mlp in mlps.items()
    }
    means: dict[int, list[torch.Tensor]] = {i: [] for i in layers}
    handles = [
        mlp.register_forward_pre_hook(
            lambda _, args, i=i: means[i].append(args[0].detach().float().flatten(0, -2).mean(0))
        )
        for i, mlp in mlps.items()
    ]
    for p in model.parameters():
        p.requires_grad_(False)
    trained = [p.requires_grad_() for mlp in mlps.values() for p in mlp.parameters()]
    optimizer = torch.optim.Adam(trained, lr=rate)
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch[None], labels=batch[None]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for handle in handles:
        handle.remove()
    after = {
        i: {n: p.detach().clone() for n, p in mlp.named_parameters()} for i, mlp in mlps.items()
    }
    with torch.no_grad():
        for i, mlp in mlps.items():
            for name, parameter in mlp.named_parameters():
                parameter.copy_(before[i][name])
    return {"weights": after, "means": {i: torch.stack(m).mean(0) for i, m in means.items()}}


def router(means: torch.Tensor) -> torch.Tensor:
    """[experts, hidden]: how much a token lies towards the mean of each expert's slice; means:
    [experts, hidden]."""
    towards = means - means.mean(0)
    logits = towards @ towards.T
    return towards * (SPREAD / logits.diagonal().mean())


def build(source: Path, target: Path, steps: int, length: int, rate: float, seed: int) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    dense = model.config
    layers = list(range(EVERY - 2, dense.num_hidden_layers, EVERY))
    batches = slices(AutoTokenizer.from_pretrained(source), length, steps)
    experts = []
    for e in range(NUM_EXPERTS):
        started = time.monotonic()
        experts.append(train(model, layers, batches[e], rate))
        print(
            f"expert {e}: {steps} x {length} tokens, {time.monotonic() - started:.0f} s", flush=True
        )
    state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    for i in layers:
        stem = f"{_DECODER}.{i}.mlp"
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = state.pop(f"{stem}.{name}.weight").shape
            for e in range(NUM_EXPERTS):
                state[f"{stem}.experts.{e}.{name}.weight"] = experts[e]["weights"][i][
                    f"{name}.weight"
                ]
            small = (_SHARED, shape[1]) if name != "down_proj" else (shape[0], _SHARED)
            state[f"{stem}.shared_expert.{name}.weight"] = torch.zeros(small)
        state[f"{stem}.gate.weight"] = router(torch.stack([x["means"][i] for x in experts]))
        state[f"{stem}.shared_expert_gate.weight"] = torch.zeros(1, dense.hidden_size)
    config = Qwen2MoeConfig(
        **{
            name: getattr(dense, name)
            for name in (
                *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
                *("num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps"),
                *("max_position_embeddings", "tie_word_embeddings", "bos_token_id"),
                *("eos_token_id", "pad_token_id", "rope_parameters"),
            )
        },
        qkv_bias=False,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,
        moe_intermediate_size=dense.intermediate_size,
        shared_expert_intermediate_size=_SHARED,
        decoder_sparse_step=1,
        mlp_only_layers=[i for i in range(dense.num_hidden_layers) if i not in layers],
        architectures=["Qwen2MoeForCausalLM"],
    )
    target.mkdir(parents=True)
    save_file(
        {n: t.to(torch.bfloat16).contiguous() for n, t in state.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(target)
    text = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(text | {"dtype": "bfloat16"}, indent=2) + "\n")
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            shutil.copyfile(path, target / path.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.target.exists():
        parser.error(f"{args.target} exists; remove it or choose another folder")
    build(args.source, args.target, args.steps, args.length, args.rate, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
