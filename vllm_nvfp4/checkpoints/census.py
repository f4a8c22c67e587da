# SPDX-License-Identifier: Apache-2.0
"""How each layer of a checkpoint is stored: decided by the tensors, once for every reader.

A configuration names layers by lists, patterns and classes, and public ones are incomplete or
wrong. The headers of the files are never wrong: a weight is U8 with block scales, or FP8, or 16
bits. So the headers decide the form of a layer, and the configuration is left with what they do not
show: the bits of the activations, the KV cache, the group size, and what a tool calls the form.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_nvfp4.checkpoints.forms import classify
from vllm_nvfp4.checkpoints.headers import TensorHeader
from vllm_nvfp4.checkpoints.mlx import MlxDialect, Restored
from vllm_nvfp4.checkpoints.modules import KV_SCALES, StoredModule, group_by_module
from vllm_nvfp4.checkpoints.spec import (
    UNQUANTIZED,
    CheckpointError,
    Dialect,
    LayerSpec,
    Role,
    describe,
    fold,
    fused_layer_spec,
    merged,
    one_spec,
    shard_names,
)
from vllm_nvfp4.checkpoints.stacks import (
    PROJECTIONS,
    StoredAs,
    canonical,
)

# An expert's tensor, or its module, under the name of its projection.
PROJECTION_FIRST = re.compile(r"(^|\.)experts\.([A-Za-z_]\w*)\.(\d+)(\.|$)")

# What a model calls the block that holds the experts of a layer may not be what the files do.
_BLOCK_OF_EXPERTS = re.compile(r"(\.\d+)\.\w+\.experts(?=\.|$)")
# So of any layer of a block, as Granite's mixers.
_BLOCK = re.compile(r"(\.\d+)\.\w+\.(?=\w+$)")
# Scales of a KV cache as AMD Quark has them, scales of outputs, and what vLLM calls them.
KV_OUTPUTS = re.compile(r"\.(?:([qkv])_proj\.output|(prob)_output)_scale$")
OF_ATTENTION = r".attn.\1\2_scale"


class Census:
    """Every module of a checkpoint's files, found by the file's names and by the model's.

    headers: of all tensors; dialect: what the configuration says, not renamed yet. It is settled
    here (see Dialect.settle).
    """

    def __init__(self, headers: Mapping[str, TensorHeader], dialect: Dialect) -> None:
        self.dialect = dialect
        # The tensors of stacked experts, by the names that they have here -> as the files have them
        self.stored_as: dict[str, StoredAs]
        self._headers = headers
        self._restored: Restored | None = None
        if isinstance(dialect, MlxDialect):
            self._restored = Restored(headers, dialect)
            headers = self._restored.headers
        headers = {KV_OUTPUTS.sub(OF_ATTENTION, n): h for n, h in headers.items()}
        headers, self.stored_as = canonical(headers)
        # Of layers with codes: the scales of others have no groups.
        codes = {name.removesuffix("weight") for name, h in headers.items() if h.dtype == "U8"}
        dialect.settle(
            {n: h.shape for n, h in headers.items() if n.rpartition(".")[0] + "." in codes}
        )
        self.modules = {
            name: StoredModule(name, tensors, *classify(name, tensors, dialect))
            for name, tensors in group_by_module(headers).items()
        }
        self._asked: set[str] = set()
        self._integers: list[StoredModule] | None = None
        # The file's names -> the model's, as far as they are known.
        self._names: dict[str, str] = {name: expert_first(name) for name in self.modules}
        self._by_name: dict[str, StoredModule] = {
            **{self._names[name]: module for name, module in self.modules.items()},
            **self.modules,
        }
        self._by_leaf: dict[tuple[str, tuple[str, ...]], list[tuple[str, StoredModule]]] | None = (
            None
        )
        self._by_experts: dict[str, StoredModule] = {}
        self._renamed_within: set[str] = set()

    def rename(self, mapper: Any) -> None:
        """Add the names that vLLM's WeightsMapper gives the modules; the files' own stay valid."""
        # A mapper knows the names of tensors: its prefixes may end where a module's name does.
        tensor = ".weight"
        for name, known in self._names.items():
            renamed = next(iter(mapper.apply_list([known + tensor])), None)
            if renamed is not None and renamed.endswith(tensor):
                self._names[name] = renamed.removesuffix(tensor)
        # What the model calls a module goes before what a file calls another.
        self._by_name |= {self._names[name]: module for name, module in self.modules.items()}
        self._by_leaf = None
        self._by_experts = {}

    def find(self, name: str) -> StoredModule | None:
        """The module of this name, as the model or the file has it.

        Models nest the same layer differently than files do (language_model.model. against
        model.language_model., a wrapper of a draft layer, a bare lm_head). So where no name is
        equal, one is taken whose last part and numbers are equal and whose other parts are all in
        the name asked for, or the other way round; the one with most parts in common. Else one of
        the same layer, in a block of another name (mixer against mamba), if there is one alone; and
        experts under any one name of the block that holds them (block_sparse_moe against mlp).
        """
        if (module := self._by_name.get(name)) is not None:
            return module
        if self._by_leaf is None:
            self._by_leaf = defaultdict(list)
            for known, module in self._by_name.items():
                self._by_leaf[_key(known)].append((known, module))
                self._by_experts.setdefault(_without_block(known), module)
        parts = _parts(name)
        best: list[tuple[int, StoredModule]] = []
        for known, module in self._by_leaf.get(_key(name), ()):
            known_parts = _parts(known)
            if known_parts <= parts or parts <= known_parts:
                best.append((len(known_parts & parts), module))
        if not best and ".experts." in name:
            return self._by_experts.get(_without_block(name))
        if not best:
            others = {
                module.name: module
                for known, module in self._by_leaf.get(_key(name), ())
                if _in_any_block(known) == _in_any_block(name)
            }
            return next(iter(others.values())) if len(others) == 1 else None
        most = max(common for common, _ in best)
        found = [module for common, module in best if common == most]
        alike = all(m.stored == found[0].stored for m in found)
        return found[0] if alike else None

    def ask(self, name: str) -> StoredModule | None:
        """As :meth:`find`, for a layer that is going to load it."""
        if (module := self.find(name)) is not None:
            self._asked.add(module.name)
        return module

    def rename_within(self, part: str, mapper: Any) -> None:
        """Add the names that the mapper of a part of the model gives the modules: a part whose name
        the files may leave out, as drafts of EAGLE-3 do."""
        if part in self._renamed_within:
            return
        self._renamed_within.add(part)
        for name, module in self.modules.items():
            known = name.removeprefix(f"{part}.") + ".weight"
            for renamed in mapper.apply_list([known]):
                self._by_name.setdefault(f"{part}.{renamed.removesuffix('.weight')}", module)
        self._by_leaf = None

    def forget_asked(self) -> None:
        """The model is built again."""
        self._asked.clear()
        self._integers = None

    def named(self, name: str, packed_modules: Mapping[str, Sequence[str]]) -> frozenset[str]:
        """The modules, by the files' names, that are called just so, or are shards of it."""
        names = (name, *shard_names(name, packed_modules))
        return frozenset(m.name for n in names if (m := self._by_name.get(n)) is not None)

    def found(self, name: str, packed_modules: Mapping[str, Sequence[str]]) -> frozenset[str]:
        """The same, found as :meth:`find` does."""
        names = (name, *shard_names(name, packed_modules))
        return frozenset(m.name for n in names if (m := self.find(n)) is not None)

    def unasked(self) -> dict[str, int]:
        """Quantised modules that no layer asked for: name with its numbers folded -> how many."""
        counts: Counter[str] = Counter()
        for name, module in self.modules.items():
            is_quantized = module.stored is None or module.stored.is_quantized
            if is_quantized and name not in self._asked:
                counts[fold(name)] += 1
        return dict(counts)

    def unasked_integers(self) -> list[StoredModule]:
        """Of the modules in integers, those that no layer of the model asked for; they count as
        asked from here on."""
        if self._integers is None:
            self._integers = [
                module
                for name, module in self.modules.items()
                if module.stored is not None
                and module.stored.tensor(Role.OFFSET)
                and name not in self._asked
                and not self.is_stack(module)
            ]
            self._asked |= {module.name for module in self._integers}
        return self._integers

    def layer_spec(self, name: str, packed_modules: Mapping[str, Sequence[str]]) -> LayerSpec:
        """How a layer of the model is stored, fused or not.

        A fused layer may be stored whole or as its shards; shards that the file leaves out
        (Gemma-4's v_proj where keys are values) are filled by the model from the others. Shards in
        different forms come out as WIDENED: they are one weight in memory.
        A layer that is not in the files by any name is as the configuration says.
        """
        whole = self.ask(name)
        if whole is not None and not whole.has_scales_alone:
            return whole.spec
        shards = [m for n in shard_names(name, packed_modules) if (m := self.ask(n)) is not None]
        if not shards:
            return fused_layer_spec(self.dialect, name, packed_modules)
        return one_spec({module.name: module.spec for module in shards})

    def said(self, name: str, packed_modules: Mapping[str, Sequence[str]]) -> set[LayerSpec]:
        """What the configuration says about a layer, its shards one by one."""
        names = {name, *shard_names(name, packed_modules)}
        return {m.said for n in names if (m := self.find(n)) is not None}

    def experts_spec(self, prefix: str, names: Iterable[str]) -> LayerSpec:
        """How the routed experts of a layer are stored.

        prefix: the model's name for all of them; names: for each linear layer of each expert
        Raises CheckpointError where they differ among each other.
        """
        modules = {name: m for name in names if (m := self.ask(name)) is not None}
        if modules:
            specs = [module.spec for module in modules.values()]
            if spec := merged(specs):
                return spec
            first = next(iter(modules))
            other = next(n for n, m in modules.items() if merged([m.spec, specs[0]]) is None)
            raise CheckpointError(
                ", ".join(sorted({h.file for h in modules[other].tensors.values()})),
                other,
                describe(modules[other].spec),
                f"{describe(specs[0])}, as {first}: the experts of a layer are one layer",
                "Quantise again with one format for all experts of a layer, or ignore them all.",
            )
        if stacks := self.stacks(prefix):
            return one_spec({module.name: module.spec for module in stacks})
        if (stack := self.ask(prefix)) is not None and any(
            len(header.shape) > 2 for header in stack.tensors.values()
        ):
            return stack.spec
        # A stack under a name of the model's own beside the experts, as Granite's input_linear.
        parent = prefix.rpartition(".")[0] + "."
        others = [
            module
            for name, module in self._by_name.items()
            if name.startswith(parent) and any(len(h.shape) > 2 for h in module.tensors.values())
        ]
        return merged([module.spec for module in others]) or UNQUANTIZED

    def stacks(self, prefix: str) -> list[StoredModule]:
        """The stacks of a layer's experts, under it or beside it."""
        parent = prefix.rpartition(".")[0]
        names = [f"{base}.{leaf}" for base in (prefix, parent) for leaf in PROJECTIONS]
        found = {m.name: m for name in names if (m := self.find(name)) and self.is_stack(m)}
        self._asked |= found.keys()
        return list(found.values())

    def quantised_stacks(self) -> frozenset[str]:
        """The tensors of stacks that are quantised, as the files name them."""
        return frozenset(
            stored.name
            for name, stored in self.stored_as.items()
            if (spec := self.modules[name.rpartition(".")[0]].stored) is None or spec.is_quantized
        )

    def is_stack(self, module: StoredModule) -> bool:
        """Whether the module is of several experts, and quantised."""
        return any(f"{module.name}.{leaf}" in self.stored_as for leaf in module.tensors)

    @property
    def has_projection_first(self) -> bool:
        """Whether experts are stored as experts.up_proj.3 instead of experts.3.up_proj."""
        return any(expert_first(name) != name for name in self.modules)

    @property
    def has_kv_scales(self) -> bool:
        """Whether scales of a KV cache are stored."""
        return any(KV_SCALES & module.tensors.keys() for module in self.modules.values())

    @property
    def has_kv_outputs(self) -> bool:
        """Whether they are stored as scales of outputs."""
        return any(KV_OUTPUTS.search(name) for name in self._headers)

    def headers(self) -> Mapping[str, TensorHeader]:
        """The header of every tensor, as the files have it."""
        return self._headers

    def as_read(self, weights: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
        """The files' tensors, in the names and forms that ``modules`` are described in."""
        return weights if self._restored is None else self._restored.tensors(weights)

    def names_of(self, tensor: str) -> tuple[str, ...]:
        """What a tensor of the files becomes in ``modules``, by their names and ``stored_as``."""
        return (tensor,) if self._restored is None else self._restored.names[tensor]

    @property
    def stray(self) -> tuple[str, ...]:
        """Every tensor that is stored beside a weight without being of use to it, and what the
        model calls it."""
        strays: list[str] = []
        for name, module in self.modules.items():
            for tensor in module.stray:
                strays += [tensor, self._names[name] + tensor.removeprefix(name)]
        return tuple(dict.fromkeys(strays))

    def strays_by_kind(self) -> dict[str, int]:
        """The same: the file's name with its numbers folded -> how many."""
        tensors = (tensor for module in self.modules.values() for tensor in module.stray)
        return dict(Counter(map(fold, tensors)))


def expert_first(name: str) -> str:
    """experts.up_proj.3 -> experts.3.up_proj, which is what models ask for."""
    return PROJECTION_FIRST.sub(r"\1experts.\3.\2\4", name)


def _without_block(name: str) -> str:
    return _BLOCK_OF_EXPERTS.sub(r"\1.*.experts", name)


def _in_any_block(name: str) -> str:
    return _BLOCK.sub(r"\1.*.", name)


def _parts(name: str) -> set[str]:
    """Each once: vLLM's Whisper calls a layer .decoder.layers.0.layers.mlp.fc1."""
    return {*name.split(".")} - {""}


def _key(name: str) -> tuple[str, tuple[str, ...]]:
    parts = name.split(".")
    return parts[-1], tuple(part for part in parts if part.isdecimal())
