# SPDX-License-Identifier: Apache-2.0
"""Check a checkpoint against its own configuration, from headers alone, before anything loads.

Every complaint names the file, the tensor or layer, what was found, what was needed and what to
do. What needs the values (NaN or negative scales) is checked in ``convert``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

from vllm_nvfp4.checkpoints.census import Census
from vllm_nvfp4.checkpoints.detect import detect
from vllm_nvfp4.checkpoints.experts import check_experts
from vllm_nvfp4.checkpoints.fields import as_table
from vllm_nvfp4.checkpoints.forms import tile_size
from vllm_nvfp4.checkpoints.headers import TensorHeader, read_headers
from vllm_nvfp4.checkpoints.inventory import (
    EMBEDDING,
    LINEAR,
    Inventory,
    LayerRecord,
    part_of,
    record,
    records_of,
    weight_of,
)
from vllm_nvfp4.checkpoints.modules import StoredModule, unknown_form
from vllm_nvfp4.checkpoints.mxfp4 import SPEC, stacked_record
from vllm_nvfp4.checkpoints.spec import (
    UNQUANTIZED,
    CheckpointError,
    Dialect,
    LayerKind,
    LayerSpec,
    Role,
    TensorSpec,
    describe,
    fold,
)
from vllm_nvfp4.checkpoints.stacks import PROJECTIONS

# The fused layers of most models; a model class has its own table.
PACKED_MODULES: Mapping[str, Sequence[str]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

_QUANTIZE_AGAIN = "Quantise the model again, or download it again if others can load it."
# Stored beside a weight without being part of its format.
_HARMLESS = {"weight", "bias", "k_scale", "v_scale", "q_scale", "k_bias", "v_bias"}
_NOT_LANGUAGE = ("vision", "visual", "audio", "mtp", "encoder", "image", "projector", "draft")

Modules = Mapping[str, Mapping[str, TensorHeader]]


def validate(
    folder: Path,
    config: Mapping[str, Any],
    quant_config: Mapping[str, Any] | None,
    packed_modules: Mapping[str, Sequence[str]] = PACKED_MODULES,
    dialect: Dialect | None = None,
    census: Census | None = None,
) -> Inventory:
    """The checkpoint's inventory, or a CheckpointError for the first thing that is wrong with it.

    config:         config.json
    quant_config:   as :func:`vllm_nvfp4.checkpoints.detect.read_config` gives it
    packed_modules: fused layer -> its shards
    dialect:        of the checkpoint, if it is at hand; it is settled here (see Dialect.settle)
    census:         of the folder, if it is at hand
    """
    if census is None:
        dialect = detect(quant_config) if dialect is None else dialect
        census = take_census(folder, dialect)
    dialect = census.dialect
    modules = {name: module.tensors for name, module in census.modules.items()}
    text = as_table(config.get("text_config"), "config.json", "text_config") or config
    _check_layer_numbers(modules, text.get("num_hidden_layers"))
    names = sorted(modules, key=_by_number)
    records = [record for name in names for record in _check_module(census.modules[name], text)]
    check_experts(records, modules, text)
    _check_some_quantized(records, dialect, census)
    _check_fused(records, packed_modules, text)
    return Inventory(
        str(folder),
        dialect.name,
        dialect.kv_cache.dtype,
        bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        tuple(records),
    )


def take_census(folder: Path, dialect: Dialect) -> Census:
    """The census of a folder."""
    return Census(read_headers(folder), dialect)


def _check_module(module: StoredModule, config: Mapping[str, Any]) -> list[LayerRecord]:
    """Check one module's tensors; its records, with UNQUANTIZED as spec where it is stored so."""
    name, tensors, spec = module.name, module.tensors, module.stored
    if spec is SPEC:
        return [stacked_record(name, tensors, config)]
    if spec is None:
        if not _is_beside_the_model(name, config):
            raise unknown_form(module)
        return records_of(name, tensors, UNQUANTIZED)
    if spec.is_quantized:
        _check_tensors(name, tensors, spec)
        return [record(name, tensors, spec)]
    _check_strays(name, tensors)
    part = part_of(name, weight_of(tensors, spec)[1])
    keeps = spec.kind is LayerKind.ONLINE and part == LINEAR
    return records_of(name, tensors, spec if keeps else UNQUANTIZED)


def _check_strays(name: str, tensors: Mapping[str, TensorHeader]) -> None:
    """A 16-bit weight beside a tensor that would have to be multiplied in."""
    if "weight" in tensors and (header := tensors.get("pre_quant_scale")) is not None:
        raise CheckpointError(
            header.file,
            f"{name}.pre_quant_scale",
            "an AWQ scale beside a 16-bit weight",
            "the weight that it belongs to, quantised, or no scale",
            "It would be left out of the product: " + _QUANTIZE_AGAIN,
        )


def _check_tensors(name: str, tensors: Mapping[str, TensorHeader], spec: LayerSpec) -> None:
    """Names, dtypes and shapes of a quantised layer's tensors."""
    some_file = next(iter(tensors.values())).file
    for tensor in spec.tensors:
        header = tensors.get(tensor.name)
        if header is None and not tensor.optional:
            raise CheckpointError(
                some_file,
                f"{name}.{tensor.name}",
                "no such tensor; the layer has " + ", ".join(sorted(tensors)),
                f"{tensor.dtypes[0]}, for {describe(spec)}",
                _QUANTIZE_AGAIN,
            )
        if header is not None and header.dtype not in tensor.dtypes:
            raise CheckpointError(
                header.file,
                f"{name}.{tensor.name}",
                f"dtype {header.dtype}",
                " or ".join(tensor.dtypes),
                _QUANTIZE_AGAIN,
            )
    known = {t.name for t in spec.tensors} | _HARMLESS
    for leaf, header in tensors.items():
        if leaf not in known:
            raise CheckpointError(
                header.file,
                f"{name}.{leaf}",
                f"a tensor that {describe(spec)} does not have",
                "only " + ", ".join(t.name for t in spec.tensors),
                "It would be left out of the product: " + _QUANTIZE_AGAIN,
            )
    _check_shapes(name, tensors, spec)


def _check_shapes(name: str, tensors: Mapping[str, TensorHeader], spec: LayerSpec) -> None:
    main_role = Role.CODES if spec.kind is LayerKind.MICROSCALED else Role.WEIGHT
    main = _present(tensors, spec, main_role)
    may_be_experts = name.rpartition(".")[2] in PROJECTIONS
    if main is None or len(main[1].shape) not in ((2, 3) if may_be_experts else (2,)):
        header = main[1] if main else next(iter(tensors.values()))
        needed_shape = "[N, K], or [E, N, K] of experts" if may_be_experts else "[N, K]"
        raise CheckpointError(
            header.file, name, f"shape {list(header.shape)}", needed_shape, _QUANTIZE_AGAIN
        )
    *rows, cols = main[1].shape
    if main_role is Role.CODES:
        cols *= 2
    block = max(spec.scale_block, spec.hadamard_size, 1)
    if cols % block:
        raise CheckpointError(
            main[1].file,
            f"{name}.{main[0].name}",
            f"K={cols}",
            f"a multiple of the block of {block}",
            "Quantise the model again with this layer left as it is (ignore list).",
        )
    needed: dict[Role, tuple[int, ...]] = {
        Role.BLOCK_SCALE: (*rows, cols // max(spec.scale_block, 1)),
        Role.OFFSET: (*rows, cols // max(spec.scale_block, 1)),
        Role.PRE_SCALE: (cols,),
        Role.HADAMARD: (spec.hadamard_size,) * 2,
    }
    # Of a stack, one value for all experts, for each, or for gate and up of each.
    scalars = {1} if len(rows) == 1 else {1, prod(rows[:-1]), 2 * prod(rows[:-1])}
    counts = {
        Role.GLOBAL_SCALE: scalars,
        Role.GLOBAL_DIVISOR: scalars,
        Role.WEIGHT_SCALE: scalars,
        Role.ROW_SCALE: {prod(rows)},
    }
    for tensor in spec.tensors:
        if tensor.name not in tensors:
            continue
        header = tensors[tensor.name]
        shape, count = needed.get(tensor.role), counts.get(tensor.role)
        if tensor.role is Role.TILE_SCALE:
            stack = tuple(rows[:-1])  # experts, where they are stacked
            scales = header.shape[len(stack) :] if stack else header.shape
            if not tile_size((rows[-1], cols), scales) or header.shape[: len(stack)] != stack:
                shape = (*stack, *(-(-size // 128) for size in (rows[-1], cols)))
        if (shape and header.shape != shape) or (count and prod(header.shape) not in count):
            raise CheckpointError(
                header.file,
                f"{name}.{tensor.name}",
                f"shape {list(header.shape)}",
                f"{list(shape)}" if shape else _values(count or ()),
                f"The weight is [N, K] = {[*rows, cols]}. {_QUANTIZE_AGAIN}",
            )


def _values(counts: Collection[int]) -> str:
    return " or ".join(f"{n} value{'s' if n != 1 else ''}" for n in sorted(counts))


def _present(
    tensors: Mapping[str, TensorHeader], spec: LayerSpec, role: Role
) -> tuple[TensorSpec, TensorHeader] | None:
    tensor = spec.tensor(role)
    return (tensor, tensors[tensor.name]) if tensor and tensor.name in tensors else None


def _check_some_quantized(records: Iterable[LayerRecord], dialect: Dialect, census: Census) -> None:
    """A configuration that quantises, over files that hold nothing but 16 bits, is of another
    model: which of the two is meant cannot be told."""
    if not dialect.has_microscaled_layers():
        return
    first = None
    for record_ in records:
        if record_.spec.is_quantized:
            return
        if first is None and record_.part == LINEAR:
            # A stack of experts is a tensor of its module's, with a record of its own.
            module = census.modules.get(record_.name)
            module = module or census.modules[record_.name.rpartition(".")[0]]
            first = (record_, module) if module.said.is_quantized else None
    if first is not None:
        layer, module = first
        tensors = ", ".join(sorted(module.tensors))
        raise CheckpointError(
            layer.files[0],
            layer.name,
            f"a {layer.format} weight, with the tensors {tensors}, and no quantised layer at all",
            f"{describe(module.said)}, as the quantization config says",
            "Remove the quantization config if the weights are meant to be in 16 bits, or restore "
            "the quantised files.",
        )


def _check_fused(
    records: Sequence[LayerRecord],
    packed_modules: Mapping[str, Sequence[str]],
    config: Mapping[str, Any],
) -> None:
    """The shards of a fused layer are all there."""
    by_name = {r.name: r for r in records if r.part != EMBEDDING}
    usual = {fold(name) for name in by_name}
    absent = {name for name in _layers_without(by_name, packed_modules) if fold(name) in usual}
    absent -= _absent_by_kind(absent, config)
    for fused, shards in packed_modules.items():
        if len(shards) < 2:
            continue
        parents = {n.rpartition(".")[0] for n in by_name if n.rpartition(".")[2] in shards}
        for parent in sorted(parents):
            names = [f"{parent}.{shard}" if parent else shard for shard in shards]
            present = [by_name[n] for n in names if n in by_name]
            is_quantized = any(r.spec.is_quantized for r in present)
            missing = [n for n in names if n in absent and is_quantized]
            if missing:
                found = [f"{r.name.rpartition('.')[2]} {r.format}" for r in present]
                found += [f"no {n.rpartition('.')[2]}" for n in missing]
                raise CheckpointError(
                    present[0].files[0],
                    f"{parent}.{fused}",
                    ", ".join(found),
                    f"{', '.join(shards)} all there: they are one layer",
                    "Download the missing files, or quantise the model again with all of them.",
                )


def _layers_without(
    names: Iterable[str], packed_modules: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """The shards of fused layers that are in part in the files, and are not there themselves."""
    names = set(names)
    for shards in packed_modules.values():
        for name in names:
            parent, _, leaf = name.rpartition(".")
            if leaf in shards:
                others = (f"{parent}.{shard}" if parent else shard for shard in shards)
                yield from (other for other in others if other not in names)


def _absent_by_kind(absent: Iterable[str], config: Mapping[str, Any]) -> set[str]:
    """Those of the absent shards that the model leaves out in every layer of one kind, as Gemma-4
    does with v_proj where the values of full attention are its keys."""
    kinds = config.get("layer_types")
    if not isinstance(kinds, list):
        return set()
    numbers: dict[str, dict[int, str]] = defaultdict(dict)
    for name in absent:
        if match := re.search(r"(?:^|\.)layers\.(\d+)\.", name):
            numbers[fold(name)][int(match[1])] = name
    found: set[str] = set()
    for by_number in numbers.values():
        without = {str(kinds[n]) for n in by_number if n < len(kinds)}
        if {n for n, kind in enumerate(kinds) if str(kind) in without} == by_number.keys():
            found |= set(by_number.values())
    return found


def _check_layer_numbers(modules: Modules, num_layers: object) -> None:
    """All of 0..num_hidden_layers-1 are in the files."""
    if type(num_layers) is not int:
        return
    if num_layers < 1:
        raise CheckpointError(
            "config.json", "num_hidden_layers", num_layers, "1 or more", "Correct config.json."
        )
    stacks: dict[str, set[int]] = defaultdict(set)
    for name in modules:
        match = re.search(r"(?:^|\.)(layers|h|blocks)\.(\d+)(?:\.|$)", name)
        if match and not any(word in name[: match.start(2)] for word in _NOT_LANGUAGE):
            stacks[name[: match.start(2)]].add(int(match.group(2)))
    if not stacks:
        return
    prefix, found = max(stacks.items(), key=lambda item: len(item[1]))
    num_found = sum(number < num_layers for number in found)
    if num_found < num_layers:
        # Counted off lazily: a configuration may claim any number of layers.
        missing = list(islice((n for n in range(num_layers) if n not in found), 9))
        files = sorted({h.file for tensors in modules.values() for h in tensors.values()})
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise CheckpointError(
            files[0] if len(files) == 1 else f"{files[0]} ... {files[-1]}",
            f"{prefix}<n>",
            f"{num_found} of {num_layers} layers, without {shown}",
            f"layers 0 to {num_layers - 1}, as num_hidden_layers of config.json says",
            "Download the missing files, or correct config.json.",
        )


def _is_beside_the_model(name: str, config: Mapping[str, Any]) -> bool:
    """Draft layers for multi-token prediction, which a server leaves out: "mtp.*" modules, and
    layers numbered past the last one."""
    match = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    num_layers = config.get("num_hidden_layers")
    if match and type(num_layers) is int and int(match.group(1)) >= num_layers:
        return True
    return "mtp" in name.split(".")


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sort key under which layers.2 comes before layers.10."""
    return [(int(p), "") if p.isdecimal() else (0, p) for p in re.split(r"(\d+)", name)]
