# SPDX-License-Identifier: Apache-2.0
"""Pictures from plain numbers: memory stacks, speed against batch, latency against load, bars.

Every function takes data and a path, writes one file whose suffix chooses the format (.png, .svg,
.pdf) and returns the path. Colours are Okabe and Ito's, which stay apart for colour-blind readers;
hatches, markers and dashes keep them apart in black and white. Needs matplotlib, the extra
``pictures``; nothing here imports it before a picture is asked for.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_nvfp4.compat.packages import install_hint

# Okabe and Ito, "Color Universal Design" (2008), without yellow, which print loses.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
# No dots: an SVG holds each of them as a curve of its own.
HATCHES = ("", "///", "++", "\\\\\\", "xx", "--")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Any, ...] = ("--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_FREE = "#FFFFFF"
_RC: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.6,
    # Text stays text in an SVG, so that it can be searched and read aloud.
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "svg.hashsalt": "vllm-nvfp4",
}


@dataclass(frozen=True)
class MemoryBar:
    """One bar of a memory stack.

    parts:    {"weights": bytes, ...} from the bottom up; the same names in every bar
    capacity: bytes that may be used; what the parts leave is drawn as free. None: no such thing
    """

    label: str
    parts: Mapping[str, float]
    capacity: float | None = None


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    low, high: the spread of each y, drawn as bars; empty for none
    is_limit:  a bound, drawn dashed and without markers
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    is_limit: bool = False


def memory_stack(
    path: Path,
    bars: Sequence[MemoryBar],
    title: str = "",
    ylabel: str = "memory, GB (10⁹ bytes)",
) -> Path:
    """Memory by part, GB (10^9), one column each; a line marks the capacity.

    Raises ValueError without bars, or for a negative size.
    """
    _require(bars, "memory_stack", "bar")
    for bar in bars:
        if min([*bar.parts.values(), bar.capacity or 0]) < 0:
            raise ValueError(f"memory_stack: {bar.label!r} has a negative size; needs bytes >= 0")
    names = list(dict.fromkeys(name for bar in bars for name in bar.parts))
    top = max(max(sum(b.parts.values()), b.capacity or 0) for b in bars) / 1e9

    def draw(axes: Any) -> None:
        bottoms = [0.0] * len(bars)
        for i, name in enumerate(names):
            sizes = [bar.parts.get(name, 0) / 1e9 for bar in bars]
            style: Any = {"color": COLORS[i % len(COLORS)], "hatch": HATCHES[i % len(HATCHES)]}
            axes.bar(range(len(bars)), sizes, 0.6, bottoms, label=name, edgecolor="white", **style)
            for x, (size, bottom) in enumerate(zip(sizes, bottoms, strict=True)):
                if size > 0.045 * top:
                    _inside(axes, x, bottom + size / 2, f"{size:.1f}")
            bottoms = [b + s for b, s in zip(bottoms, sizes, strict=True)]
        _draw_capacities(axes, bars, bottoms, top)
        axes.set_xticks(range(len(bars)), [_wrapped(bar.label, 15) for bar in bars])
        axes.set_xlim(-0.5, len(bars) - 0.5)
        axes.set_ylim(0, 1.16 * top)
        axes.set_ylabel(ylabel)
        axes.grid(axis="x", visible=False)
        _legend_beside(axes, is_reversed=True)

    return _save(path, draw, title, (max(4.8, 1.25 * len(bars) + 2.6), 4.6))


def _draw_capacities(axes: Any, bars: Sequence[MemoryBar], used: list[float], top: float) -> None:
    free_label: str | None = "free"
    line_label: str | None = "usable on the card"
    for x, bar in enumerate(bars):
        if bar.capacity is None:
            axes.text(x, used[x] + 0.02 * top, f"{used[x]:.1f}", ha="center", va="bottom")
            continue
        capacity = bar.capacity / 1e9
        free = capacity - used[x]
        if free > 0:
            style: Any = {"color": _FREE, "edgecolor": "#777777", "linewidth": 0.8}
            axes.bar(x, free, 0.6, used[x], label=free_label, **style)
            free_label = None
            if free > 0.045 * top:
                axes.text(x, used[x] + free / 2, f"{free:.1f}", ha="center", va="center")
        axes.plot([x - 0.38, x + 0.38], [capacity] * 2, "k-", lw=2, label=line_label)
        line_label = None
        verdict = "fits" if free >= 0 else f"{-free:.1f}\ntoo much"
        y = max(capacity, used[x]) + 0.02 * top
        axes.text(x, y, verdict, ha="center", va="bottom", fontweight="bold")


def lines(
    path: Path,
    series: Sequence[Series],
    xlabel: str,
    ylabel: str,
    title: str = "",
    is_log: bool = False,
) -> Path:
    """y against x, one line for each series; limits are dashed.

    is_log: both axes logarithmic, x with base 2 and ticks at the measured values
    Raises ValueError without series, or where x and y differ in length.
    """
    _require(series, "lines", "series")
    for one in series:
        lengths = {len(one.x), len(one.y), *(len(s) for s in (one.low, one.high) if s)}
        if len(lengths) > 1 or not one.x:
            raise ValueError(
                f"lines: {one.label!r} has {len(one.x)} x and {len(one.y)} y (low {len(one.low)}, "
                f"high {len(one.high)}); needs one y, and one spread or none, for each x"
            )
        if is_log and min([*one.x, *one.y]) <= 0:
            raise ValueError(f"lines: {one.label!r} has values <= 0; a logarithm needs more")

    def draw(axes: Any) -> None:
        num_limits = num_measured = 0
        for one in series:
            index = num_limits if one.is_limit else num_measured
            color = COLORS[num_measured % len(COLORS)]
            if one.is_limit:
                axes.plot(one.x, one.y, color="#333333", linestyle=DASHES[index % len(DASHES)],
                          linewidth=1.5, label=one.label)  # fmt: skip
                num_limits += 1
                continue
            spread = None
            if one.low and one.high:
                below = [max(y - lo, 0) for y, lo in zip(one.y, one.low, strict=True)]
                above = [max(hi - y, 0) for y, hi in zip(one.y, one.high, strict=True)]
                spread = [below, above]
            axes.errorbar(one.x, one.y, yerr=spread, color=color, marker=MARKERS[index % 6],
                          capsize=3, linewidth=1.8, label=one.label)  # fmt: skip
            num_measured += 1
        if is_log:
            ticks = sorted({x for one in series for x in one.x})
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.minorticks_off()
            _plain_log_ticks(axes)
        else:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter("{x:,g}")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        _legend_beside(axes)

    return _save(path, draw, title, (8.0, 4.4))


def speed_against_batch(
    path: Path,
    series: Sequence[Series],
    title: str = "",
    ylabel: str = "tokens/s, all sequences",
) -> Path:
    """Tokens per second of all sequences against their number, with rooflines as limits."""
    return lines(path, series, "sequences at once (batch)", ylabel, title, True)


def latency_against_load(
    path: Path, series: Sequence[Series], ylabel: str = "latency, ms", title: str = ""
) -> Path:
    """Latency against requests per second."""
    return lines(path, series, "requests/s", ylabel, title)


def bars(path: Path, values: Mapping[str, float], xlabel: str, title: str = "") -> Path:
    """One horizontal bar for each name, its value written beside it: cost, for example.

    Raises ValueError without values or for a negative one.
    """
    _require(values, "bars", "value")
    if min(values.values()) < 0:
        raise ValueError(f"bars: {min(values.values()):g} is negative; needs values >= 0")

    def draw(axes: Any) -> None:
        names = list(values)
        rows = range(len(names))
        axes.barh(rows, list(values.values()), 0.62, color=COLORS[0])
        largest = max(values.values()) or 1.0
        for row, value in zip(rows, values.values(), strict=True):
            axes.text(value + 0.01 * largest, row, f"{value:.3g}", va="center")
        axes.set_yticks(rows, names)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.14 * largest)
        axes.set_xlabel(xlabel)
        axes.grid(axis="y", visible=False)

    return _save(path, draw, title, (8.0, 1.3 + 0.42 * len(values)))


def _require(items: Any, function: str, kind: str) -> None:
    if not items:
        raise ValueError(f"{function}: nothing to draw; needs at least one {kind}")


def _wrapped(label: str, width: int) -> str:
    """The label in lines of at most ``width`` characters, broken within a word where it must be."""
    lines = [textwrap.wrap(line, width) or [""] for line in label.splitlines() or [""]]
    return "\n".join(part for parts in lines for part in parts)


def _inside(axes: Any, x: float, y: float, text: str) -> None:
    box = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    axes.text(x, y, text, ha="center", va="center", bbox=box, zorder=5)


def _legend_beside(axes: Any, is_reversed: bool = False) -> None:
    # Beside the axes it can hide no data; in a stack its order is that of the parts.
    handles, labels = axes.get_legend_handles_labels()
    if is_reversed:
        handles, labels = handles[::-1], labels[::-1]
    labels = [_wrapped(label, 26) for label in labels]
    axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)


def _plain_log_ticks(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    bottom, top = axes.get_ylim()
    # Within a decade 1, 2 and 5 would leave one or two ticks.
    steps = (1, 2, 5) if top > 12 * bottom else (1, 1.5, 2, 3, 4, 5, 6, 8)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))


def _save(path: Path, draw: Callable[[Any], None], title: str, size: tuple[float, float]) -> Path:
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            f"pictures need matplotlib, which is not installed: {install_hint('pictures')}"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(_RC):
        # No pyplot: it keeps every figure alive and may look for a display.
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        draw(axes)
        if title:
            figure.suptitle(title, fontsize=11)
        # Without a date the same numbers give the same file.
        unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        metadata = {".svg": unsaid, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
        figure.savefig(path, metadata=metadata)
    if path.suffix.lower() == ".svg":
        path.write_text(_shorter(path.read_text()))
    return path


def _shorter(svg: str) -> str:
    """A hundredth of a point is less than is seen; indentation, turns by 0 and groups' names are
    for nobody; the font of most texts is said once."""
    font = f"font-size: {_RC['font.size']}px; font-family: 'DejaVu Sans', "
    for useless in (
        rf'{font}[^;"]*(; )?|; font-family: [^;"]*| transform="rotate\(-0 [^"]*"',
        r' style=""|(?<=<g) id="[^"]*"|(?<=\d\.\d\d)\d+|^ +| \n(?=[LQz])',
    ):
        svg = re.sub(useless, "", svg, flags=re.MULTILINE)
    once = f"text{{{font}Verdana, Arial, sans-serif}}"
    return svg.replace('"text/css">', f'"text/css">{once}', 1)
