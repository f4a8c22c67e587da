# SPDX-License-Identifier: Apache-2.0
"""The choice of experts in torch, against the definition, token by token in Python."""

import math

import pytest
import torch

from vllm_nvfp4.compat.cpu_routing import install_sigmoid, topk_sigmoid, topk_softmax


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("function", [topk_softmax, topk_sigmoid])
def test_the_definition(function, has_bias, renormalize):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 9, generator=generator)
    bias = torch.randn(9, generator=generator) if has_bias else None
    weights, ids = torch.empty(7, 3), torch.empty(7, 3, dtype=torch.int32)
    is_padding = torch.arange(7) == 5
    function(weights, ids, ids.clone(), logits, renormalize, bias, is_padding=is_padding)
    for m, row in enumerate(logits.tolist()):
        if function is topk_softmax:
            scores = [math.exp(x) / sum(map(math.exp, row)) for x in row]
        else:
            scores = [1 / (1 + math.exp(-x)) for x in row]
        ranked = (
            scores if bias is None else [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        )
        best = sorted(range(9), key=lambda e: -ranked[e])[:3]
        total = sum(scores[e] for e in best) if renormalize else 1
        assert ids[m].tolist() == ([-1] * 3 if m == 5 else best)
        assert weights[m].tolist() == pytest.approx([scores[e] / total for e in best], rel=1e-5)


def test_the_scaling_factor_comes_last():
    logits, ids = torch.randn(4, 6), torch.empty(4, 2, dtype=torch.int64)
    plain, scaled = torch.empty(4, 2), torch.empty(4, 2)
    topk_sigmoid(plain, ids, ids, logits, True)
    topk_sigmoid(scaled, ids, ids, logits, True, None, 2.5)
    assert torch.equal(scaled, plain * 2.5)


def test_vllms_router_for_cpus_chooses_by_a_sigmoid():
    router = pytest.importorskip("vllm.model_executor.layers.fused_moe.router.cpu_router")
    install_sigmoid()
    logits, bias = torch.randn(5, 8), torch.randn(8)
    chosen = router.CPURouter(2, 8, scoring_func="sigmoid", e_score_correction_bias=bias)
    weights, ids = chosen._compute_routing(logits, logits, None)
    # transformers' MiniMaxM2TopKRouter
    scores = logits.sigmoid()
    best = (scores + bias).topk(2, dim=-1).indices
    expected = scores.gather(1, best)
    assert torch.equal(ids.long(), best)
    torch.testing.assert_close(weights, expected / expected.sum(-1, keepdim=True))
    softmax = router.CPURouter(2, 8)._compute_routing(logits, logits, None)[0]
    assert not torch.allclose(softmax, weights)
