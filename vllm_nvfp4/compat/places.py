# SPDX-License-Identifier: Apache-2.0
"""Where a model's linear layers are, for models that call them otherwise when they are built.

A layer asks for its method by a prefix that its model made up, and most models make it the layer's
name. Zamba2's is another: its shared block has no number, and its mixers have those of other
layers; drafts of EAGLE-3 count on from their target. Names are known once the model stands, and so
is which layers its parts fuse; if the files then have something else for a layer, the model is
built again.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vllm_nvfp4.compat import versions


@dataclass
class _Build:
    """A model that is being built.

    asked: (config, layer, prefix, what the files then had for it), in the order in which the layers
           ask for their methods
    names: prefix -> the names of the layers that ask by it, in that order
    known: the configs that have built the model before
    mappers: the model's parts that have a mapper of the files' names, by their names
    """

    asked: list[tuple[Any, weakref.ref[Any], str, Any]] = field(default_factory=list)
    names: dict[str, Iterator[str]] = field(default_factory=dict)
    known: list[Any] = field(default_factory=list)
    mappers: list[tuple[str, Any]] = field(default_factory=list)


_builds: list[_Build] = []


@contextmanager
def building(known: _Build | None = None) -> Iterator[_Build]:
    """While a model is built. known: by the names that :func:`settle` found for it."""
    _builds.append(known or _Build())
    try:
        yield _builds[-1]
    finally:
        _builds.pop()


def name_of(config: Any, layer: Any, prefix: str) -> str:
    """What the files may call a layer that asks for its method."""
    if not _builds:
        return prefix
    build = _builds[-1]
    _learn_names(config, build.mappers)  # a draft makes itself new ones
    name = next(build.names.get(prefix, iter(())), prefix)
    build.asked.append((config, weakref.ref(layer), prefix, config.found(name)))
    return name


def has_built(config: Any) -> bool:
    """Whether the model is being built again, of which this config has built layers before."""
    return bool(_builds) and any(config is known for known in _builds[-1].known)


def mappers_of(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, mapper of the files' names) of each part of a model that has one."""
    for name, module in model.named_modules():
        if (mapper := getattr(module, "hf_to_vllm_mapper", None)) is not None:
            yield name, mapper


def fused_by(mapper: Any) -> dict[str, tuple[str, ...]]:
    """Fused layer -> its shards, as a mapper of the files' names has them."""
    fused: dict[str, tuple[str, ...]] = {}
    for name, (layer, _) in getattr(mapper, "orig_to_new_stacked", {}).items():
        shard, leaf = (n.strip(".").rpartition(".")[2] for n in (name, layer))
        fused[leaf] = tuple(dict.fromkeys((*fused.get(leaf, ()), shard)))
    return fused


def settle(build: _Build, model: Any, is_draft: bool) -> _Build | None:
    """What the model is to be built again by; None where each layer is in its place."""
    names = {id(module): name for name, module in model.named_modules()}
    mappers = [(name, versions.rename_mapper(mapper)) for name, mapper in mappers_of(model) if name]
    known = list({id(config): config for config, *_ in build.asked}.values())
    for config in known:
        config.fused_in |= {name: fused_by(mapper) for name, mapper in mappers_of(model) if name}
    found: dict[str, list[str]] = defaultdict(list)
    is_moved = False
    for config, reference, prefix, found_then in build.asked:
        name = names.get(id(reference()), prefix)
        if name == prefix or not _belongs_elsewhere(config, prefix, name, mappers, is_draft):
            name = prefix
        found[prefix].append(name)
        is_moved |= config.found(name) != found_then
    if not is_moved:
        return None
    moved = {prefix: iter(names_of) for prefix, names_of in found.items()}
    return _Build(names=moved, known=known, mappers=mappers)


def _belongs_elsewhere(
    config: Any, prefix: str, name: str, mappers: Sequence[tuple[str, Any]], is_draft: bool
) -> bool:
    """Whether the files mean another layer by a layer's prefix, or none, and it by its name."""
    census, fused_at = config.census, config.fused_at
    if census is None or census.named(prefix, fused_at(prefix)):
        return False
    if is_draft and config.found(prefix):  # in its target's files, whose layers have such names
        return False
    _learn_names(config, mappers)
    return bool(census.named(name, fused_at(name)))


def _learn_names(config: Any, mappers: Sequence[tuple[str, Any]]) -> None:
    """Have the config take the names that parts of the model have for the files' modules."""
    if config.census is not None:
        for part, mapper in mappers:
            config.census.rename_within(part, mapper)
