# SPDX-License-Identifier: Apache-2.0
"""Results for people: tables for the terminal and one HTML page that needs nothing else.

Every table is made once, as text, and shown in both places. Pictures are inside the page as data.
"""

from __future__ import annotations

import base64
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_nvfp4.bench.results import (
    BATCH,
    RATE,
    Results,
    Spread,
    VariantRecord,
    batch_rows,
    rate_rows,
    ratios,
)
from vllm_nvfp4.bench.summary import first_sentence, reproduce_line
from vllm_nvfp4.compat.packages import install_hint
from vllm_nvfp4.planning import pictures
from vllm_nvfp4.serving.console import table_console

PAGE_NAME = "report.html"
_NONE = "-"
# More lines than this in one picture, and only the 99th percentiles are drawn.
_MAX_BOTH = 2


@dataclass(frozen=True)
class Table:
    """A title, the columns' heads, rows of text, and a line below on what they mean."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG and what it shows, for those who cannot see it."""

    alt: str
    png: bytes

    @property
    def uri(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def _text(value: float | None, digits: int = 3) -> str:
    """Three significant digits, never an exponent."""
    if value is None:
        return _NONE
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def _spread(spread: Spread | None, unit: float = 1.0) -> str:
    return _text(spread.median / unit) if spread else _NONE


def _ratio(spread: Spread | None) -> str:
    if spread is None:
        return _NONE
    return f"{spread.median:.2f}x ({spread.low:.2f}-{spread.high:.2f})"


def batch_table(results: Results, record: VariantRecord) -> Table:
    """seconds, tokens/s, memory, share of the roofline and energy per batch size."""
    settings = results.settings
    rows = tuple(
        (
            str(row.batch),
            _spread(row.seconds),
            _spread(row.tokens_per_s),
            _spread(row.decode),
            _text(row.limit.tokens_per_s) if row.limit else _NONE,
            f"{row.share:.0%}" if row.share is not None else _NONE,
            _spread(row.memory, 1e9),
            _spread(row.energy),
        )
        for row in batch_rows(results, record)
    )
    starts = len(record.load_s)
    note = (
        f"Medians of {starts} start{'s' if starts != 1 else ''}. Memory: {results.memory['label']}."
    )
    if record.no_limit:
        note += f" No roofline: {record.no_limit}."
    elif record.limits:
        note += f" Roofline: decoding only; {results.machine.get('roofline', '')}."
    if not any(m.energy_j for m in results.measurements):
        note += " Energy: nothing here counts it."
    return Table(
        f"{record.name}: {settings['prompt_tokens']} tokens in, {settings['tokens']} out",
        ("batch", "s", "tok/s", "decode tok/s", "roofline", "share", "peak GB", "J/token"),
        rows,
        note,
    )


def rate_table(results: Results, record: VariantRecord) -> Table:
    """Throughput and latency at each request rate."""
    settings = results.settings
    rows = tuple(
        (
            "no pause" if row.rate is None else f"{row.rate:g}",
            _spread(row.served),
            _spread(row.goodput),
            _spread(row.tokens_per_s),
            _spread(row.ttft),
            _spread(row.ttft_p99),
            _spread(row.tpot),
            _spread(row.tpot_p99),
            _spread(row.energy),
        )
        for row in rate_rows(results, record.name)
    )
    goals = " and ".join(settings["goodput"])
    note = f"{settings['load_requests']} requests each, arriving at random. TTFT: to the first "
    note += "token; TPOT: per token after it; both in ms, median and 99th percentile."
    if goals:
        note += f" Good: requests/s that met {goals} (ms)."
    return Table(
        f"{record.name} under load: {settings['load_prompt_tokens']} tokens in, "
        f"{settings['load_tokens']} out",
        ("requests/s", "served", "good", "tok/s", "TTFT", "p99", "TPOT", "p99", "J/token"),
        rows,
        note,
    )


def ratio_table(results: Results, record: VariantRecord) -> Table:
    """The first variant against another, per batch size and rate."""
    metrics = ("output_throughput", "median_ttft_ms", "median_tpot_ms")
    rows = []
    for kind, unit in ((BATCH, "batch {:g}"), (RATE, "{:g} requests/s")):
        found = [ratios(results, record.name, kind, metric) for metric in metrics]
        for size in found[0]:
            name = "no pause" if size is None else unit.format(size)
            rows.append((name, *(_ratio(column.get(size)) for column in found)))
    return Table(
        f"{results.variants[0].name} against {record.name}",
        ("", "tok/s", "first token", "per token"),
        tuple(rows),
        "Above 1 is better. Servers in turns; the ratio of each turn: median, least and largest.",
    )


def terms_table(results: Results, record: VariantRecord) -> Table:
    """What the roofline of each batch size follows from, to be computed again by hand."""
    context = results.settings["prompt_tokens"] + results.settings["tokens"] // 2
    rows = tuple(
        (
            str(limit.batch),
            f"{limit.weight_bytes / 1e9:.4f}",
            f"{limit.kv_bytes / 1e9:.4f}",
            f"{limit.gbps:.1f}",
            *(
                f"{value:.4g}" if limit.linear_tflops and value is not None else _NONE
                for value in (
                    limit.linear_flops / 1e12,
                    limit.linear_tflops,
                    limit.other_flops / 1e12,
                    limit.other_tflops,
                )
            ),
            limit.bound,
            _text(limit.tokens_per_s),
        )
        for limit in record.limits
    )
    return Table(
        f"{record.name}: terms of the roofline, {context} tokens in every sequence",
        ("batch", "weights GB", "KV GB", "GB/s", "linear TFLOP", "TFLOP/s", "other TFLOP",
         "TFLOP/s", "bound by", "tok/s"),
        rows,
        "tok/s = batch / max((weights + KV) / (GB/s), the sum of TFLOP / (TFLOP/s)).",
    )  # fmt: skip


def run_tables(results: Results) -> list[Table]:
    """Every table of one run that has a row, without columns that nothing could fill."""
    tables = []
    for record in results.variants:
        tables += [batch_table(results, record), rate_table(results, record)]
    tables += [ratio_table(results, record) for record in results.variants[1:]]
    tables += [terms_table(results, record) for record in results.variants]
    return [_filled(table) for table in tables if table.rows]


def _filled(table: Table) -> Table:
    kept = [i for i in range(len(table.columns)) if any(row[i] != _NONE for row in table.rows)]
    return replace(
        table,
        columns=tuple(table.columns[i] for i in kept),
        rows=tuple(tuple(row[i] for i in kept) for row in table.rows),
    )


def side_by_side(runs: Mapping[str, Results]) -> list[Table]:
    """Several runs in one table each for speed, load and what they ran on."""
    all_rows = [(name, run, record) for name, run in runs.items() for record in run.variants]
    batches = {
        (name, record.name): {row.batch: row for row in batch_rows(run, record)}
        for name, run, record in all_rows
    }
    sizes = sorted({size for rows in batches.values() for size in rows})
    tables = []
    for title, cell in (
        ("Tokens per second by batch", lambda row: _spread(row.tokens_per_s)),
        ("Peak memory by batch, GB", lambda row: _spread(row.memory, 1e9)),
    ):
        rows = tuple(
            (*key, *(cell(found[size]) if size in found else _NONE for size in sizes))
            for key, found in batches.items()
        )
        tables.append(Table(title, ("run", "served", *map(str, sizes)), rows))
    most = []
    for name, run, record in all_rows:
        if found := rate_rows(run, record.name):
            row = max(found, key=lambda row: row.served.median)
            most.append(
                (name, record.name, _spread(row.served), _spread(row.tokens_per_s),
                 _spread(row.ttft_p99), _spread(row.tpot_p99), _spread(row.energy))
            )  # fmt: skip
    heads = ("run", "served", "requests/s", "tok/s", "TTFT p99 ms", "TPOT p99 ms", "J/token")
    tables.append(Table("At the highest load", heads, tuple(most)))
    return [table for table in tables if table.rows] + [machine_table(runs)]


def machine_table(runs: Mapping[str, Results]) -> Table:
    """What each run was made on and with."""
    facts: dict[str, dict[str, str]] = {
        name: {"model": run.settings["model"], "seed": str(run.settings["seed"]), **run.machine}
        for name, run in runs.items()
    }
    names = dict.fromkeys(key for found in facts.values() for key in found)
    rows = tuple((key, *(found.get(key, _NONE) for found in facts.values())) for key in names)
    return Table("Made on and with", ("", *runs), rows)


def _labels(runs: Mapping[str, Results]) -> Iterator[tuple[str, Results, VariantRecord]]:
    """(label for a picture, its run, its record): what was served, shortened where that is clear,
    after the run's name where there are several."""
    for name, run in runs.items():
        kinds = [re.split(r"[= ]", record.name)[0] for record in run.variants]
        for kind, record in zip(kinds, run.variants, strict=True):
            served = kind if kinds.count(kind) == 1 else record.name
            yield (served if len(runs) == 1 else f"{name}: {served}"), run, record


def draw(runs: Mapping[str, Results]) -> list[Picture]:
    """Speed against batch, both latencies against load, memory: those that have data."""
    found: list[Picture] = []
    with tempfile.TemporaryDirectory() as scratch:

        def add(alt: str, function: Callable[..., Path], *args: Any, **more: Any) -> None:
            if args[0]:
                path = function(Path(scratch) / "picture.png", *args, title=alt, **more)
                found.append(Picture(alt, path.read_bytes()))

        add("Decoding speed and its roofline", pictures.speed_against_batch, speed_series(runs))
        for name, metric in (("First token", "ttft"), ("Each further token", "tpot")):
            add(
                f"{name}: latency against load",
                pictures.latency_against_load,
                latency_series(runs, metric),
            )
        add("Memory", pictures.memory_stack, memory_bars(runs))
    return found


def speed_series(runs: Mapping[str, Results]) -> list[pictures.Series]:
    """Decode rate against batch with its spread, and each roofline once."""
    measured, bounds = [], {}
    for label, run, record in _labels(runs):
        rows = [(row, row.decode) for row in batch_rows(run, record)]
        points = [(row.batch, decode) for row, decode in rows if decode]
        if points:
            measured.append(
                pictures.Series(
                    label,
                    [batch for batch, _ in points],
                    [decode.median for _, decode in points],
                    [decode.low for _, decode in points],
                    [decode.high for _, decode in points],
                )
            )
        if points and record.limits:
            rates = tuple(limit.tokens_per_s for limit in record.limits)
            bounds[rates] = pictures.Series(
                f"roofline, {label}", [x.batch for x in record.limits], rates, is_limit=True
            )
    return [*measured, *bounds.values()]


def latency_series(runs: Mapping[str, Results], metric: str) -> list[pictures.Series]:
    """Median and 99th percentile of ttft or tpot against the requests served per second."""
    labels = list(_labels(runs))
    kinds = {"median": metric, "p99": f"{metric}_p99"}
    if len(labels) > _MAX_BOTH:
        del kinds["median"]
    series = []
    for label, run, record in labels:
        rows = sorted(rate_rows(run, record.name), key=lambda row: row.served.median)
        for kind, name in kinds.items() if rows else ():
            spreads = [getattr(row, name) for row in rows]
            series.append(
                pictures.Series(
                    f"{label}, {kind}",
                    [row.served.median for row in rows],
                    [spread.median for spread in spreads],
                    [spread.low for spread in spreads],
                    [spread.high for spread in spreads],
                )
            )
    return series


def memory_bars(runs: Mapping[str, Results]) -> list[pictures.MemoryBar]:
    """Weights by part, KV cache, what else the server held at its peak, and what was left."""
    bars = []
    for label, run, record in _labels(runs):
        peak = max(
            (m.memory_bytes for m in run.measurements if m.variant == record.name), default=0
        )
        if not peak or not record.weight_parts or record.kv_bytes is None:
            continue
        weights = record.weight_parts
        parts = {
            "linear weights": weights["linear"],
            "lm_head, embedding": weights["lm_head"] + weights["embedding"],
            "norms and biases": weights["other"],
            "KV cache": record.kv_bytes,
        }
        # A KV cache that was not written to yet may not be resident.
        parts["everything else"] = max(peak - sum(parts.values()), 0)
        # A card is there for the server; a computer's memory is not.
        capacity = run.memory["total_bytes"] if "gpu" in run.machine else None
        bars.append(pictures.MemoryBar(label, parts, capacity))
    return bars


def write(runs: Mapping[str, Results], path: Path) -> Path:
    """The page. runs: name -> results. Raises ValueError without jinja2 or matplotlib."""
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise ValueError(
            f"the page needs jinja2, which is not installed: {install_hint('pictures')}"
        ) from error
    environment = Environment(loader=PackageLoader("vllm_nvfp4.bench", "."), autoescape=True)
    single = next(iter(runs.values())) if len(runs) == 1 else None
    text = environment.get_template("report.html.j2").render(
        title=single.title if single else f"{len(runs)} runs side by side",
        result=first_sentence(runs),
        reproduce=reproduce_line,
        runs=runs,
        pictures=draw(runs),
        overview=[machine_table(runs)] if single else side_by_side(runs),
        tables_of=run_tables,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def print_tables(tables: Sequence[Table], first: str) -> None:
    """A first sentence, which only a terminal wraps, then the tables, numbers flush right."""
    from rich.table import Table as RichTable

    console = table_console()
    console.print(first, markup=False, soft_wrap=not console.is_terminal)
    for table in tables:
        shown = RichTable(title=table.title, title_justify="left", caption=table.note or None,
                          caption_justify="left")  # fmt: skip
        for i, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
