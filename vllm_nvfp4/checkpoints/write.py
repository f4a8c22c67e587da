# SPDX-License-Identifier: Apache-2.0
"""Write an NVFP4 checkpoint from a BF16 one, one layer in memory at a time.

Each quantised layer is stored as :mod:`vllm_nvfp4.checkpoints.written` says. Weights only: nothing
is said of the activations.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_nvfp4.checkpoints.quantizer import DataFree, Quantizer
from vllm_nvfp4.checkpoints.safetensors_file import SafetensorsWriter
from vllm_nvfp4.checkpoints.source import Kept, Source, TensorInfo, matches
from vllm_nvfp4.checkpoints.units import Unit, by_layer, whole
from vllm_nvfp4.checkpoints.work import work_in
from vllm_nvfp4.checkpoints.written import (
    FORMATS,
    FP8,
    Fp8Format,
    FpQuantFormat,
    StoredFormat,
)

INDEX_NAME = "model.safetensors.index.json"
# Rewritten here, or read by other tools only; every other file goes along as it is.
_NOT_COPIED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "*.bin", "*.bin.index.json"),
    *("*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data"),
)
# Headers, config and tokenizer beside the weights.
_SPARE_BYTES = 64 << 20


@dataclass
class WriteReport:
    """What became of the model: bytes of all weights and of the quantised layers, the number of
    weights in these and of FP8 layers among them, and names; ``reasons`` say of each tensor that is
    no vector why it stays as it is."""

    bytes_before: int = 0
    bytes_after: int = 0
    layer_bytes_before: int = 0
    layer_bytes_after: int = 0
    num_weights: int = 0
    num_fp8: int = 0
    quantized: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    reasons: list[Kept] = field(default_factory=list)


@dataclass(frozen=True)
class WriteOptions:
    """stored:    how quantised layers are laid out
    ignore:    fnmatch patterns of layer names that stay as they are
    towers:    vision and audio towers are quantised too
    device:    where weights are quantised
    arguments: what makes two runs the same, for :func:`write_resumable`
    progress:  called with the name of each layer before it is quantised
    skipped:   the same of each layer that an earlier run has quantised
    precision: called with the work folder and the weights to quantise; gives "nvfp4", "fp8" or
               "bf16" for each. Not in FP-Quant's dialect, and only for a resumable run
    vocabulary: weights that ``precision`` is asked for beside the linear layers: lm_head's, the
               embedding's
    finish:    called with the finished folder before it appears, for :func:`write_resumable`
    """

    stored: StoredFormat | FpQuantFormat = FORMATS["modelopt"]
    ignore: Sequence[str] = ()
    towers: bool = False
    device: torch.device | str = "cpu"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    progress: Callable[[str], None] | None = None
    skipped: Callable[[str], None] | None = None
    precision: Callable[[Path, set[str]], Mapping[str, str]] | None = None
    vocabulary: Sequence[str] = ()
    finish: Callable[[Path], None] | None = None


def write_nvfp4(
    source: Path,
    target: Path,
    *,
    method: str = "mse",
    ignore: Sequence[str] = (),
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> WriteReport:
    """Quantise the linear layers of the decoder blocks of ``source`` into a new folder ``target``,
    in ModelOpt's dialect and one file.

    source:   Hugging Face folder with 16- or 32-bit safetensors weights
    target:   must not exist; it appears whole, or not at all
    method:   see :func:`vllm_nvfp4.numerics.quantize.quantize_nvfp4`
    ignore, device, progress: see :class:`WriteOptions`
    Layers whose K is not a multiple of 16 stay as they are, and more (``WriteReport.reasons``);
    ``WriteReport.kept`` names every matrix that did, and so does the new checkpoint's ignore list.

    Raises CheckpointError if ``source`` is not such a folder, is quantised already, or has no
    layer to quantise, or one that is not finite; FileExistsError if ``target`` exists; OSError if
    the disk is too small.
    """
    options = WriteOptions(ignore=ignore, device=device, progress=progress)
    checkpoint = _checked(source, target)
    quantized, reasons = checkpoint.quantizable(ignore)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        job = _Job(checkpoint, folder, DataFree(method), options, quantized)
        report = job.write(whole(checkpoint.tensors, quantized))
        report.reasons = reasons
        job.complete(report)
        folder.rename(target)
    return report


def write_resumable(
    source: Path, target: Path, quantizer: Quantizer, options: WriteOptions
) -> WriteReport:
    """As :func:`write_nvfp4`, a file for each decoder layer, with any quantizer and dialect.

    A run that ends early leaves the layers that were finished in ``work_folder(target)``; the
    same arguments on the same source go on from there. Raises FileExistsError besides, where that
    folder is another run's: of other arguments, or one that still goes on.
    """
    checkpoint = _checked(source, target)
    quantized, reasons = checkpoint.quantizable(options.ignore, options.towers)
    arguments = {
        "source": checkpoint.fingerprint(),
        "stored": options.stored.name,
        "ignore": list(options.ignore),
        "towers": options.towers,
        "vocabulary": list(options.vocabulary),
        **options.arguments,
    }
    with work_in(target, arguments) as work:
        folder = work / "checkpoint"
        folder.mkdir(exist_ok=True)
        linear = quantized
        asked = linear.union(options.vocabulary)
        formats = options.precision(work, asked) if options.precision else {}
        quantized = {n for n in asked if formats.get(n) != "bf16"}
        fp8 = {n for n in asked if formats.get(n) == "fp8"}
        checkpoint.restack(quantized)
        job = _Job(checkpoint, folder, quantizer, options, quantized, fp8)
        report = job.write(by_layer(checkpoint.tensors, quantized, linear))
        report.reasons = reasons
        job.complete(report)
        if options.finish is not None:
            options.finish(folder)
        folder.rename(target)
    shutil.rmtree(work)
    return report


def rehearse(
    source: Source,
    target: Path,
    quantized: set[str],
    options: WriteOptions,
    look: Callable[[Path], None],
) -> None:
    """Show ``look`` what is going to be written, with holes for the data."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        job = _Job(source, Path(temporary), DataFree(), options, quantized)
        report = WriteReport()
        entries = job.plan(whole(source.tensors, quantized)[0], report)
        with SafetensorsWriter(job.folder / "model.safetensors", entries) as writer:
            writer.leave_out()
        job.complete(report)
        look(job.folder)


def _checked(source: Path, target: Path) -> Source:
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it or choose another folder")
    checkpoint = Source(source)
    checkpoint.config()
    return checkpoint


@dataclass
class _Job:
    """One checkpoint on its way into ``folder``."""

    source: Source
    folder: Path
    quantizer: Quantizer
    options: WriteOptions
    quantized: set[str]
    fp8: set[str] = field(default_factory=set)

    def _layout(self, name: str) -> StoredFormat | FpQuantFormat | Fp8Format:
        return FP8 if name in self.fp8 else self.options.stored

    def write(self, units: Sequence[Unit]) -> WriteReport:
        """Write each unit's file that is not there yet."""
        report = WriteReport()
        planned = [self.plan(unit, report) for unit in units]
        paths = [self.folder / self._file_name(i, len(units)) for i in range(len(units))]
        self._check_disk(
            sum(
                info.num_bytes
                for path, entries in zip(paths, planned, strict=True)
                if not path.is_file()
                for info in entries.values()
            )
        )
        for unit, entries, path in zip(units, planned, paths, strict=True):
            if path.is_file():
                for group in unit.groups:
                    self._announce(group, self.options.skipped)
            else:
                self.quantizer.start(
                    unit, self.quantized, self.fp8, self.options.stored.representable
                )
                # A file under its own name is whole: what a kill leaves has another one.
                part = path.with_suffix(".part")
                with SafetensorsWriter(part, entries) as writer:
                    self._write_unit(unit, writer)
                part.replace(path)
            self.quantizer.finish(unit, lambda unit=unit, path=path: self._stored(unit, path))  # type: ignore[misc]
        if len(units) > 1:
            self._write_index(paths, planned)
        return report

    @staticmethod
    def _file_name(index: int, count: int) -> str:
        if count == 1:
            return "model.safetensors"
        return f"model-{index + 1:05d}-of-{count:05d}.safetensors"

    def _announce(self, group: Sequence[str], say: Callable[[str], None] | None) -> None:
        if group[0] in self.quantized and say is not None:
            say(group[0].removesuffix(".weight"))

    def plan(self, unit: Unit, report: WriteReport) -> dict[str, TensorInfo]:
        entries: dict[str, TensorInfo] = {}
        for name in unit.names:
            info = self.source.tensors[name]
            is_quantized = name in self.quantized
            layer = name.removesuffix(".weight")
            layout = self._layout(name)
            stored = layout.entries(layer, info.shape) if is_quantized else {name: info}
            entries |= stored
            after = sum(i.num_bytes for i in stored.values())
            report.bytes_before += info.num_bytes
            report.bytes_after += after
            if is_quantized:
                report.layer_bytes_before += info.num_bytes
                report.layer_bytes_after += after
                report.num_weights += math.prod(info.shape)
                report.num_fp8 += name in self.fp8
                report.quantized.append(layer)
            elif len(info.shape) >= 2:
                report.kept.append(layer)
        return entries

    def _check_disk(self, num_bytes: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < num_bytes + _SPARE_BYTES:
            raise OSError(
                f"{self.folder.parent}: {free / 1e9:.2f} GB free, "
                f"{(num_bytes + _SPARE_BYTES) / 1e9:.2f} GB needed for the checkpoint; "
                "make room or choose another disk"
            )

    def _write_unit(self, unit: Unit, writer: SafetensorsWriter) -> None:
        for group in unit.groups:
            if group[0] not in self.quantized:
                for name in group:
                    writer.write(name, self.source.load(name, "cpu"))
                continue
            self._announce(group, self.options.progress)
            tensors = {name: self.source.load_finite(name, self.options.device) for name in group}
            if group[0] in self.fp8:
                for name, (codes, scale) in self.quantizer.quantize_fp8(tensors).items():
                    eight = FP8.tensors(name.removesuffix(".weight"), codes, scale)
                    for entry, tensor in eight.items():
                        writer.write(entry, tensor)
                continue
            for name, weight in self.quantizer.quantize(tensors).items():
                layer = name.removesuffix(".weight")
                stored = self.options.stored.tensors(layer, weight, self.quantizer.input_amax(name))
                for entry, tensor in stored.items():
                    writer.write(entry, tensor)

    def _stored(self, unit: Unit, path: Path) -> dict[str, torch.Tensor]:
        from safetensors import safe_open

        with safe_open(path, "pt") as reader:
            return {
                name: self._layout(name).dequantize(name.removesuffix(".weight"), reader.get_tensor)
                for name in unit.names
                if name in self.quantized
            }

    def _write_index(self, paths: list[Path], planned: list[dict[str, TensorInfo]]) -> None:
        weight_map = {
            name: path.name
            for path, entries in zip(paths, planned, strict=True)
            for name in entries
        }
        total = sum(info.num_bytes for entries in planned for info in entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    def complete(self, report: WriteReport) -> None:
        """Everything beside the weights."""
        config = self.source.config()
        # A tied lm_head is not stored, but engines build it and ask whether it is quantised.
        ignored = dict.fromkeys([*report.kept, *({"lm_head"} - {*report.quantized})])
        eight = sorted(name.removesuffix(".weight") for name in self.fp8)
        stored = self.options.stored
        if self.options.precision and isinstance(stored, StoredFormat):
            four = sorted({*report.quantized} - {*eight})
            found = stored.mixed_config(four, eight, list(ignored))
        else:
            found = stored.config(list(ignored))
        config["quantization_config"] = found
        (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for path in _companions(self.source.folder):
            target = self.folder / path.relative_to(self.source.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _companions(folder: Path) -> Iterator[Path]:
    """The files that go along: tokenizer, templates, processors, and of folders below what is no
    copy of the model in another form. The parts of a sentence encoder that modules.json lists, its
    pooling and last projections, are loaded by engines as they are, weights too."""
    try:
        listed = json.loads((folder / "modules.json").read_text())
        listed = listed["modules"] if isinstance(listed, dict) else listed
        parts = {str(Path(m["path"])) for m in listed if m["path"]}
    except (OSError, ValueError, TypeError, KeyError):
        parts = set()
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        is_part = not parts.isdisjoint(map(str, inner.parents))
        is_hidden = any(name.startswith(".") for name in inner.parts[:-1])
        if path.is_file() and not is_hidden and (is_part or not matches(path.name, _NOT_COPIED)):
            yield path
