# SPDX-License-Identifier: Apache-2.0
"""The load that an engine would do, on the meta device: what has no place, and what stays empty."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from vllm_nvfp4.checking.trace import LoadTrace, Region, num_elements
from vllm_nvfp4.checkpoints.dtypes import TORCH_DTYPES
from vllm_nvfp4.checkpoints.headers import TensorHeader
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.compat import versions
from vllm_nvfp4.compat.messages import message_of
from vllm_nvfp4.compat.meta_model import build_model, meta_device

# An expert's tensor: what stands before its number, the number, and what follows.
_EXPERT = re.compile(r"^(.*\bexperts\.(?:[A-Za-z_]\w*\.)?)(\d+)(\..*)$")
# Errors of a load are looked for one after another, each with a load of its own.
_MOST_ERRORS = 20


@dataclass
class Loaded:
    """What a load came to.

    model:   vLLM's, on the meta device
    refused: stored tensor -> the error that ended the load at it; "" for one at no tensor
    unused:  stored tensors that were read and written nowhere
    empty:   parameters that were not filled whole -> (elements filled, elements)
    cut:     stored tensors of which all ranks take less than there is -> (elements read on one of
             them, elements)
    places:  gives stored tensor -> (the module that it is loaded into, its parameter's name)
    """

    model: Any
    refused: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    empty: dict[str, tuple[int, int]] = field(default_factory=dict)
    cut: dict[str, tuple[int, int]] = field(default_factory=dict)
    places: Callable[[], dict[str, tuple[Any, str]]] = dict


def load_without_data(
    config: Any, headers: Mapping[str, TensorHeader], model_config: Any = None
) -> Loaded:
    """Load the stored tensors of these headers into :func:`build_model`'s, in its frame.

    Whatever building raises is raised.
    """
    refused: dict[str, str] = {}
    while True:
        model = build_model(config, model_config)
        with meta_device((model_config or config.model_config).dtype):
            represented = _represented(headers, model)
            fed = {n: h for n, h in headers.items() if n not in represented}
            trace, last = LoadTrace(), ""

            def stand_ins(trace: LoadTrace = trace, fed: Any = fed) -> Iterator[Any]:
                nonlocal last
                for name, header in fed.items():
                    if name not in refused and header.dtype in TORCH_DTYPES:
                        last = name
                        yield name, trace.stand_in(name, header.shape, TORCH_DTYPES[header.dtype])

            try:
                with trace:
                    names = model.load_weights(stand_ins())
            except Exception as error:
                said = _said(error, headers.get(last))
                if last in refused or said in refused.values():
                    return Loaded(model, refused)
                refused[last] = said
                if len(refused) < _MOST_ERRORS:
                    continue
                return Loaded(model, refused)
        break
    _take_collected(model, trace)
    left = {name for name in fed if name not in trace.used and name not in refused}
    unused = [name for name in headers if represented.get(name, name) in left]
    empty = _empty_parameters(model, trace, names or (), bool(represented))
    sizes = {name: prod(header.shape) for name, header in fed.items()}
    ranks = config.parallel_config.tensor_parallel_size * config.parallel_config.data_parallel_size
    counts = {name: num_elements(parts) for name, parts in trace.read.items()}
    cut = {name: (n, sizes[name]) for name, n in counts.items() if n * ranks < sizes[name]}
    places = functools.partial(_places, model, trace, represented)
    return Loaded(model, refused, unused, empty, cut, places)


def _places(
    model: Any, trace: LoadTrace, represented: Mapping[str, str]
) -> dict[str, tuple[Any, str]]:
    """See :class:`Loaded` and :func:`_represented`."""
    found = {
        name: (module, leaf)
        for module in model.modules()
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
        for name in trace.origins(tensor)
    }
    others = {name: found[other] for name, other in represented.items() if other in found}
    return found | others


def _said(error: Exception, header: TensorHeader | None) -> str:
    """The error in one line; one that is no sentence of its own, with what it met."""
    if isinstance(error, CheckpointError) or header is None:
        return message_of(error)
    return (
        f"found {header.dtype} {list(header.shape)}, which the model refuses: {message_of(error)}"
    )


def _represented(headers: Mapping[str, TensorHeader], model: Any) -> dict[str, str]:
    """Tensors of experts for which another expert's stands: name -> the other name.

    Experts of a layer that are alike are loaded alike, and a model has tens of thousands of their
    tensors. So the first two stand for the others, but for the last one of a rank and of all.
    """
    counts = {
        m.moe_config.num_logical_experts: getattr(m.moe_config, "num_local_experts", 0)
        for m in model.modules()
        if versions.is_moe_layer(m)
    }
    groups: dict[tuple[str, str], dict[int, TensorHeader]] = defaultdict(dict)
    for name, header in headers.items():
        if match := _EXPERT.match(name):
            groups[match[1], match[3]][int(match[2])] = header
    represented: dict[str, str] = {}
    for (start, end), experts in groups.items():
        number = len(experts)
        forms = {(h.dtype, h.shape) for h in experts.values()}
        if number in counts and experts.keys() == set(range(number)) and len(forms) == 1:
            kept = {0, 1, (counts[number] or number) - 1, number - 1}
            others = experts.keys() - kept
            represented |= {f"{start}{e}{end}": f"{start}1{end}" for e in others}
    return represented


def _take_collected(model: Any, trace: LoadTrace) -> None:
    """Methods that keep what they are given until all of it is there have used it."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        for tensor in getattr(method, "collected", list)():
            trace.used |= trace.origins(tensor)


def _empty_parameters(
    model: Any, trace: LoadTrace, names: Any, is_thinned: bool
) -> dict[str, tuple[int, int]]:
    """Parameters that have to be filled and were not: name -> (elements filled, elements)."""
    names = set(names)
    empty: dict[str, tuple[int, int]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, versions.attention_classes()):
            continue  # scales of a KV cache, which have defaults
        is_moe = versions.is_moe_layer(module)
        method = getattr(module, "quant_method", None)
        collected = any(True for _ in getattr(method, "collected", list)())
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            is_ours = getattr(parameter, "nvfp4_role", None) is not None
            is_expected = hasattr(parameter, "nvfp4_is_expected")
            is_expected |= hasattr(parameter, "nvfp4_expected")
            if not parameter.numel() or (is_ours and not is_expected) or collected:
                continue
            parts = trace.parts(parameter)
            filled, size = _filled(parameter, parts, is_moe and is_thinned)
            if not parts and (name in names or trace.origins(parameter)):
                continue
            if filled < size and (not parts or is_ours or is_moe or hasattr(module, "input_size")):
                empty[name] = filled, size
    return empty


def _filled(parameter: Any, parts: set[Region], is_thinned: bool) -> tuple[int, int]:
    """(elements filled, elements that should be); of a stack of which only some experts were
    loaded, counted over these."""
    if not is_thinned or parameter.dim() < 2:
        return num_elements(parts), parameter.numel()
    each = parameter.stride(0)
    slots: dict[int, set[Region]] = defaultdict(set)
    for part in parts:
        if part[1] == tuple(parameter.shape):
            return num_elements({part}), parameter.numel()
        slots[part[0] // each].add(part)
    size = parameter[0].numel()
    return sum(num_elements(p) for p in slots.values()), size * max(len(slots), 1)
