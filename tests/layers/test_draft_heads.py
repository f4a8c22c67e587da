# SPDX-License-Identifier: Apache-2.0
"""Heads for multi-token prediction in the target's own file, in whatever form each layer is stored.

The right head is always taken, the wrong one nearly never, and the tokens are those that the tables
tell: a layer that was loaded wrongly, of the head or of the target, shows in one or the other.
"""

from collections import Counter

import pytest
from stored_forms import store

from vllm_nvfp4.layers import experts_loading
from vllm_nvfp4.testing.architectures import ARCHITECTURES, DRAFTS, write_architecture
from vllm_nvfp4.testing.checkpoints import edit_json, edit_tensors
from vllm_nvfp4.testing.drafts import hand_on_the_embedding, make_predictable
from vllm_nvfp4.testing.model_sweep import PROMPT
from vllm_nvfp4.testing.sweep_features import ask

pytestmark = pytest.mark.vllm

NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
# What tools leave in 16 bits: tables, routers, mixers, pictures.
KEPT = ("embed", "head", "norm", "mlp.gate", "mixer.gate", "linear_attn", "visual", "conv1d")
OF_HEADS = ("mtp.", "model.layers.2.")


def write_with_head(folder, name, target, head, first, is_right=True):
    """A model with a draft layer, and what comes after each token.

    target, head: forms of the weights of either;  first: of the head's first projection
    """
    draft, following = DRAFTS[name], {}

    def edit(tensors):
        draft.add(tensors)
        following.update(make_predictable(tensors))
        if is_right:
            hand_on_the_embedding(tensors)

    def form_of(layer):
        if layer.endswith(("mtp.fc", "eh_proj")):
            return first
        if any(part in layer for part in KEPT):
            return "bf16"
        return head if layer.startswith(OF_HEADS) else target

    write_architecture(folder, ARCHITECTURES[name])
    edit_json(folder / "config.json", draft.settings)
    edit_tensors(folder, edit)
    return store(folder, form_of, NVFP4), following


def told(following, count):
    tokens = [PROMPT[-1]]
    for _ in range(count):
        tokens.append(following[tokens[-1]])
    return tokens[1:]


@pytest.mark.parametrize(
    ("name", "target", "head", "first"),
    [
        ("glm4-moe", "nvfp4", "bf16", "bf16"),
        ("glm4-moe", "nvfp4", "nvfp4", "ct"),
        # Experts that are widened, of the head and of a target that is loaded before it.
        ("glm4-moe", "fp8", "fp8block", "fp8block"),
        ("deepseek-v3", "nvfp4", "nvfp4", "nvfp4"),
        ("qwen3.5", "nvfp4", "nvfp4", "fp8"),
        ("qwen3-next", "nvfp4", "fp8", "nvfp4"),
        ("nemotron-h-moe", "nvfp4", "nvfp4", "fp8"),
        ("nemotron-h-moe", "nvfp4", "nvfp4", "nvfp4"),
        # Experts without a gate, for which vLLM has no kernel on a CPU: widened, and in 16 bits.
        ("nemotron-h-moe", "nvfp4", "fp8", "nvfp4"),
        ("nemotron-h-moe", "nvfp4", "bf16", "bf16"),
    ],
)
def test_the_right_head_is_always_taken(name, target, head, first, tmp_path, monkeypatch):
    taken_by_hand = Counter()
    take = experts_loading._Module.take

    def count(module, tensor, value):
        taken_by_hand[tensor] += 1
        take(module, tensor, value)

    monkeypatch.setattr(experts_loading._Module, "take", count)
    folder, following = write_with_head(tmp_path, name, target, head, first)
    tokens, (taken, drafted) = ask(folder, ARCHITECTURES[name].dtype, "mtp")
    assert tokens == told(following, len(tokens))
    assert taken == drafted >= len(tokens) // 2
    # The files are read for the target and for its head: no layer takes its tensors twice.
    assert set(taken_by_hand.values()) <= {1}
    assert bool(taken_by_hand) == any(form.startswith("fp8") for form in (target, head))


def test_the_wrong_head_is_not(tmp_path):
    folder, following = write_with_head(tmp_path, "glm4-moe", "nvfp4", "nvfp4", "nvfp4", False)
    tokens, (taken, drafted) = ask(folder, "float32", "mtp")
    assert tokens == told(following, len(tokens))
    assert taken <= drafted // 10
