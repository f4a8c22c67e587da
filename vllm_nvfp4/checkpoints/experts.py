# SPDX-License-Identifier: Apache-2.0
"""Check the routed experts of a checkpoint, from headers alone: all there, whole and alike."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from vllm_nvfp4.checkpoints.headers import TensorHeader
from vllm_nvfp4.checkpoints.inventory import LayerRecord
from vllm_nvfp4.checkpoints.spec import CheckpointError, LayerKind

_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOICE_KEYS = ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_top_k")
# (gate, up, down); a model without a gate has up and down alone.
_WHOLE = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_NAME = re.compile(r"(?P<layer>(?:.*\.)?experts)\.(?P<expert>\d+)\.(?P<leaf>\w+)")
_RESTORE = "Download the missing files, or quantise the model again."

# number of the expert -> leaf -> record
Experts = Mapping[int, Mapping[str, LayerRecord]]


def is_expert(name: str) -> bool:
    """Whether a layer of the checkpoint, by its name, is a part of one routed expert."""
    return _NAME.fullmatch(name) is not None


def check_experts(
    records: Iterable[LayerRecord],
    modules: Mapping[str, Mapping[str, TensorHeader]],
    config: Mapping[str, Any],
) -> None:
    """Raise CheckpointError for an expert, or a part of one, that is missing or stored unlike the
    others of its layer; for more choices than experts; and for quantised experts that are stacked
    in one tensor, which have no loader but in gpt-oss's own format.

    records, modules: of the whole checkpoint; config: config.json's, of the language model
    """
    num_experts = _first(config, _COUNT_KEYS)
    choices = _first(config, _CHOICE_KEYS)
    if num_experts and choices and choices[1] > num_experts[1]:
        raise CheckpointError(
            "config.json",
            choices[0],
            choices[1],
            f"at most {num_experts[0]} = {num_experts[1]}",
            "Correct config.json.",
        )
    records = tuple(records)
    _refuse_stacked(modules, {r.name for r in records if r.spec.kind is LayerKind.MICROSCALED})
    layers: dict[str, dict[int, dict[str, LayerRecord]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if match := _NAME.fullmatch(record.name):
            layers[match["layer"]][int(match["expert"])][match["leaf"]] = record
    for layer, experts in layers.items():
        _check_numbers(layer, experts, num_experts)
        _check_whole(layer, experts)
        _check_alike(layer, experts)


def _first(config: Mapping[str, Any], keys: Iterable[str]) -> tuple[str, int] | None:
    """The first of the keys that holds a positive number, with it."""
    values = ((key, config.get(key)) for key in keys)
    return next(((k, v) for k, v in values if type(v) is int and v > 0), None)


def _check_numbers(
    layer: str,
    experts: Experts,
    num_experts: tuple[str, int] | None,
) -> None:
    needed = num_experts[1] if num_experts else max(experts) + 1
    said = f", as {num_experts[0]} of config.json says" if num_experts else ""
    # Counted off lazily: a configuration or a name may claim any number of experts.
    missing = (e for e in range(needed) if e not in experts)
    beyond = (e for e in sorted(experts) if e >= needed)
    wrong = next(chain(missing, beyond), None)
    if wrong is not None:
        file = next(iter(next(iter(experts.values())).values())).files[0]
        is_missing = wrong < needed
        raise CheckpointError(
            file,
            f"{layer}.{wrong}",
            "no such expert" if is_missing else f"expert {wrong}",
            f"experts 0 to {needed - 1}{said}",
            _RESTORE if is_missing else "Correct config.json, or quantise the model again.",
        )


def _check_whole(layer: str, experts: Experts) -> None:
    """Each expert has the parts that the others have, and a gate has what it multiplies."""
    present = {leaf for expert in experts.values() for leaf in expert}
    for gate, up, down in _WHOLE:
        if not present & {gate, up, down}:
            continue
        needed = [up, down] if gate not in present else [gate, up, down]
        for number, expert in sorted(experts.items()):
            missing = [leaf for leaf in needed if leaf not in expert]
            if missing:
                some = next(iter(expert.values()))
                raise CheckpointError(
                    some.files[0],
                    f"{layer}.{number}.{missing[0]}",
                    "no such tensors; the expert has " + ", ".join(sorted(expert)),
                    ", ".join(needed) + ": an expert is one layer",
                    _RESTORE,
                )


def _check_alike(layer: str, experts: Experts) -> None:
    """All experts of a layer in one format, and each part of one shape."""
    first = min(experts)
    format_of_all = next(iter(experts[first].values()))
    for number, expert in sorted(experts.items()):
        for leaf, record in expert.items():
            other = experts[first].get(leaf, record)
            for found, needed in (
                (_stored(record), _stored(format_of_all)),
                (list(record.shape), list(other.shape)),
            ):
                if found != needed:
                    raise CheckpointError(
                        record.files[0],
                        f"{layer}.{number}.{leaf}",
                        found,
                        f"{needed}, as expert {first} is stored",
                        "Quantise the model again with all experts of a layer alike, or all left "
                        "out.",
                    )


def _stored(record: LayerRecord) -> str:
    return f"{record.format} ({record.spec.algo})" if record.spec.algo else record.format


def _refuse_stacked(
    modules: Mapping[str, Mapping[str, TensorHeader]], understood: set[str]
) -> None:
    for name, tensors in modules.items():
        if name in understood:
            continue
        for leaf, header in tensors.items():
            if name.rpartition(".")[2] == "experts" and header.dtype in ("U8", "F8_E4M3"):
                raise CheckpointError(
                    header.file,
                    f"{name}.{leaf}",
                    f"quantised experts stacked in one tensor, {header.dtype} {list(header.shape)}",
                    "a tensor for each expert, as experts.0.gate_proj.weight",
                    "Quantise the model again with a tool that writes one tensor for each expert, "
                    "or leave out --quantization nvfp4.",
                )
