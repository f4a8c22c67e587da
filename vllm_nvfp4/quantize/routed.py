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

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_nvfp4.checkpoints.model_class import ExpertPlace
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.quantize.methods import OTHER_METHOD
from vllm_nvfp4.quantize.moments import difference_moment, second_moment

# An expert with fewer tokens than this takes its layer's moments in part: K x K numbers are not to
# be had from less.
FEW_TOKENS = 256
# Tokens that a layer's experts are compared on with the module's own forward.
_COMPARED = 8
_OTHER_TEXT = "Give another text (--calibration), or use --method mse, which needs none."


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
                OTHER_METHOD,
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

    def _product(
        self, x: torch.Tensor, leaf: str, weight: torch.Tensor, expert: int
    ) -> torch.Tensor:
        is_transposed = next(p.is_transposed for p in self._places.values() if p.leaf == leaf)
        product = x @ (weight if is_transposed else weight.T)
        bias = getattr(self._module, f"{leaf}_bias", None)
        return product if bias is None else product + bias[expert]

    def inner(
        self, x: torch.Tensor, expert: int, others: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """h_e(x), [n, inner size]; others: matrices, by name, in place of gate's and up's."""
        leaves = {p.leaf for p in self._places.values()}
        leaf = "gate_up_proj" if "gate_up_proj" in leaves else "up_proj"
        weight = self._module.get_parameter(leaf)[expert]
        if others is not None:
            made = torch.empty_like(weight)[None]
            for name, other in others.items():
                replace(self._places[name], expert=0).view(made, len(other)).copy_(other)
            weight = made[0]
        both = self._product(x, leaf, weight, expert)
        if leaf == "up_proj":
            return self._module.act_fn(both)
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
            raise self.error(
                f"none of the text's {len(routing.x)} tokens sent to any of {self.num_experts}",
                "tokens to choose their weights for",
                _OTHER_TEXT,
            )
        expert = int(torch.bincount(index).argmax())
        token, _ = routing.tokens(expert)
        x = routing.x[token[:_COMPARED]]
        theirs = self._theirs(routing, x, expert)
        down = self._module.get_parameter("down_proj")[expert]
        ours = self._product(self.inner(x, expert), "down_proj", down, expert)
        tolerance = 2.0**-5 if x.dtype is torch.bfloat16 else 1e-3
        if (ours - theirs).norm() > tolerance * theirs.norm():
            raise self.error(
                "outputs that are not the sum of act(gate) * up over a token's experts",
                "experts as transformers' classes of mixtures have them",
            )

    def error(self, found: str, needed: str, remedy: str = OTHER_METHOD) -> CheckpointError:
        return CheckpointError(self._name, "routed experts", found, needed, remedy)


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

    def zeros(self) -> Moments:
        """Of the same shapes."""
        shift = None if self.shift is None else torch.zeros_like(self.shift)
        return Moments(torch.zeros_like(self.hessian), shift)

    def add(self, other: Moments, factor: float) -> None:
        self.hessian.add_(other.hessian, alpha=factor)
        if self.shift is not None and other.shift is not None:
            self.shift.add_(other.shift, alpha=factor)

    def scale(self, factor: float) -> None:
        self.hessian.mul_(factor)
        if self.shift is not None:
            self.shift.mul_(factor)

    def shrunk(self, own: Moments | None, share: float) -> Moments:
        """These, and ``share`` of an expert's own."""
        if own is None:
            return self
        shift = None
        if self.shift is not None and own.shift is not None:
            shift = torch.lerp(self.shift, own.shift, share)
        return Moments(torch.lerp(self.hessian, own.hessian, share), shift)


@dataclass(frozen=True)
class Inputs:
    """What a matrix gets of the text: moments, None where that is nothing; the number of tokens;
    what ``ExpertInputs.largest`` says of them."""

    moments: Moments | None
    count: int
    largest: float


@dataclass(frozen=True)
class ExpertInputs:
    """What the experts of a layer get of the text.

    stack:   has the source's weights at first
    exact:   [tokens, hidden size], what the unquantised model's experts get; None where unused
    load:    a matrix of the source by its stored name; for ``exact``
    rounded: what the down projections see of their inputs; ``routing`` has gate's and up's
    largest: the largest magnitude of inputs, [n, K]
    """

    stack: Stack
    routing: Routing
    exact: torch.Tensor | None = None
    load: Callable[[str], torch.Tensor] | None = None
    rounded: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    largest: Callable[[torch.Tensor], float] = lambda x: 0.0

    def pooled(self) -> Moments:
        """Of gate and up: all tokens, each as often as it counts in the layer's output."""
        x, exact = self.routing.x, self.exact
        total = self.routing.weights.float().square().sum(1).sqrt().to(x.dtype)[:, None]
        return Moments.of(x * total, None if exact is None else exact.to(total) * total)

    def of_gate_up(self, expert: int) -> Inputs:
        x, theirs, weight = self._tokens(expert)
        own = None
        if len(x):
            own = Moments.of(x * weight, None if theirs is None else theirs * weight)
        return Inputs(own, len(x), self.largest(x))

    def of_down(self, expert: int, names: Sequence[str]) -> Inputs:
        """With the stack's gate and up, which are stored under ``names``."""
        x, theirs, weight = self._tokens(expert)
        if not len(x):
            return Inputs(None, 0, 0.0)
        inner = self.rounded(self.stack.inner(x, expert)).mul_(weight)
        if theirs is not None and self.load is not None:
            others = {name: self.load(name) for name in names}
            theirs = self.stack.inner(theirs, expert, others).mul_(weight)
        return Inputs(Moments.of(inner, theirs), len(x), self.largest(inner))

    def _tokens(self, expert: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """(x, what it is in the unquantised model, the weights of the outputs.)"""
        token, weight = self.routing.tokens(expert)
        x = self.routing.x[token]
        theirs = None if self.exact is None else self.exact[token].to(x)
        return x, theirs, weight.to(x.dtype)[:, None]


def moment_bytes(inner_size: int, with_exact: bool) -> int:
    """Of the moments of one down projection's inputs."""
    return 4 * inner_size**2 * (2 if with_exact else 1)


def quantize_routed(
    inputs: ExpertInputs,
    groups: Mapping[int, tuple[list[str], list[str]]],
    quantize: Callable[[list[str], Moments, float], dict[str, torch.Tensor]],
    max_bytes: float = math.inf,
) -> dict[int, int]:
    """Quantise all experts of a layer, each for its own tokens; returns how many these are.

    The down projections wait until all of gate and up are quantised, for the moments of all their
    inputs together. Those of each one's own are kept meanwhile, or computed again from the tokens
    where they do not fit into ``max_bytes``: to the same bits.

    inputs:   their stack has the quantised weights afterwards
    groups:   expert -> stored names of (gate and up, down)
    quantize: of a fused layer's names, the moments of its inputs and the largest of these; gives
              what each weight has become, [N, K] float32
    """
    pooled = inputs.pooled()
    counts: dict[int, int] = {}
    kept: dict[int, Inputs] = {}
    pooled_inner: Moments | None = None
    for expert, (names, _) in groups.items():
        seen = inputs.of_gate_up(expert)
        counts[expert] = seen.count
        moments = pooled.shrunk(seen.moments, _share(seen.count))
        for name, value in quantize(names, moments, seen.largest).items():
            inputs.stack.set(name, value)
        seen = inputs.of_down(expert, names)
        if seen.moments is None:
            continue
        if pooled_inner is None:
            pooled_inner = seen.moments.zeros()
        pooled_inner.add(seen.moments, float(seen.count))
        size, is_exact = len(seen.moments.hessian), seen.moments.shift is not None
        if (len(kept) + 1) * moment_bytes(size, is_exact) <= max_bytes:
            kept[expert] = seen
    if pooled_inner is None:
        found, needed = "none that a token of the text goes to", "a token for one of them"
        raise inputs.stack.error(found, needed, _OTHER_TEXT)
    pooled_inner.scale(1 / sum(counts.values()))
    for expert, (names, down) in groups.items():
        seen = kept.pop(expert) if expert in kept else inputs.of_down(expert, names)
        moments = pooled_inner.shrunk(seen.moments, _share(seen.count))
        for name, value in quantize(down, moments, seen.largest).items():
            inputs.stack.set(name, value)
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
