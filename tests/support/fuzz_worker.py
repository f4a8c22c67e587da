# SPDX-License-Identifier: Apache-2.0
"""One case of the loaders' fuzz, run in a process of its own that a fault cannot take others with.

A case ends as "accepted" (the loader's weights equal those of fuzz_reference.py), "refused"
(one CheckpointError of one line), or as a fault: what is wrong, as text.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import fuzz_reference
import torch
from fuzz_files import Files, make_legacy_seed, make_seeds, write_files
from fuzz_mutations import apply

from vllm_nvfp4.checkpoints import detect, read_config
from vllm_nvfp4.checkpoints.convert import dequantize_layer, fp8_to_rows, to_weight
from vllm_nvfp4.checkpoints.inventory import Inventory
from vllm_nvfp4.checkpoints.locate import find_folder
from vllm_nvfp4.checkpoints.spec import CheckpointError, LayerKind, LayerSpec, Role
from vllm_nvfp4.checkpoints.validate import take_census, validate

# What a case may take on top of the process as it is: a hundred times its files.
EXTRA_MEMORY = 512 << 20
CPU_SECONDS = 3.0
MAX_MESSAGE = 6000
_MESSAGE = re.compile(r".+: .*: found .*; needed .+\. .+")

_watch: list[str] | None = None  # paths opened while a case runs


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch is not None and event in ("open", "os.listdir", "os.scandir", "glob.glob"):
        path = arguments[0]
        if isinstance(path, str | bytes | os.PathLike):
            _watch.append(os.fsdecode(path))


@contextmanager
def _watched(paths: list[str]) -> Iterator[None]:
    global _watch
    _watch = paths
    try:
        yield
    finally:
        _watch = None


def load(folder: Path) -> tuple[Inventory, dict[str, torch.Tensor]]:
    """What the plugin makes of a folder: the inventory, and the weight of each quantised layer."""
    folder = find_folder(str(folder))
    config, quant_config = read_config(folder)
    census = take_census(folder, detect(quant_config))
    inventory = validate(folder, config, quant_config, census=census)
    files = {file for layer in inventory.layers for file in layer.files}
    tensors = dict(census.as_read(fuzz_reference.stored_tensors(folder, files).items()))
    tensors |= {n: tensors[s.name].mT for n, s in census.stored_as.items() if s.is_transposed}
    weights = {}
    for layer in inventory.layers:
        spec, name = layer.spec, layer.name
        if not spec.is_quantized:
            continue
        if spec.algo == "gpt-oss":
            weights |= _stacked(spec, name, tensors)
            continue
        stored = {
            t.role: tensors[f"{name}.{t.name}" if name else t.name]
            for t in spec.tensors
            if (f"{name}.{t.name}" if name else t.name) in tensors
        }
        if spec.kind is LayerKind.WIDENED:
            by_name = {t.name: stored[t.role] for t in spec.tensors if t.role in stored}
            weights[name] = dequantize_layer(spec, by_name, name).double()
        elif spec.kind is LayerKind.FP8:
            weight, row_scale = fp8_to_rows(spec, stored, [len(stored[Role.WEIGHT])], name)
            weights[name] = weight.double() * row_scale.double()[:, None]
        else:
            *experts, rows, _ = stored[Role.CODES].shape
            flat = {r: t.flatten(0, -2) if t.dim() > 2 else t for r, t in stored.items()}
            weight = _convert(spec, flat, [rows] * prod(experts), name)
            value = weight.dequantize(torch.float64)
            weights[name] = value.view(*experts, rows, -1)
    return inventory, weights


def _stacked(
    spec: LayerSpec, name: str, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The two weights of a layer of experts, [E, N, K], converted expert by expert."""
    weights = {}
    for leaf in ("gate_up_proj", "down_proj"):
        blocks, scales = (tensors[f"{name}.{leaf}_{part}"] for part in ("blocks", "scales"))
        dense = []
        for codes, scale in zip(blocks.flatten(2), scales, strict=True):
            stored = {Role.CODES: codes, Role.BLOCK_SCALE: scale}
            weight = _convert(spec, stored, [len(codes)], f"{name}.{leaf}")
            dense.append(weight.dequantize(torch.float64))
        weights[f"{name}.{leaf}"] = torch.stack(dense)
    return weights


def check(folder: Path) -> tuple[str, str]:
    """(outcome, text) of one folder."""
    opened: list[str] = []
    try:
        with _watched(opened):
            inventory, weights = load(folder)
    except CheckpointError as error:
        outcome = _judge_message(str(error))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = "fault", f"{type(error).__name__}: {str(error)[:300]} [{where.name}]"
    else:
        outcome = _judge_weights(folder, inventory, weights)
    inside = os.path.realpath(folder)
    for path in opened:
        if not os.path.realpath(path).startswith((inside, "/proc/self", "/sys/")):
            return "fault", f"opened {path}, outside the folder"
    return outcome


def _judge_message(message: str) -> tuple[str, str]:
    if len(message) > MAX_MESSAGE:
        return "fault", f"a message of {len(message)} characters: {message[:200]}"
    if not message.isprintable() or not _MESSAGE.fullmatch(message):
        return "fault", f"not one line of the usual form: {message[:300]!r}"
    return "refused", message


def _judge_weights(
    folder: Path, inventory: Inventory, weights: dict[str, torch.Tensor]
) -> tuple[str, str]:
    files = {file for layer in inventory.layers for file in layer.files}
    tensors = fuzz_reference.stored_tensors(folder, files)
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        multiplies = leaf in ("pre_quant_scale", "forward_hadamard_matrix") and module in weights
        if multiplies and not tensor.isfinite().all():
            return "fault", f"{name}: accepted with values that are not finite"
    expected = fuzz_reference.quantized_weights(tensors)
    for name in expected.keys() | weights.keys():
        if name not in weights:
            if "mtp" in name.split(".") or _is_past_the_last(folder, name):
                continue  # draft layers are not the model's
            return "fault", f"{name}: quantised in the file, and left out of the inventory"
        value = expected.get(name)
        if value is None:
            return "fault", f"{name}: accepted without a complete set of tensors"
        if text := fuzz_reference.difference(weights[name], value):
            return "fault", f"{name}: {text}"
    return "accepted", f"{len(weights)} quantised layers"


def _is_past_the_last(folder: Path, name: str) -> bool:
    config, _ = read_config(folder)
    number = re.search(r"\.layers\.(\d+)\.", name)
    num_layers = (config.get("text_config") or config).get("num_hidden_layers")
    return bool(number) and int(number[1]) >= num_layers


class Runner:
    """Runs cases below one scratch folder. has_all_seeds: else only "legacy"."""

    def __init__(self, scratch: Path, has_all_seeds: bool = True) -> None:
        torch.set_num_threads(1)
        logging.disable(logging.CRITICAL)
        self.seeds = {"legacy": make_legacy_seed(scratch / "seeds")}
        if has_all_seeds:
            self.seeds = make_seeds(scratch / "seeds")
        self.folder = scratch / "case" / "model"
        outside = scratch / "case" / "outside"
        for name, files in self.seeds.items():  # whatever is imported late is imported now
            write_files(files, self.folder)
            if (outcome := check(self.folder))[0] != "accepted":
                raise RuntimeError(f"the undamaged {name} is not accepted: {outcome[1]}")
        str(CheckpointError("\0", "", "", "", ""))
        outside.mkdir(parents=True)
        for name, file in (("json", "config.json"), ("safetensors", "model.safetensors")):
            (outside / f"secret.{name}").write_bytes(self.seeds["legacy"][file].data)
        gc.collect()
        sys.addaudithook(_audit)
        _limit_memory()

    def run(self, files: Files) -> tuple[str, str]:
        write_files(files, self.folder)
        started = time.process_time()
        outcome = check(self.folder)
        seconds = time.process_time() - started
        if seconds > CPU_SECONDS and outcome[0] != "fault":
            return "fault", f"took {seconds:.1f} s of CPU time: {outcome[1][:200]}"
        return outcome

    def run_recipe(self, seed: str, mutations: list[str], number: int) -> tuple[str, str]:
        return self.run(apply(self.seeds[seed], mutations, number))


def _limit_memory() -> None:
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _plant(fault: str) -> None:
    """Make the loader misbehave, for a test that it is noticed."""

    def misbehave(*args: Any, **kwargs: Any) -> Any:
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "hang":
            time.sleep(1000)
        if fault == "memory":
            bytearray(2 * EXTRA_MEMORY)
        if fault == "outside":
            open("/etc/hostname").close()
        if fault == "raises":
            raise KeyError("a")
        return to_weight(*args, **kwargs)

    def distort(*args: Any, **kwargs: Any) -> Any:
        weight = to_weight(*args, **kwargs)
        weight.codes[0, 0] ^= 8
        return weight

    globals()["_convert"] = distort if fault == "wrong" else misbehave


_convert = to_weight


def serve(connection: Any, scratch: str, plant: str) -> None:
    """Answer cases until the other end closes: (seed, mutations, number) or (seed, entries)."""
    runner = Runner(Path(scratch), has_all_seeds=not plant)
    connection.send(runner.seeds)
    if plant:
        _plant(plant)
    while (case := connection.recv()) is not None:
        if len(case) == 2:
            connection.send(runner.run({**runner.seeds[case[0]], **case[1]}))
        else:
            connection.send(runner.run_recipe(*case))
