# SPDX-License-Identifier: Apache-2.0
"""Decoding along given tokens, whatever the model makes of them."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FORCED = [int(t) for t in torch.randperm(290, generator=torch.Generator().manual_seed(2))[:8] + 4]


class ForceTokens(AdapterLogitsProcessor):
    """Leaves no choice but FORCED; vLLM takes the log-probabilities before it. Every rank finds it
    by its name."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        def force(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            wanted = FORCED[min(len(output), len(FORCED) - 1)]
            forced = torch.full_like(logits, -float("inf"))
            forced[wanted] = 0
            return forced

        return force
