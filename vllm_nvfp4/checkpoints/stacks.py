# SPDX-License-Identifier: Apache-2.0
"""Routed experts that a file holds in one tensor, E experts, hidden size H, inner size I.

Tools write them in these layouts, P one of PROJECTIONS:

    experts.P.weight_packed     [E, N, K/2], or [E N, K/2]    and beside it the scales of the form
    experts.P                   [E, N, K/2], or [E, K/2, N]   with experts.P_weight_scale and more
    (parent).P.weight           [E, N, K/2]                   Granite's input_linear, output_linear

They are known by one name here, that of the first layout with ``weight`` for the bare tensor, and
with N before K. Models take experts one by one under names of their own, so a stack is taken apart
as it is loaded.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm_nvfp4.checkpoints.headers import TensorHeader

if TYPE_CHECKING:
    import torch

# name -> what its rows are, in order
PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate", "up"),
    "input_linear": ("gate", "up"),
    "w13": ("gate", "up"),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "w1": ("gate",),
    "w3": ("up",),
    "down_proj": ("down",),
    "output_linear": ("down",),
    "w2": ("down",),
}
_SCALES = ("weight_scale", "weight_scale_2", "weight_scale_inv", "weight_global_scale",
           "input_scale", "input_global_scale", "scale", "scale_inv", "bias")  # fmt: skip
_FLAT = re.compile(
    rf"(?P<module>(?:.*\.)?experts\.(?:{'|'.join(PROJECTIONS)}))(?:_(?P<leaf>{'|'.join(_SCALES)}))?"
)
_MAIN = ("weight_packed", "weight", "qweight")
_QUANTISED = ("U8", "F8_E4M3")


@dataclass(frozen=True)
class StoredAs:
    """name: in the file; is_transposed: its last two dimensions are K and N"""

    name: str
    is_transposed: bool = False


def canonical(
    headers: Mapping[str, TensorHeader],
) -> tuple[dict[str, TensorHeader], dict[str, StoredAs]]:
    """(the headers with every quantised stack under its one name, N before K; name -> as stored).

    The second has the tensors of stacks alone.
    """
    names = {name: _canonical_name(name, headers) for name in headers}
    found = {names[name]: header for name, header in headers.items()}
    stored: dict[str, StoredAs] = {}
    originals = {new: old for old, new in names.items()}
    leaves: dict[str, list[str]] = defaultdict(list)
    for name in found:
        leaves[name.rpartition(".")[0]].append(name)
    stacks = [module for module in leaves if is_stack(module, found)]
    # A square matrix shows nothing: the stacks of a layer are alike.
    transposed = {m.rpartition(".")[0] for m in stacks if _is_transposed(m, found)}
    for module in stacks:
        for name in leaves[module]:
            turn = module.rpartition(".")[0] in transposed and len(found[name].shape) == 3
            stored[name] = StoredAs(originals[name], turn)
            if turn:
                count, k, n = found[name].shape
                found[name] = replace(found[name], shape=(count, n, k))
    return found, stored


def _canonical_name(name: str, headers: Mapping[str, TensorHeader]) -> str:
    match = _FLAT.fullmatch(name)
    if match is None:
        return name
    main = headers.get(match["module"])
    if main is None or not (main.dtype in _QUANTISED or f"{match['module']}_bias" in headers):
        return name
    leaf = match["leaf"] or "weight"
    return f"{match['module']}.{'weight_' + leaf if leaf.startswith('scale') else leaf}"


def is_stack(module: str, headers: Mapping[str, TensorHeader]) -> bool:
    """Whether a module's weight is of several experts, and quantised or with biases."""
    parent, _, leaf = module.rpartition(".")
    main = _main(module, headers)
    if leaf not in PROJECTIONS or main is None:
        return False
    if main.dtype not in _QUANTISED and f"{module}.bias" not in headers:
        return False
    return len(main.shape) == 3 or parent.rpartition(".")[2] == "experts"


def _main(module: str, headers: Mapping[str, TensorHeader]) -> TensorHeader | None:
    return next((h for n in _MAIN if (h := headers.get(f"{module}.{n}")) is not None), None)


def _is_transposed(module: str, headers: Mapping[str, TensorHeader]) -> bool:
    """Whether K stands before N: by the block scales, which divide K alone, or by the biases."""
    main = _main(module, headers)
    if main is None or len(main.shape) != 3:
        return False
    _, first, second = main.shape
    for leaf in ("weight_scale", "scales"):
        scale = headers.get(f"{module}.{leaf}")
        if scale is not None and len(scale.shape) == 3:
            return second == scale.shape[2] and first != scale.shape[1]
    bias = headers.get(f"{module}.bias")
    return bias is not None and second == bias.shape[-1] and first != second


@dataclass(frozen=True)
class Stack:
    """How the tensors of one stacked module become those of experts.

    parts:          what its rows are, of "gate", "up" and "down"
    num_experts:    E
    is_interleaved: the rows of its parts take turns, instead of one part after the other
    """

    parts: tuple[str, ...]
    num_experts: int
    is_interleaved: bool = False

    def split(self, tensor: torch.Tensor) -> Iterator[tuple[int, str, torch.Tensor]]:
        """(expert, part, its tensor) of each. tensor: with N before K; scalars are one for all
        experts, one for each, or one for each of its parts; all else has rows."""
        count, num_parts = self.num_experts, len(self.parts)
        if tensor.numel() in (1, count, count * num_parts):
            columns = tensor.reshape(1 if tensor.numel() == 1 else count, -1)
            columns = columns.expand(count, num_parts)
            for e in range(count):
                for i, part in enumerate(self.parts):
                    yield e, part, columns[e, i]
            return
        if tensor.shape[0] != count:
            tensor = tensor.unflatten(0, (count, -1))
        for e in range(count):
            for i, part in enumerate(self.parts):
                if self.is_interleaved:
                    yield e, part, tensor[e, i::num_parts]
                else:
                    yield e, part, tensor[e].chunk(num_parts)[i]


def parts_of(module: str) -> tuple[str, ...]:
    """What the rows of a module of experts are, by its last part."""
    return PROJECTIONS[module.rpartition(".")[2]]
