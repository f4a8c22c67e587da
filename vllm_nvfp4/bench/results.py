# SPDX-License-Identifier: Apache-2.0
"""The results of one run: bench.json, and the medians and ratios that are shown of it."""

from __future__ import annotations

import dataclasses
import json
import lzma
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
FILE_NAME = "bench.json"
BATCH, RATE = "batch", "rate"


@dataclass
class Measurement:
    """One run of vLLM's benchmark against one server.

    variant, turn: which server, and which of its starts
    kind, size:    BATCH and the number of requests at once, or RATE and requests per second; None
                   is as fast as the client can send
    vllm:          vLLM's own result: duration in s, throughputs per s, latencies in ms
    memory_bytes:  the peak while it ran; energy_j: spent meanwhile, None where nothing counts it
    sm_mhz:        median clock of the first GPU's SMs; None without one
    """

    variant: str
    turn: int
    kind: str
    size: float | None
    vllm: dict[str, Any]
    memory_bytes: int
    energy_j: float | None
    sm_mhz: float | None

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first tokens: batch / mean time per output token."""
        tpot = self.vllm.get("mean_tpot_ms")
        return self.size * 1e3 / tpot if self.kind == BATCH and self.size and tpot else None

    @property
    def joules_per_token(self) -> float | None:
        tokens = self.vllm["total_output_tokens"]
        return None if self.energy_j is None or not tokens else self.energy_j / tokens


@dataclass
class Limit:
    """The roofline of decoding at one batch size, and the terms that it follows from.

    tokens_per_s = batch / max((weight_bytes + kv_bytes) / (gbps * 10^9),
                               (linear_flops / linear_tflops + other_flops / other_tflops) / 10^12)

    Bytes and FLOP of one step on all cards; see planning.model.Roofline. A rate of None sets no
    limit: its term is 0.
    """

    batch: int
    tokens_per_s: float
    bound: str
    weight_bytes: float
    kv_bytes: float
    gbps: float
    linear_flops: float
    linear_tflops: float | None
    other_flops: float
    other_tflops: float | None


@dataclass
class VariantRecord:
    """What was served.

    weights:      bytes of every part on one card as planned, the fields of planning.model.Weights
    weight_parts: bytes of linear, lm_head, embedding and other weights, as held by the loader
    kv_bytes:     of the KV cache that the server reserved; None where it did not say
    kv_dtype:     as vLLM names it
    limits:       per batch size; empty, with no_limit saying why, where there is no roofline
    failed:       why it could not be measured; "" where it was
    """

    name: str
    model: str
    command: str
    weight_format: str = ""
    weights: dict[str, int] = field(default_factory=dict)
    weight_parts: dict[str, float] = field(default_factory=dict)
    kv_bytes: float | None = None
    kv_tokens: int | None = None
    kv_dtype: str = ""
    load_s: list[float] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)
    no_limit: str = ""
    failed: str = ""


@dataclass
class Results:
    """One run of the command.

    machine:     hardware, clocks, versions, commit, command: name -> text
    settings:    what was asked for, seed included
    memory:      label, and total_bytes of the device
    is_complete: False while it runs and where it was interrupted
    """

    machine: dict[str, str]
    settings: dict[str, Any]
    memory: dict[str, Any]
    variants: list[VariantRecord]
    measurements: list[Measurement] = field(default_factory=list)
    is_complete: bool = False
    schema: int = SCHEMA

    @property
    def title(self) -> str:
        return f"{Path(self.settings['model']).name} on {self.device}"

    @property
    def device(self) -> str:
        return self.machine.get("gpu") or self.machine["cpu"]

    def select(self, variant: str, kind: str) -> Iterator[tuple[float | None, list[Measurement]]]:
        """(size, its measurements, one per turn), in the order in which they were made."""
        sizes = dict.fromkeys(
            m.size for m in self.measurements if m.variant == variant and m.kind == kind
        )
        for size in sizes:
            yield (
                size,
                [
                    m
                    for m in self.measurements
                    if (m.variant, m.kind, m.size) == (variant, kind, size)
                ],
            )

    def save(self, folder: Path) -> Path:
        """Write bench.json, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE_NAME
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(self), separators=(",", ":")) + "\n")
        os.replace(temporary, path)
        return path


def load(folder: Path) -> Results:
    """Read a folder's bench.json, or bench.json.xz. Raises ValueError with one line for anything
    else."""
    path = folder / FILE_NAME if folder.is_dir() else folder
    if not path.exists() and (packed := path.with_suffix(".json.xz")).exists():
        path = packed
    remedy = f"needs a folder that `vllm-nvfp4 bench` wrote, with {FILE_NAME}"
    if not path.is_file():
        raise ValueError(f"{folder}: no {FILE_NAME} there; {remedy}")
    try:
        data = path.read_bytes()
        content = json.loads(lzma.decompress(data) if path.suffix == ".xz" else data)
    except (json.JSONDecodeError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: not JSON ({error}); {remedy}") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ValueError(
            f"{path}: schema {schema!r}; this version reads schema {SCHEMA}: measure again, or "
            "use the version of vllm-nvfp4 that wrote it"
        )
    try:
        content["variants"] = [
            VariantRecord(**v | {"limits": [Limit(**x) for x in v["limits"]]})
            for v in content["variants"]
        ]
        content["measurements"] = [Measurement(**m) for m in content["measurements"]]
        return Results(**content)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); {remedy}") from error


@dataclass(frozen=True)
class Spread:
    """The median of some values, the least and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread | None:
        """None where there is no value."""
        found = [v for v in values if v is not None]
        return cls(statistics.median(found), min(found), max(found)) if found else None


@dataclass(frozen=True)
class BatchRow:
    """A row of the batch table; memory in bytes, energy in J per token.

    share: of the roofline's tokens/s, by the decode rate; None where there is no roofline
    """

    batch: int
    seconds: Spread
    tokens_per_s: Spread
    decode: Spread | None
    memory: Spread
    energy: Spread | None
    share: float | None
    limit: Limit | None


def batch_rows(results: Results, record: VariantRecord) -> list[BatchRow]:
    """One row per batch size, over the turns."""
    limits = {limit.batch: limit for limit in record.limits}
    rows = []
    for size, found in results.select(record.name, BATCH):
        batch = int(size or 0)
        limit = limits.get(batch)
        decode = Spread.of([m.decode_rate for m in found])
        rows.append(
            BatchRow(
                batch,
                _spread(found, "duration"),
                _spread(found, "output_throughput"),
                decode,
                _known(Spread.of([m.memory_bytes for m in found])),
                Spread.of([m.joules_per_token for m in found]),
                decode.median / limit.tokens_per_s if decode and limit else None,
                limit,
            )
        )
    return sorted(rows, key=lambda row: row.batch)


@dataclass(frozen=True)
class RateRow:
    """A row of the serving table: requests/s offered (None: without pause), served and good,
    latencies in ms."""

    rate: float | None
    served: Spread
    tokens_per_s: Spread
    goodput: Spread | None
    ttft: Spread
    ttft_p99: Spread
    tpot: Spread
    tpot_p99: Spread
    energy: Spread | None


def rate_rows(results: Results, variant: str) -> list[RateRow]:
    """One row per request rate, over the turns, the unlimited one last."""
    rows = [
        RateRow(
            rate,
            _spread(found, "request_throughput"),
            _spread(found, "output_throughput"),
            Spread.of([m.vllm.get("request_goodput") for m in found]),
            _spread(found, "median_ttft_ms"),
            _spread(found, "p99_ttft_ms"),
            _spread(found, "median_tpot_ms"),
            _spread(found, "p99_tpot_ms"),
            Spread.of([m.joules_per_token for m in found]),
        )
        for rate, found in results.select(variant, RATE)
    ]
    return sorted(rows, key=lambda row: float("inf") if row.rate is None else row.rate)


def _spread(found: Sequence[Measurement], name: str) -> Spread:
    return _known(Spread.of([m.vllm[name] for m in found]))


def _known(spread: Spread | None) -> Spread:
    if spread is None:
        raise ValueError("a measurement without values; needs at least one turn")
    return spread


def ratios(results: Results, other: str, kind: str, metric: str) -> dict[float | None, Spread]:
    """Size -> how many times as good the first variant is as ``other``, turn by turn.

    metric: a name of vLLM's result; times are inverted, so that above 1 is better. Only turns in
    which both were measured count.
    """
    first = results.variants[0].name
    theirs = {size: {m.turn: m for m in found} for size, found in results.select(other, kind)}
    found: dict[float | None, Spread] = {}
    for size, own in results.select(first, kind):
        pairs = [(m, theirs[size][m.turn]) for m in own if m.turn in theirs.get(size, {})]
        values = [_ratio(a.vllm[metric], b.vllm[metric], metric) for a, b in pairs]
        if spread := Spread.of(values):
            found[size] = spread
    return found


def _ratio(ours: float, theirs: float, metric: str) -> float | None:
    if metric.endswith("_ms"):
        ours, theirs = theirs, ours
    return ours / theirs if theirs else None
