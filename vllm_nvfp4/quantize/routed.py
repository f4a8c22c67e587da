# SPDX-License-Identifier: Apache-2.0
"""The routed experts of one layer, and what each of them sees of the calibration text.

transformers keeps a layer's experts in stacked parameters and computes

    y[t] = sum_j w[t, j] D_e h_e(x[t]),   e = index[t, j],   h_e(x) = act(G_e x) * U_e x

(h_e(x) = act(U_e x) in a model without a gate), with a bias added to each product where the experts
have some. An error d of D_e h_e counts in y[t] as w[t, j] d,
so that an expert's tokens weigh as the squares of their router weights.

Llama-4 multiplies the inputs by these weights instead, y[t] = sum_j D_e h_e(w[t, j] x[t]), and its
module is given every token once for each expert, E blocks of rows, zeros where it does not go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_nvfp4.checkpoints.model_class import ExpertPlace
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.quantize.moments import difference_moment, second_moment

# An expert with fewer tokens than this takes its layer's moments in part: K x K numbers are not to
# be had from less.
FEW_TOKENS = 256
# Tokens that a layer's experts are compared on with the module's own forward.
_COMPARED = 8


@dataclass
class Routing:
    """What goes into a layer's experts.

    x:       [tokens, hidden size]
    index:   [tokens, k] int64; which experts a token goes to
    weights: [tokens, k]; what each one's output is multiplied by
    rows:    [tokens] int64; where the tokens stand among blocks of rows, one for each expert; None
             for a module that is given each token once
    """

    x: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor | None = None

    @classmethod
    def of(cls, name: str, inputs: Sequence[Any], num_experts: int) -> Routing:
        """Of a module's inputs. Raises CheckpointError where they are others."""
        tensors = [i for i in inputs if isinstance(i, torch.Tensor)]
        if len(tensors) == 1 and tensors[0].numel() // tensors[0].shape[-1] % num_experts == 0:
            return cls._of_blocks(tensors[0].flatten(0, -2), num_experts)
        if len(tensors) != 3 or tensors[1].is_floating_point():
            found = ", ".join(f"{t.dtype} {list(t.shape)}" for t in tensors)
            raise CheckpointError(
                name,
                "inputs of the routed experts",
                found,
                "hidden states, indices of experts and their weights, or hidden states for each "
                "expert",
                "Use --method mse, which needs no forward pass.",
            )
        x, index, weights = (t.flatten(0, -2) for t in tensors)
        return cls(x, index, weights)

    @classmethod
    def _of_blocks(cls, blocks: torch.Tensor, num_experts: int) -> Routing:
        """blocks: [E tokens, hidden size]; a row of zeros has no token."""
        rows = blocks.any(-1).nonzero()[:, 0]
        index = rows // (len(blocks) // num_experts)
        return cls(blocks[rows], index[:, None], blocks.new_ones(len(rows), 1), rows)

    @classmethod
    def joined(cls, parts: Sequence[Routing]) -> Routing:
        """Of several calls; ``rows`` are those of none."""
        fields = ([getattr(p, name) for p in parts] for name in ("x", "index", "weights"))
        return cls(*map(torch.cat, fields))

    def counterpart(self, exact: torch.Tensor) -> torch.Tensor:
        """What another model's module of the same place gets of each token, like ``x``; where it
        sends the token to other experts, ``x``."""
        exact = exact.flatten(0, -2)
        if self.rows is None:
            return exact
        theirs = exact[self.rows.to(exact.device)]
        return torch.where(theirs.any(-1, keepdim=True), theirs, self.x.to(theirs))

    def tokens(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(Which tokens go to an expert, [n] int64; the weights of its outputs, [n].)"""
        token, slot = (self.index == expert).nonzero(as_tuple=True)
        return token, self.weights[token, slot]


class Stack:
    """The experts module of a layer, whose parameters are read and replaced one expert at a time.

    module: transformers'; places: stored name -> where it stands in the module
    """

    def __init__(self, name: str, module: Any, places: Mapping[str, ExpertPlace]) -> None:
        self._name, self._module, self._places = name, module, places

    def set(self, name: str, weight: torch.Tensor) -> None:
        """Replace one expert's matrix, [N, K]."""
        place = self._places[name]
        stack = self._module.get_parameter(place.leaf)
        with torch.no_grad():
            place.view(stack, len(weight)).copy_(weight)

    def _product(self, x: torch.Tensor, leaf: str, expert: int) -> torch.Tensor:
        weight = self._module.get_parameter(leaf)[expert]
        is_transposed = next(p.is_transposed for p in self._places.values() if p.leaf == leaf)
        product = x @ (weight if is_transposed else weight.T)
        bias = getattr(self._module, f"{leaf}_bias", None)
        return product if bias is None else product + bias[expert]

    def inner(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """h_e(x), [n, inner size]."""
        leaves = {p.leaf for p in self._places.values()}
        if "gate_up_proj" not in leaves:
            return self._module.act_fn(self._product(x, "up_proj", expert))
        both = self._product(x, "gate_up_proj", expert)
        if hasattr(self._module, "_apply_gate"):
            return self._module._apply_gate(both)
        gate, up = both.chunk(2, -1)
        return self._module.act_fn(gate) * up

    @property
    def num_experts(self) -> int:
        return len(self._module.get_parameter(next(iter(self._places.values())).leaf))

    def _theirs(self, routing: Routing, x: torch.Tensor, expert: int) -> torch.Tensor:
        """What the module itself makes of tokens that all go to one expert."""
        # By forward: the module's hook is what calls this.
        if routing.rows is not None:
            blocks = x.new_zeros(self.num_experts, *x.shape)
            blocks[expert] = x
            return self._module.forward(blocks.flatten(0, 1)).view(blocks.shape)[expert]
        one = torch.ones(len(x), 1, dtype=routing.weights.dtype, device=x.device)
        return self._module.forward(x, torch.full_like(one, expert, dtype=routing.index.dtype), one)

    def check(self, routing: Routing) -> None:
        """Raise CheckpointError where no token is sent to any expert, and where the module computes
        something else than is said above."""
        index = routing.index[(routing.index >= 0) & (routing.index < self.num_experts)]
        if not len(index):
            raise CheckpointError(
                self._name,
                "routed experts",
                f"none of the text's {len(routing.x)} tokens sent to any of {self.num_experts}",
                "tokens to choose their weights for",
                "Give another text (--calibration), or use --method mse, which needs none.",
            )
        expert = int(torch.bincount(index).argmax())
        token, _ = routing.tokens(expert)
        x = routing.x[token[:_COMPARED]]
        theirs = self._theirs(routing, x, expert)
        ours = self._product(self.inner(x, expert), "down_proj", expert)
        tolerance = 2.0**-5 if x.dtype is torch.bfloat16 else 1e-3
        if (ours - theirs).norm() > tolerance * theirs.norm():
            raise CheckpointError(
                self._name,
                "routed experts",
                "outputs that are not the sum of act(gate) * up over a token's experts",
                "experts as transformers' classes of mixtures have them",
                "Use --method mse, which needs no forward pass.",
            )


def pairs(places: Mapping[str, ExpertPlace]) -> dict[int, tuple[list[str], list[str]]]:
    """Expert -> the stored names of (gate and up, down)."""
    found: dict[int, tuple[list[str], list[str]]] = {}
    for name, place in sorted(places.items(), key=lambda p: (p[1].expert, p[1].index)):
        found.setdefault(place.expert, ([], []))[place.leaf == "down_proj"].append(name)
    return found


@dataclass
class Moments:
    """H = E[x x^T] of a layer's inputs and, where the unquantised inputs x' are known,
    D = E[(x' - x) x^T]; each [K, K] float32."""

    hessian: torch.Tensor
    shift: torch.Tensor | None

    @classmethod
    def of(cls, x: torch.Tensor, exact: torch.Tensor | None) -> Moments:
        shift = None if exact is None else difference_moment(exact, x, x)
        return cls(second_moment(x), shift)

    def shrunk(self, own: Moments | None, share: float) -> Moments:
        """These, and ``share`` of an expert's own."""
        if own is None:
            return self
        shift = None
        if self.shift is not None and own.shift is not None:
            shift = torch.lerp(self.shift, own.shift, share)
        return Moments(torch.lerp(self.hessian, own.hessian, share), shift)


def quantize_routed(
    stack: Stack,
    routing: Routing,
    exact: torch.Tensor | None,
    groups: Mapping[int, tuple[list[str], list[str]]],
    quantize: Callable[[list[str], Moments, torch.Tensor], dict[str, torch.Tensor]],
    rounded: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> dict[int, int]:
    """Quantise all experts of a layer, each for its own tokens; returns how many these are.

    stack:    has the source's weights, and the quantised ones afterwards
    exact:    [tokens, hidden size], what the unquantised model's experts get; None where unused
    groups:   expert -> names of (gate and up, down)
    quantize: of a fused layer's names, the moments of its inputs and some of these; gives what each
              weight has become, [N, K] float32
    rounded:  what the down projections see of their inputs; ``routing`` has gate's and up's
    """
    total = routing.weights.float().square().sum(1).sqrt().to(routing.x.dtype)[:, None]
    pooled = Moments.of(routing.x * total, None if exact is None else exact.to(total) * total)
    counts, inner, exact_inner = {}, {}, {}
    for expert, (names, _) in groups.items():
        token, weight = routing.tokens(expert)
        x, weight = routing.x[token], weight.to(routing.x.dtype)[:, None]
        counts[expert] = len(token)
        theirs = None if exact is None else exact[token].to(x)
        if theirs is not None:
            exact_inner[expert] = stack.inner(theirs, expert) * weight
        own = Moments.of(x * weight, None if theirs is None else theirs * weight)
        moments = pooled.shrunk(own if len(token) else None, _share(len(token)))
        for name, value in quantize(names, moments, x).items():
            stack.set(name, value)
        inner[expert] = rounded(stack.inner(x, expert)) * weight
    every = torch.cat(list(inner.values()))
    every_exact = torch.cat(list(exact_inner.values())) if exact_inner else None
    pooled = Moments.of(every, every_exact)
    del every, every_exact
    for expert, (_, names) in groups.items():
        x = inner.pop(expert)
        seen = Moments.of(x, exact_inner.pop(expert, None)) if len(x) else None
        for name, value in quantize(names, pooled.shrunk(seen, _share(len(x))), x).items():
            stack.set(name, value)
    return counts


def _share(count: int) -> float:
    return min(1.0, count / FEW_TOKENS)


def few_tokens(counts: Sequence[int]) -> str:
    """One line on experts that got few of the text's tokens, or "" where none did. counts: of each
    expert of all layers"""
    few = sum(n < FEW_TOKENS for n in counts)
    if not few:
        return ""
    unreached = sum(n == 0 for n in counts)
    return (
        f"{few} of {len(counts)} experts got fewer than {FEW_TOKENS} tokens of the text, "
        f"{unreached} of them none: theirs are the inputs of their layer's experts together, "
        "the fewer tokens the more; --samples gives more"
    )
