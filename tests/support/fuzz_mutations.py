# SPDX-License-Identifier: Apache-2.0
"""Damage done to a checkpoint in memory: each mutation is a function of the files and a generator.

The same seed gives the same damage on every machine, so that (seed name, mutations, number) is all
that a found case needs to be kept (tests/corpus/loader.json.xz).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

from fuzz_files import Files, Node, join_header, split_header, weight_files, with_data

INDEX = "model.safetensors.index.json"
Mutation = Callable[[Files, Random], None]
MUTATIONS: dict[str, Mutation] = {}

_BLOCK_SCALES = ("weight_scale", "scales")
_GLOBAL_SCALES = ("weight_scale_2", "weight_global_scale", "weight_scale", "input_scale")
_MATRICES = ("pre_quant_scale", "forward_hadamard_matrix")
_FLOAT_BITS = (0x7FC00000, 0x7F800000, 0xFF800000, 0xBF800000, 0, 0x80000000, 1, 0x7F7FFFFF)
_DTYPES = ("U8", "F8_E4M3", "F8_E8M0", "F4", "BF16", "F16", "F32", "F64", "I64", "BOOL", "C64", "x")
HUGE = 10**12
NAMES = ("", ".", "..", "weight", ".weight", "a.\n\x1b[31m.weight", "\ud800", "a" * 5000, "\0")
ESCAPES = (
    "../outside/secret.safetensors",
    "/etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "a/../../outside/secret.safetensors",
    "..\\outside\\secret.safetensors",
    "./model.safetensors",
    "sub/model.safetensors",
    "https://host.invalid/x.safetensors",
    INDEX,
    "config.json",
    ".",
    "",
    "\0",
    "x" * 300,
)
_PATTERNS = (
    "re:(a+)+$",
    "re:(.*)*(.*)*(.*)*z",
    "re:(",
    "re:" + "(?:" * 200,
    "re:.*",
    "re:(\\w|\\.|_)+!",
    "*" * 200,
    "*a*e*o*l*.*_*" * 8 + "!",
    "[",
    "",
    "Linear",
    "model",
)


def mutation(function: Mutation) -> Mutation:
    MUTATIONS[function.__name__] = function
    return function


def garbage(rng: Random, depth: int = 0) -> Any:
    """A JSON value that nobody expects in its place."""
    scalars = (
        None, True, False, 0, -1, 1, 16, 32, 4.5, HUGE, -HUGE, 2**63, 10**400, 1e308, float("nan"),
        float("inf"), "", "NVFP4", "16", "fp8", "float", "\n", "x" * 4000, *NAMES, *_PATTERNS,
    )  # fmt: skip
    choice = rng.randrange(8)
    if depth > 2 or choice < 5:
        return rng.choice(scalars)
    if choice == 5:
        return [garbage(rng, depth + 1) for _ in range(rng.randrange(4))]
    if choice == 6:
        return {str(rng.choice(scalars)): garbage(rng, depth + 1) for _ in range(rng.randrange(4))}
    return nested(rng.choice((3, 50, 400)))


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


# --- bytes -----------------------------------------------------------------------------------


def _some_file(files: Files, rng: Random) -> str:
    names = [name for name, node in files.items() if node.kind == "file" and node.data]
    return rng.choice(sorted(names)) if names else "config.json"


def _bytes_of(files: Files, name: str) -> bytearray:
    """A copy to damage, of one byte at least."""
    return bytearray(files[name].data if name in files else b"") or bytearray(b"{}")


@mutation
def flip_bits(files: Files, rng: Random) -> None:
    name = _some_file(files, rng)
    data = _bytes_of(files, name)
    # Half of the flips hit the header: data is by far the larger part.
    end = min(len(data), 4000) if rng.random() < 0.5 else len(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    with_data(files, name, bytes(data))


@mutation
def truncate(files: Files, rng: Random) -> None:
    name = _some_file(files, rng)
    data = files[name].data if name in files else b""
    cut = rng.choice((0, 1, 7, 8, 9, len(data) // 2, max(len(data) - 1, 0)))
    with_data(files, name, data[:cut])


@mutation
def extend(files: Files, rng: Random) -> None:
    name = _some_file(files, rng)
    data = files[name].data if name in files else b""
    with_data(files, name, data + rng.choice((b"\0", b" ", b"}", b"\xff" * 4096)))


@mutation
def overwrite(files: Files, rng: Random) -> None:
    name = _some_file(files, rng)
    data = _bytes_of(files, name)
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((1, 4, 16, 256)))
    data[start:end] = rng.choice((b"\0", b"\xff", b"\x7f", b"[", b'"')) * (end - start)
    with_data(files, name, bytes(data))


@mutation
def lie_about_header_length(files: Files, rng: Random) -> None:
    name = rng.choice(weight_files(files) or ["model.safetensors"])
    data = files[name].data if name in files else b""
    true = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    length = rng.choice((0, 1, 2, true - 1, true + 1, true + 8, 10**8, 2**40, 2**63, 2**64 - 1))
    with_data(files, name, struct.pack("<Q", length % 2**64) + data[8:])


# --- the folder ------------------------------------------------------------------------------


@mutation
def remove_file(files: Files, rng: Random) -> None:
    files.pop(rng.choice(sorted(files)), None) if files else None


@mutation
def odd_file(files: Files, rng: Random) -> None:
    """A link, a pipe, a folder or a huge sparse file in a file's place."""
    name = rng.choice(sorted({*files, INDEX, "hf_quant_config.json"}))
    links = ("../outside/secret.json", "../outside/secret.safetensors", "/etc/passwd", "/dev/zero")
    targets = (*links, name, ".", "missing", "config.json")
    nodes = [Node(target.encode(), "link") for target in targets]
    nodes += [Node(kind="fifo"), Node(kind="folder"), Node(b"[" * 200_000), Node(b"{" * 9)]
    nodes += [Node(b"", size=2**35), Node(struct.pack("<Q", 10**8), size=2**30)]
    files[name] = rng.choice(nodes)


@mutation
def second_copy(files: Files, rng: Random) -> None:
    """Every tensor of a file once more, in another file."""
    names = weight_files(files)
    if names:
        files[rng.choice(("a.safetensors", "model-2.safetensors", "z.safetensors"))] = files[
            rng.choice(names)
        ]


@mutation
def cycle_of_links(files: Files, rng: Random) -> None:
    names = weight_files(files) or ["model.safetensors"]
    name = rng.choice(names)
    files[name] = Node(b"other.safetensors", "link")
    files["other.safetensors"] = Node(name.encode(), "link")


# --- the header ------------------------------------------------------------------------------


def _edit_header(files: Files, rng: Random, edit: Callable[[dict[str, Any], bytes], Any]) -> None:
    names = weight_files(files)
    if not names:
        return
    name = rng.choice(names)
    try:
        header, body = split_header(files[name].data)
    except (ValueError, RecursionError):
        return
    if not header:
        return
    new = edit(header, body)
    header, body = new if isinstance(new, tuple) else (header, body)
    with_data(files, name, join_header(header, body))


def _tensor(header: dict[str, Any], rng: Random, leaves: tuple[str, ...] = ()) -> str | None:
    names = [
        name
        for name, entry in header.items()
        if isinstance(entry, dict)
        and "data_offsets" in entry
        and (not leaves or name.rpartition(".")[2] in leaves)
    ]
    return rng.choice(sorted(names)) if names else None


@mutation
def header_lie(files: Files, rng: Random) -> None:
    """Another dtype, shape or place of one tensor, or garbage in their stead."""

    def edit(header: dict[str, Any], body: bytes) -> None:
        name = _tensor(header, rng)
        if name is None:
            return
        entry = dict(header[name])
        shape = entry["shape"] if isinstance(entry.get("shape"), list) else []
        start, end = (*entry["data_offsets"], 0, 0)[:2] if entry["data_offsets"] else (0, 0)
        lies: list[dict[str, Any]] = [
            {"dtype": rng.choice(_DTYPES)},
            {"shape": shape[::-1]},
            {"shape": [*shape, 1]},
            {"shape": shape[1:]},
            {"shape": [HUGE, *shape]},
            {"shape": [2**62, 4, *shape]},
            {"shape": [-s if isinstance(s, int) else 1 for s in shape]},
            {"shape": [0, 2**63]},
            {"shape": [1] * 3000 + shape},
            {"data_offsets": [end, start]},
            {"data_offsets": [0, len(body)]},
            {"data_offsets": [-8, 0]},
            {"data_offsets": [start, HUGE]},
            {"data_offsets": [2**64, 2**64]},
            {"data_offsets": [start]},
            {rng.choice(("dtype", "shape", "data_offsets")): garbage(rng)},
        ]
        header[name] = {**entry, **rng.choice(lies)}

    _edit_header(files, rng, edit)


@mutation
def rename_tensor(files: Files, rng: Random) -> None:
    def edit(header: dict[str, Any], body: bytes) -> None:
        name = _tensor(header, rng)
        if name is None:
            return
        module, _, leaf = name.rpartition(".")
        other = _tensor(header, rng) or name
        number = rng.choice((2, 99, HUGE))
        new = rng.choice(
            (
                *NAMES,
                f"{module}.x",
                f"{other.rpartition('.')[0]}.{leaf}",
                f"mtp.{name}",
                f"model.layers.{number}.mlp.up_proj.weight",
                f"model.layers.0.mlp.experts.{number}.up_proj.weight",
                f"model.layers.{'9' * 5000}.mlp.up_proj.weight",
                f"vision_tower.{name}",
                name.upper(),
            )
        )
        header[new] = header.pop(name)

    _edit_header(files, rng, edit)


@mutation
def strange_header(files: Files, rng: Random) -> None:
    """JSON that is odd as a whole: a name twice, deep nesting, strange metadata, another type."""

    def edit(header: dict[str, Any], body: bytes) -> Any:
        name = _tensor(header, rng)
        text = json.dumps(header)
        twice = json.dumps({name: header.get(name)})[1:] if name else "}"
        texts = (
            text[:-1] + ", " + twice,
            json.dumps({"__metadata__": garbage(rng), **header}),
            "[" * 100_000,
            '{"a":' * 50_000 + "1" + "}" * 50_000,
            text + " " * rng.randrange(100),
            " " + text,
            text.replace(":", ": NaN ,", 1),
            json.dumps(garbage(rng)),
            "\ufeff" + text,
            text.replace("model", "m\\u0000del"),
        )
        return rng.choice(texts).encode("utf-8", "surrogatepass"), body

    _edit_header(files, rng, edit)


# --- values ----------------------------------------------------------------------------------


def _edit_values(
    files: Files, rng: Random, leaves: tuple[str, ...], edit: Callable[[bytearray, str], None]
) -> None:
    def edit_body(header: dict[str, Any], body: bytes) -> Any:
        name = _tensor(header, rng, leaves)
        offsets = header[name]["data_offsets"] if name else None
        if not (isinstance(offsets, list) and len(offsets) == 2):
            return None
        start, end = (o if type(o) is int and 0 <= o <= len(body) else 0 for o in offsets)
        values = bytearray(body[start:end])
        if values:
            edit(values, str(header[name].get("dtype")))
        return header, body[:start] + bytes(values[: max(end - start, 0)]) + body[max(start, end) :]

    _edit_header(files, rng, edit_body)


@mutation
def bad_block_scales(files: Files, rng: Random) -> None:
    """NaN, negative, zero, subnormal and extreme block scales."""

    def edit(values: bytearray, dtype: str) -> None:
        byte = rng.choice((0x7F, 0xFF, 0x80, 0x81, 0x00, 0x01, 0x07, 0x7E, 0xFE))
        for _ in range(rng.choice((1, 5, len(values)))):
            values[rng.randrange(len(values))] = byte

    _edit_values(files, rng, _BLOCK_SCALES, edit)


def _float_bytes(rng: Random, dtype: str) -> bytes:
    bits = rng.choice(_FLOAT_BITS)
    return struct.pack("<I", bits) if dtype == "F32" else struct.pack("<H", bits >> 16)


@mutation
def bad_global_scales(files: Files, rng: Random) -> None:
    """NaN, infinite, negative, zero, subnormal and extreme scales of whole tensors and rows."""

    def edit(values: bytearray, dtype: str) -> None:
        if dtype in ("F32", "BF16", "F16"):
            raw = _float_bytes(rng, dtype)
            values[: len(raw)] = raw

    _edit_values(files, rng, _GLOBAL_SCALES, edit)


@mutation
def bad_activation_tensors(files: Files, rng: Random) -> None:
    """NaN and infinity in what the activations are multiplied by: AWQ scales and rotations."""

    def edit(values: bytearray, dtype: str) -> None:
        raw = _float_bytes(rng, dtype)
        at = rng.randrange(max(len(values) // len(raw), 1)) * len(raw)
        values[at : at + len(raw)] = raw

    _edit_values(files, rng, _MATRICES, edit)


@mutation
def add_or_drop_tensor(files: Files, rng: Random) -> None:
    """The file stays whole: a tensor's bytes go with it, those of a new one come at the end."""

    def edit(header: dict[str, Any], body: bytes) -> Any:
        name = _tensor(header, rng)
        if name is None:
            return None
        if rng.random() < 0.5:
            leaf = rng.choice(("svdquant_lora_a", "weight_zero_point", "pre_quant_scale", "bias"))
            new = {"dtype": "U8", "shape": [4], "data_offsets": [len(body), len(body) + 4]}
            return {**header, f"{name.rpartition('.')[0]}.{leaf}": new}, body + b"\1\2\3\4"
        offsets = header[name]["data_offsets"]
        if not (isinstance(offsets, list) and len(offsets) == 2):
            return None
        start, end = offsets
        if not (type(start) is int and type(end) is int and 0 <= start <= end <= len(body)):
            return None
        kept = {}
        for other, entry in header.items():
            if other == name:
                continue
            place = entry.get("data_offsets") if isinstance(entry, dict) else None
            if isinstance(place, list) and place and type(place[0]) is int and place[0] >= end:
                place = [o - (end - start) if type(o) is int else o for o in place]
                entry = {**entry, "data_offsets": place}
            kept[other] = entry
        return kept, body[:start] + body[end:]

    _edit_header(files, rng, edit)


# --- the index -------------------------------------------------------------------------------


@mutation
def bad_index(files: Files, rng: Random) -> None:
    """An index whose entries leave the folder, name each other, are missing or are no names."""
    table: dict[str, Any] = {}
    for name in weight_files(files):
        try:
            header, _ = split_header(files[name].data)
        except (ValueError, RecursionError):
            continue
        table |= {tensor: name for tensor in header if tensor != "__metadata__"}
    tensors = sorted(table) or ["a"]
    for _ in range(rng.choice((0, 1, 3))):
        table[rng.choice(tensors)] = rng.choice((*ESCAPES, *weight_files(files), garbage(rng)))
    change = rng.randrange(6)
    if change == 0:
        table.pop(rng.choice(tensors), None)
    elif change == 1:
        table[rng.choice(NAMES)] = rng.choice(ESCAPES)
    elif change == 2:
        table = dict.fromkeys(table, "../outside/secret.safetensors")
    index: Any = {"metadata": garbage(rng), "weight_map": table}
    if change == 3:
        index = rng.choice(({"weight_map": garbage(rng)}, garbage(rng), {}))
    with_data(files, INDEX, json.dumps(index).encode("utf-8", "surrogatepass"))


# --- the configuration -----------------------------------------------------------------------


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of every value below this one."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, below in items:
        found.append((*path, key))
        if isinstance(below, dict | list):
            found += _places(below, (*path, key))
    return found


def _edit_config(files: Files, rng: Random, edit: Callable[[dict[str, Any]], Any]) -> None:
    names = [n for n in ("config.json", "hf_quant_config.json") if n in files]
    name = rng.choice(names or ["config.json"])
    try:
        config = json.loads(files[name].data) if name in files else {}
    except (ValueError, RecursionError):
        config = {}
    if isinstance(config, dict):
        new = edit(config)
        text = json.dumps(config if new is None else new)
        with_data(files, name, text.encode("utf-8", "surrogatepass"))


@mutation
def config_garbage(files: Files, rng: Random) -> None:
    """Garbage in place of one value; those of the quantisation are hit more often."""

    def edit(config: dict[str, Any]) -> None:
        places = _places(config)
        quant = [p for p in places if str(p[0]).startswith(("quantization", "compression"))]
        chosen = rng.choice(quant if quant and rng.random() < 0.8 else places or [("a",)])
        owner: Any = config
        for key in chosen[:-1]:
            owner = owner[key]
        if rng.random() < 0.15 and isinstance(owner, dict):
            owner.pop(chosen[-1], None)
        else:
            owner[chosen[-1]] = garbage(rng)

    _edit_config(files, rng, edit)


@mutation
def config_counts(files: Files, rng: Random) -> None:
    """Numbers of layers and experts that the files do not have."""

    def edit(config: dict[str, Any]) -> None:
        key = rng.choice(
            ("num_hidden_layers", "num_experts", "num_local_experts", "num_experts_per_tok")
        )
        text = config.get("text_config")
        owner = text if isinstance(text, dict) else config
        owner[key] = rng.choice((0, 1, 3, -1, HUGE, 2**63, 10**4000, True, "2", None, 2.0))

    _edit_config(files, rng, edit)


@mutation
def config_patterns(files: Files, rng: Random) -> None:
    """Ignore lists and targets that are no lists, no patterns, or patterns that explode."""

    def edit(config: dict[str, Any]) -> None:
        quant = config.get("quantization_config") or config.get("quantization")
        if not isinstance(quant, dict):
            return
        entries = [rng.choice(_PATTERNS) for _ in range(rng.choice((1, 2, 30)))]
        groups = quant.get("config_groups")
        if isinstance(groups, dict) and groups and rng.random() < 0.5:
            group = groups[rng.choice(sorted(groups))]
            if isinstance(group, dict):
                group["targets"] = entries
                return
        quant[rng.choice(("ignore", "exclude_modules", "modules_to_not_convert"))] = entries

    _edit_config(files, rng, edit)


@mutation
def strange_config(files: Files, rng: Random) -> None:
    """A configuration file that is odd as a whole."""
    name = rng.choice(("config.json", "hf_quant_config.json"))
    texts = ("", "null", "[]", "{}", "[" * 100_000, '{"a":' * 50_000, "1" * 10_000, '{"a": 1e999}')
    text = rng.choice((*texts, json.dumps(garbage(rng)), json.dumps({name: nested(300)})))
    with_data(files, name, text.encode("utf-8", "surrogatepass"))


def apply(files: Files, names: list[str], number: int) -> Files:
    """A damaged copy of the files: the named mutations, one after another."""
    damaged = dict(files)
    rng = Random(number)
    for name in names:
        MUTATIONS[name](damaged, rng)
    return damaged


def choose(number: int) -> list[str]:
    """One to three mutations."""
    rng = Random(~number)
    return rng.choices(sorted(MUTATIONS), k=rng.choice((1, 1, 1, 2, 3)))
