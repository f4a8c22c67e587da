# SPDX-License-Identifier: Apache-2.0
"""What makes logits of a decoder's hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Head:
    """The final norm and lm_head, in float32. name: of lm_head's stored weight, which is the
    embedding's where the two are tied; cap: of the logits' magnitude, if they are capped."""

    norm: torch.nn.Module
    lm_head: torch.nn.Module
    cap: float | None
    name: str

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., hidden size] to logits [..., vocabulary], float32."""
        found = self.lm_head(self.norm(hidden.float()))
        return torch.tanh(found / self.cap) * self.cap if self.cap else found

    def effect(self, hidden: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """What a change of the weight, [vocabulary, hidden size], adds to the logits, to first
        order; float32, like them."""
        x = self.norm(hidden.float())
        found = (x.to(change.dtype) @ change.T).float()
        if self.cap:
            found *= 1 - torch.tanh(self.lm_head(x) / self.cap).square()
        return found
