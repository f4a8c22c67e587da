# SPDX-License-Identifier: Apache-2.0
"""``vllm-nvfp4 inspect MODEL``: what a checkpoint holds and what will run it, layer by layer.

Reads configuration and headers only: no weights, no GPU, and of a quantised checkpoint neither
torch nor vLLM. Of one in 16 bits it asks vLLM what it will quantise.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from vllm_nvfp4.checkpoints.detect import read_config
from vllm_nvfp4.checkpoints.inventory import EMBEDDING, HEAD, LINEAR, OTHER, Inventory, LayerRecord
from vllm_nvfp4.checkpoints.online import OnlineDialect
from vllm_nvfp4.checkpoints.skeleton import folder_or_skeleton
from vllm_nvfp4.checkpoints.spec import LayerKind
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.cli._inspect_text import print_tables
from vllm_nvfp4.cli._online import ask_online, remark
from vllm_nvfp4.gpus import Gpu
from vllm_nvfp4.kernels import paths
from vllm_nvfp4.options import Options
from vllm_nvfp4.planning.cards import find_card
from vllm_nvfp4.planning.families import extra_bytes
from vllm_nvfp4.planning.model import VOCAB_PADDING, held_bytes

# Of the object that --json prints: docs/json.md.
SCHEMA = 1
_PART_TITLES = {
    LINEAR: "linear layers",
    HEAD: "lm_head",
    EMBEDDING: "embedding",
    OTHER: "norms and others",
}
# Of a row, what adds up.
_ADDED = ("count", "num_weights", "num_bytes", "held_bytes")
# Parts of a fused layer that share the AWQ scales or the rotation of its first part.
_LATER_PARTS = ("k_proj", "v_proj", "up_proj", "w3", "kv_a_proj_with_mqa")


@dataclass(frozen=True)
class Row:
    """One line of the table: a layer, or several alike.

    bits_per_weight: of the stored tensors, scales included
    held_bytes:      of GPU memory that the layer takes once it is loaded
    path:            what runs the layer
    """

    name: str
    count: int
    part: str
    format: str
    algo: str
    shape: tuple[int, ...]
    num_weights: int
    num_bytes: int
    held_bytes: int
    path: str
    files: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / max(self.num_weights, 1)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"bits_per_weight": round(self.bits_per_weight, 4)}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="show what a checkpoint holds and what will run it",
        description="Show, layer by layer, how a checkpoint is stored and what will run it. Reads "
        "headers only: no GPU, no weights.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, or a hub name")
    parser.add_argument("--gpu", default="RTX 4090",
                        help="the card that would run it (default: RTX 4090)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--all", action="store_true", help="one row per layer; do not fold layers that are alike"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table, or JSON; 0. A CheckpointError for a bad checkpoint goes to the caller."""
    gpu = find_card(args.gpu)
    with folder_or_skeleton(args.model) as folder:
        config, quant_config = read_config(folder)
        inventory = validate(folder, config, quant_config)
        online = None
        if inventory.dialect == OnlineDialect.name:
            online = ask_online(folder, inventory.layers)
            inventory = replace(inventory, layers=online.settle(inventory.layers))
    options = Options.resolve()
    rows = [_row([layer], options, inventory) for layer in inventory.layers]
    if not args.all:
        rows = fold(rows)
    four_bits = four_bit_paths(inventory, options, gpu)
    if args.json:
        added = {
            "gpu": gpu.name,
            "four_bit_paths": four_bits,
            "online_by": online and online.source,
        }
        json.dump(_as_json(inventory, rows) | added, sys.stdout, indent=2)
        print()
    else:
        remarks = ["lm_head is the embedding's weight (tied)."] * inventory.tied_embeddings
        remarks += [f"{kind} on {gpu.name}: {path}." for kind, path in four_bits.items()]
        remarks += [remark(online)] if online else []
        print_tables(_title(inventory, config), rows, totals(rows), remarks)
    return 0


def fold(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ only in the layer's number become one, layers.{0-27}."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (re.sub(r"\d+", "#", row.name), row.part, row.format, row.algo, row.shape, row.path)
        groups.setdefault(key, []).append(row)
    return [_sum(rows, name=_folded_name([row.name for row in rows])) for rows in groups.values()]


def _sum(rows: Sequence[Row], **others: Any) -> Row:
    """One row for several: the first one's, but for what adds up and for ``others``."""
    added = {n: sum(getattr(row, n) for row in rows) for n in _ADDED}
    files = tuple(sorted({file for row in rows for file in row.files}))
    return replace(rows[0], files=files, **added, **others)


def _folded_name(names: Sequence[str]) -> str:
    """model.layers.0.x, model.layers.1.x, model.layers.3.x -> model.layers.{0-1,3}.x"""
    parts = [re.split(r"(\d+)", name) for name in names]
    columns = zip(*parts, strict=True)
    return "".join(
        column[0] if len(set(column)) == 1 else "{" + _ranges(int(n) for n in set(column)) + "}"
        for column in columns
    )


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _row(layers: Sequence[LayerRecord], options: Options, inventory: Inventory) -> Row:
    layer = layers[0]
    return Row(
        layer.name,
        len(layers),
        layer.part,
        layer.format,
        layer.spec.algo,
        layer.shape,
        layer.num_weights,
        layer.num_bytes,
        held_bytes_of(layer, options, inventory.tied_embeddings),
        path_of(layer, options, inventory.tied_embeddings),
        layer.files,
    )


def path_of(layer: LayerRecord, options: Options, tied_embeddings: bool = False) -> str:
    """What runs the layer under these options, in a few words."""
    spec = layer.spec
    if spec.kind is LayerKind.WIDENED:
        return "vLLM, widened to 16 bits while loading"
    if spec.kind is LayerKind.FP8:
        return f"FP8 kernel, {'W8A16' if layer.part in (HEAD, EMBEDDING) else 'W8A8'}"
    if spec.kind is LayerKind.MICROSCALED:
        is_experts = _are_experts(layer)
        kernel = "grouped kernel" if is_experts else "kernel"
        bits = {"auto": "W4A16 or W4A8 by batch size", "16": "W4A16", "8": "W4A8"}
        extra = ", rotated activations" if spec.hadamard_size else ""
        return f"{layer.format} {kernel}, {bits[options.activation]}{extra}"
    choice = _choice_while_loading(layer, options, tied_embeddings)
    if choice == "keep":
        return f"vLLM, {layer.format}"
    method = f" ({options.online_method})" if spec.kind is LayerKind.ONLINE else ""
    return f"quantised to {choice} while loading{method}"


def four_bit_paths(inventory: Inventory, options: Options, gpu: Gpu) -> dict[str, str]:
    """Kind of four-bit layers that the checkpoint has, or will have once it is quantised -> which
    kernel runs them on the card, and why."""
    kinds = {"4-bit linear layers": False, "4-bit experts": True}
    are_experts = {
        _are_experts(layer)
        for layer in inventory.layers
        if layer.part == LINEAR and _is_four_bits(layer)
    }
    return {
        kind: paths.describe_on(gpu, options, experts)
        for kind, experts in kinds.items()
        if experts in are_experts
    }


def _are_experts(layer: LayerRecord) -> bool:
    return "experts" in layer.name.split(".")


def _is_four_bits(layer: LayerRecord) -> bool:
    return layer.spec.kind in (LayerKind.ONLINE, LayerKind.MICROSCALED)


def _choice_while_loading(layer: LayerRecord, options: Options, tied_embeddings: bool) -> str:
    """The format that a 16-bit layer is quantised to as it loads, or keep."""
    if layer.spec.kind is LayerKind.ONLINE:
        return options.online_format
    choice = {HEAD: options.lm_head, EMBEDDING: options.embedding}.get(layer.part, "keep")
    if layer.part == EMBEDDING and tied_embeddings and choice == "keep":
        choice = options.lm_head
    return choice


def held_bytes_of(layer: LayerRecord, options: Options, tied_embeddings: bool = False) -> int:
    """Bytes of GPU memory for the layer once it is loaded, as ``plan`` counts them."""
    if layer.part == OTHER or len(layer.shape) < 2:
        return layer.num_bytes
    *leading, n, k = layer.shape
    if layer.part in (HEAD, EMBEDDING):
        n = -(-n // VOCAB_PADDING) * VOCAB_PADDING
    if layer.spec.kind in (LayerKind.FP8, LayerKind.MICROSCALED):
        fmt = layer.format
    else:
        is_widened = layer.spec.kind is LayerKind.WIDENED
        choice = "keep" if is_widened else _choice_while_loading(layer, options, tied_embeddings)
        fmt = "bf16" if choice == "keep" else choice
    held = prod(leading) * held_bytes(n, k, fmt) + layer.bias_bytes
    if layer.name.rpartition(".")[2] not in _LATER_PARTS:
        held += extra_bytes(layer.spec, k)
    # vLLM keeps this one a second time in 16 bits, cut per head, for decoding.
    return held + (2 * n * k if layer.name.endswith("kv_b_proj") else 0)


def _as_json(inventory: Inventory, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "folder": inventory.folder,
        "dialect": inventory.dialect,
        "kv_cache": inventory.kv_cache,
        "tied_embeddings": inventory.tied_embeddings,
        "layers": [row.to_json() for row in rows],
        "totals": [row.to_json() for row in totals(rows)],
    }


def totals(rows: Sequence[Row]) -> list[Row]:
    """One row for each part and format, then one for everything."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.part, row.format), []).append(row)
    order = list(_PART_TITLES)
    keys = sorted(groups, key=lambda key: (order.index(key[0]), key[1]))
    none: dict[str, Any] = {"algo": "", "shape": (), "path": ""}
    summed = [_sum(groups[part, fmt], name=_PART_TITLES[part], **none) for part, fmt in keys]
    return [*summed, _sum(rows, name="all", part="all", format="", **none)]


def _title(inventory: Inventory, config: dict[str, Any]) -> str:
    architecture = ", ".join(config.get("architectures") or ["unknown architecture"])
    asked = inventory.kv_cache
    kv_cache = f"asks for an {asked} KV cache" if asked else "no KV cache scheme"
    return f"{inventory.folder}: {architecture}, dialect {inventory.dialect}, {kv_cache}"
