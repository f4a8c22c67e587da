# SPDX-License-Identifier: Apache-2.0
"""What stands between an expert's two products: a gate times a value, or a plain function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import gelu, relu, silu

# gpt-oss's constants; its gate and up rows are interleaved.
_OAI_LIMIT, _OAI_ALPHA, _OAI_BETA = 7.0, 1.702, 1.0

_PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu_no_mul": silu,
    "gelu_no_mul": gelu,
    "gelu_tanh_no_mul": lambda h: gelu(h, approximate="tanh"),
    "relu2_no_mul": lambda h: relu(h).square(),
}
# The one whose rows of gate and up take turns.
INTERLEAVED = "swigluoai"
_GATED = ("silu", "gelu", "gelu_tanh", "swigluoai", "swigluoai_uninterleave")
SUPPORTED = (*_GATED, *_PLAIN)


@dataclass(frozen=True)
class KernelActivation:
    """y = f(min(g, limit)) * (clamp(u, -limit, limit) + beta) of (g, u), or y = f(h).

    function: "linear", "silu" (v * sigmoid(alpha * v)), "gelu", "gelu_tanh" or "relu2"
    """

    function: str = "linear"
    is_gated: bool = False
    limit: float = math.inf
    alpha: float = 1.0
    beta: float = 0.0


@dataclass(frozen=True)
class ExpertActivation:
    """y = act(gate) * up, on h [..., 2 I] = (gate, up), or y = act(h) on h [..., I].

    name:        one of SUPPORTED, which are vLLM's names. "gelu" is the exact one. With g and u
                 the gate and up halves, clamped to at most ``limit`` and to +-``limit``,
                 silu and swigluoai_uninterleave: g * sigmoid(alpha * g) * (u + beta)
                 swigluoai: the same with gpt-oss's own constants, g and u interleaved
    limit, alpha, beta: of silu and swigluoai_uninterleave

    Raises ValueError for another name.
    """

    name: str
    limit: float = math.inf
    alpha: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in SUPPORTED:
            raise ValueError(
                f"activation of the experts: found {self.name!r}; needed one of "
                f"{', '.join(SUPPORTED)}. Serve this model without --quantization nvfp4."
            )

    @property
    def is_gated(self) -> bool:
        return self.name in _GATED

    @property
    def is_interleaved(self) -> bool:
        """Whether the rows of gate and up take turns, in the place of two halves."""
        return self.name == INTERLEAVED

    def uninterleaved(self) -> ExpertActivation:
        """The same on two halves."""
        if not self.is_interleaved:
            return self
        return ExpertActivation("swigluoai_uninterleave", _OAI_LIMIT, _OAI_ALPHA, _OAI_BETA)

    def for_kernel(self) -> KernelActivation:
        """The same in a kernel's terms. Raises ValueError where gate and up rows take turns."""
        if self.is_interleaved:
            raise ValueError(
                "activation of the experts: swigluoai takes interleaved rows of gate and up; the "
                "kernels need gate rows before up rows, and swigluoai_uninterleave"
            )
        function = self.name.removesuffix("_no_mul").replace("swigluoai_uninterleave", "silu")
        if self.is_gated and function == "silu":
            return KernelActivation(function, True, self.limit, self.alpha, self.beta)
        return KernelActivation(function, self.is_gated)

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """h: [..., 2 I] if gated, else [..., I]; computed in h's own type. Returns [..., I]."""
        if not self.is_gated:
            return _PLAIN[self.name](h)
        if self.name == "swigluoai":
            gate, up = h[..., ::2], h[..., 1::2]
            return _swiglu(gate, up, _OAI_LIMIT, _OAI_ALPHA, _OAI_BETA)
        gate, up = h.chunk(2, dim=-1)
        if self.name.startswith("gelu"):
            approximate = "tanh" if self.name == "gelu_tanh" else "none"
            return gelu(gate, approximate=approximate) * up
        return _swiglu(gate, up, self.limit, self.alpha, self.beta)


def _swiglu(
    gate: torch.Tensor, up: torch.Tensor, limit: float, alpha: float, beta: float
) -> torch.Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)
