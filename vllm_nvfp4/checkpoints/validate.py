# SPDX-License-Identifier: Apache-2.0
"""Check a checkpoint against its own configuration, from headers alone, before anything loads.

Every complaint names the file, the tensor or layer, what was found, what was needed and what to
do. What needs the values (NaN or negative scales) is checked in ``convert``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

from vllm_nvfp4.checkpoints.detect import detect
from vllm_nvfp4.checkpoints.experts import check_experts
from vllm_nvfp4.checkpoints.fields import as_table
from vllm_nvfp4.checkpoints.headers import TensorHeader, read_headers
from vllm_nvfp4.checkpoints.inventory import (
    EMBEDDING,
    LINEAR,
    Inventory,
    LayerRecord,
    part_of,
    record,
    weight_of,
)
from vllm_nvfp4.checkpoints.mxfp4 import Mxfp4Dialect, is_stacked, stacked_record
from vllm_nvfp4.checkpoints.spec import (
    UNQUANTIZED,
    CheckpointError,
    Dialect,
    LayerKind,
    LayerSpec,
    Role,
    TensorSpec,
    describe,
)

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
) -> Inventory:
    """The checkpoint's inventory, or a CheckpointError for the first thing that is wrong with it.

    config:         config.json
    quant_config:   as :func:`vllm_nvfp4.checkpoints.detect.read_config` gives it
    packed_modules: fused layer -> its shards
    dialect:        of the checkpoint, if it is at hand; it is settled here (see Dialect.settle)
    """
    headers = read_headers(folder)
    dialect = detect(quant_config) if dialect is None else dialect
    dialect.settle({name: header.shape for name, header in headers.items()})
    modules = group_by_module(headers)
    text = as_table(config.get("text_config"), "config.json", "text_config") or config
    _check_layer_numbers(modules, text.get("num_hidden_layers"), headers)
    _check_named_layers(dialect, modules)
    names = sorted(modules, key=_by_number)
    records = [_check_module(name, modules[name], dialect, text) for name in names]
    check_experts(records, modules, text)
    _check_left_out(records, modules, dialect)
    _check_fused(records, packed_modules)
    return Inventory(
        str(folder),
        dialect.name,
        dialect.kv_cache.dtype,
        bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        tuple(records),
    )


def group_by_module(headers: Mapping[str, TensorHeader]) -> dict[str, dict[str, TensorHeader]]:
    """module name -> leaf name -> header."""
    modules: dict[str, dict[str, TensorHeader]] = defaultdict(dict)
    for name, header in headers.items():
        module, _, leaf = name.rpartition(".")
        modules[module][leaf] = header
    return dict(modules)


def _check_module(
    name: str, tensors: Mapping[str, TensorHeader], dialect: Dialect, config: Mapping[str, Any]
) -> LayerRecord:
    """Check one module's tensors; its record, with UNQUANTIZED as spec where it is stored so."""
    spec = dialect.layer_spec(name)
    if dialect.name == Mxfp4Dialect.name and is_stacked(tensors):
        return stacked_record(name, tensors, config)
    is_quantized = _is_quantized(tensors)
    if spec.kind in (LayerKind.MICROSCALED, LayerKind.FP8) and is_quantized:
        _check_tensors(name, tensors, spec)
        return record(name, tensors, spec)
    if is_quantized and not _is_beside_the_model(name, config):
        header = _quantized_tensor(tensors)
        raise CheckpointError(
            header.file,
            name,
            f"a quantised weight ({header.dtype} {list(header.shape)})",
            "a 16-bit weight: the quantization config leaves this layer out",
            "Correct the ignore list of the quantization config, or quantise again.",
        )
    part = part_of(name, weight_of(tensors, spec)[1])
    keeps = spec.kind is LayerKind.ONLINE and part == LINEAR
    return record(name, tensors, spec if keeps else UNQUANTIZED)


def _is_quantized(tensors: Mapping[str, TensorHeader]) -> bool:
    """Whether a module's weight is stored in fewer than 16 bits, whole or in part."""
    weight = tensors.get("weight")
    if weight is not None:
        return weight.dtype in ("U8", "F8_E4M3", "F4", "I8") or "weight_scale_2" in tensors
    return any(leaf in tensors for leaf in ("weight_packed", "qweight", "weight_scale", "scales"))


def _quantized_tensor(tensors: Mapping[str, TensorHeader]) -> TensorHeader:
    for leaf in ("weight_packed", "qweight", "weight", "weight_scale", "scales"):
        if leaf in tensors:
            return tensors[leaf]
    raise KeyError("no weight")


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
    if main is None or len(main[1].shape) < 2:
        header = main[1] if main else next(iter(tensors.values()))
        raise CheckpointError(
            header.file, name, f"shape {list(header.shape)}", "[N, K] or more", _QUANTIZE_AGAIN
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
        Role.PRE_SCALE: (cols,),
        Role.HADAMARD: (spec.hadamard_size,) * 2,
    }
    counts = {
        Role.GLOBAL_SCALE: prod(rows[:-1]),
        Role.GLOBAL_DIVISOR: prod(rows[:-1]),
        Role.WEIGHT_SCALE: prod(rows[:-1]),
        Role.ROW_SCALE: prod(rows),
    }
    for tensor in spec.tensors:
        if tensor.name not in tensors:
            continue
        header = tensors[tensor.name]
        shape, count = needed.get(tensor.role), counts.get(tensor.role)
        if (shape and header.shape != shape) or (count and prod(header.shape) != count):
            raise CheckpointError(
                header.file,
                f"{name}.{tensor.name}",
                f"shape {list(header.shape)}",
                f"{list(shape)}" if shape else f"{count} value{'s' if count != 1 else ''}",
                f"The weight is [N, K] = {[*rows, cols]}. {_QUANTIZE_AGAIN}",
            )


def _present(
    tensors: Mapping[str, TensorHeader], spec: LayerSpec, role: Role
) -> tuple[TensorSpec, TensorHeader] | None:
    tensor = spec.tensor(role)
    return (tensor, tensors[tensor.name]) if tensor and tensor.name in tensors else None


def _check_left_out(records: Iterable[LayerRecord], modules: Modules, dialect: Dialect) -> None:
    """A layer that the configuration quantises and that the file holds in 16 bits.

    Not every such module is one: routers, embeddings and encoders are plain modules that no
    configuration lists. It is an error where the same layer is quantised elsewhere in the model,
    and where nothing is quantised at all.
    """
    quantized = {_fold(r.name) for r in records if r.spec.kind is not LayerKind.UNQUANTIZED}
    plain = [
        r
        for r in records
        if r.part == LINEAR
        and r.spec is UNQUANTIZED
        and dialect.layer_spec(r.name).kind in (LayerKind.MICROSCALED, LayerKind.FP8)
    ]
    for layer in plain:
        if quantized and _fold(layer.name) not in quantized:
            continue
        spec = dialect.layer_spec(layer.name)
        raise CheckpointError(
            layer.files[0],
            layer.name,
            f"a {layer.format} weight, with the tensors " + ", ".join(sorted(modules[layer.name])),
            f"{describe(spec)}, as the quantization config says",
            "Add the layer to the config's ignore list if it was left out on purpose, or quantise "
            "again.",
        )


def _check_fused(
    records: Sequence[LayerRecord], packed_modules: Mapping[str, Sequence[str]]
) -> None:
    """The shards of a fused layer are all there, and all stored in the same way."""
    by_name = {r.name: r for r in records if r.part != EMBEDDING}
    usual = {_fold(name) for name in by_name}
    for fused, shards in packed_modules.items():
        if len(shards) < 2:
            continue
        parents = {n.rpartition(".")[0] for n in by_name if n.rpartition(".")[2] in shards}
        for parent in sorted(parents):
            names = [f"{parent}.{shard}" if parent else shard for shard in shards]
            present = [by_name[n] for n in names if n in by_name]
            kinds = {(r.spec.kind, r.spec.fmt, r.spec.scale_block) for r in present}
            is_quantized = any(r.spec.kind is not LayerKind.UNQUANTIZED for r in present)
            missing = [n for n in names if n not in by_name and _fold(n) in usual and is_quantized]
            if len(kinds) > 1 or missing:
                found = [f"{r.name.rpartition('.')[2]} {r.format}" for r in present]
                found += [f"no {n.rpartition('.')[2]}" for n in missing]
                raise CheckpointError(
                    present[0].files[0],
                    f"{parent}.{fused}",
                    ", ".join(found),
                    f"{', '.join(shards)} all there and in one format: they are one layer",
                    "Quantise the model again with all of them alike, or all left out.",
                )


def _check_named_layers(dialect: Dialect, modules: Modules) -> None:
    """Each layer that the configuration names in full is in the files."""
    present = {_canonical(name) for name in modules}
    parents = {name[: m.start()] for name in present for m in re.finditer(r"\.", name)}
    for name in dialect.named_layers():
        if _canonical(name) not in present and _canonical(name) not in parents:
            raise CheckpointError(
                "quantization config",
                name,
                "no such layer in the files",
                "a layer of the checkpoint",
                "Correct the name in the quantization config, or restore the missing file.",
            )


def _check_layer_numbers(
    modules: Modules, num_layers: object, headers: Mapping[str, TensorHeader]
) -> None:
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
        files = sorted({h.file for h in headers.values()})
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


def _fold(name: str) -> str:
    """The name with its numbers replaced: the same for every layer of a stack."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sort key under which layers.2 comes before layers.10."""
    return [(int(p), "") if p.isdecimal() else (0, p) for p in re.split(r"(\d+)", name)]


def _canonical(name: str) -> str:
    """Without the wrappers that differ between a model's name for a layer and the file's."""
    return re.sub(r"^(?:(?:model|language_model|transformer)\.)+", "", name)
