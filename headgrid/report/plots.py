"""The plots of a report, as SVG elements. Each returns None if there is nothing to draw."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from headgrid.experiment.records import Record, block_times
from headgrid.report.format import NOT_MEASURED, duration, percent, ratio, significant
from headgrid.report.svg import BAD, BAND, GOOD, INK, MUTED, PAPER, RULE, SERIES, inline

WIDTH = 5.2  # inches of 72 units: half of a desktop page, all of a phone's
WIDE = 11.0
TEXT = 10.5
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be selected, searched and read aloud
    "svg.hashsalt": "headgrid",
    "text.parse_math": False,  # a label with a dollar sign is a label
    "font.size": TEXT,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.unicode_minus": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": TEXT - 1,
    "ytick.labelsize": TEXT - 1,
    "axes.labelsize": TEXT - 1,
    "legend.fontsize": TEXT - 1,
}


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    return figure, axes


def _finish(figure: Figure, name: str, alternative: str) -> Markup:
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer)
    return inline(buffer.getvalue(), name, alternative)


def _grouped(value: float, _: float | None) -> str:
    """A tick's figure as the tables write it: 100,000."""
    return f"{value:,.10g}"


def short(label: str, length: int = 26) -> str:
    """`label`, cut to fit beside an axis; the tables have it whole."""
    return label if len(label) <= length else label[: length - 1] + "…"


def bars(name: str, arms: Sequence[Mapping[str, Any]], key: str, scale: float, unit: str) -> Markup | None:
    """Mean of the figure `key` for each arm as a bar, with error bars of two SDs on either side."""
    shown = [(arm["label"], arm[key]) for arm in arms if arm[key] is not None]
    if not shown:
        return None
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _axes(WIDTH, 0.75 + 0.36 * len(shown))
        means = [values["mean"] * scale for _, values in shown]
        axes.barh(range(len(shown)), means, height=0.62, color=SERIES[0], alpha=0.35)
        for row, (_, values) in enumerate(shown):
            spread = 2 * scale * (values["sd"] or 0.0)
            if spread:
                axes.errorbar(means[row], row, xerr=spread, color=INK, capsize=3.5, linewidth=1.2, capthick=1.2)
            text, place = significant(means[row], 4), (means[row] + spread, row)
            axes.annotate(text, place, (6, 0), textcoords="offset points", va="center", fontsize=TEXT - 1)
        axes.set_yticks(range(len(shown)), [short(label) for label, _ in shown], color=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max(scale * (values["mean"] + 2 * (values["sd"] or 0.0)) for _, values in shown))
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(FuncFormatter(_grouped))
        axes.set_xlabel(f"{unit}; error bars ±2 SD")
        parts = (f"{label} {significant(mean, 4)}" for (label, _), mean in zip(shown, means, strict=True))
        return _finish(figure, name, f"Bar chart, {unit}: {'; '.join(parts)}.")


def stacked(
    name: str, arms: Mapping[str, Sequence[float]], parts: Sequence[str], unit: str, scale: float
) -> Markup | None:
    """Each arm's parts, in their order, side by side in one bar; the last one is pale."""
    if not arms:
        return None
    colours = [*SERIES[: 2 * len(parts) - 2 : 2], BAND]
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _axes(WIDTH, 1.05 + 0.36 * len(arms))
        left = [0.0] * len(arms)
        for place, part in enumerate(parts):
            widths = [values[place] * scale for values in arms.values()]
            colour, alpha = colours[place], 1.0 if part == parts[-1] else 0.6
            axes.barh(range(len(arms)), widths, left=left, height=0.62, color=colour, alpha=alpha, label=part)
            left = [one + width for one, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(arms)), [short(label) for label in arms], color=INK)
        axes.invert_yaxis()
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(FuncFormatter(_grouped))
        axes.set_xlabel(unit)
        figure.legend(loc="outside lower center", ncols=len(parts), frameon=False, labelcolor=INK)
        told = (
            f"{label} {', '.join(f'{part} {significant(v * scale)}' for part, v in zip(parts, values, strict=True))}"
            for label, values in arms.items()
        )
        return _finish(figure, name, f"Stacked bar chart, {unit}: {'; '.join(told)}.")


def blocks_over_time(name: str, labels: Sequence[str], records: Sequence[Record], phase: Any) -> Markup | None:
    """Time of every timed block in the order of launches and blocks, one line for each arm."""
    times = {label: block_times(records, label, phase) for label in labels}
    keys = sorted({key for series in times.values() for key in series})
    if not keys:
        return None
    place = {key: index for index, key in enumerate(keys)}
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _axes(WIDTH, 3.0)
        for index, (label, series) in enumerate(times.items()):
            for launch in sorted({key.launch for key in series}):
                mine = sorted(key for key in series if key.launch == launch)
                axes.plot(
                    [place[key] for key in mine],
                    [series[key] * 1e3 for key in mine],
                    color=SERIES[index % len(SERIES)],
                    marker=_MARKERS[index % len(_MARKERS)],
                    markersize=3.6,
                    linewidth=0.9,
                    linestyle=_LINES[index // len(SERIES) % len(_LINES)],
                    label=short(label) if launch == keys[0].launch else None,
                )
        _mark_launches(axes, place)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.yaxis.set_major_formatter(FuncFormatter(_grouped))
        axes.set_ylabel("block time, ms")
        figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=INK)
        drifts = (f"{label} {_range(series.values())}" for label, series in times.items() if series)
        return _finish(figure, name, f"Block times in the order they ran, shortest to longest: {'; '.join(drifts)}.")


_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("solid", "dashed", "dotted")
"""For arms beyond the number of colours."""


def _range(seconds: Iterable[float]) -> str:
    listed = list(seconds)
    return f"{duration(min(listed))} to {duration(max(listed))}"


def _mark_launches(axes: Axes, place: Mapping[Any, int]) -> None:
    firsts = {}
    for key, index in place.items():
        firsts.setdefault(key.launch, index)
    for index in list(firsts.values())[1:]:
        axes.axvline(index - 0.5, color=RULE, linewidth=0.8)
    axes.set_xticks(list(firsts.values()), [f"launch {k}" if k == min(firsts) else str(k) for k in firsts], ha="left")


def ratios(name: str, rows: Sequence[Mapping[str, Any]], margin: float) -> Markup | None:
    """Throughput ratios with their intervals against the margin band."""
    shown = [row for row in rows if row["ratio"] is not None]
    if not shown:
        return None
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _axes(WIDTH, 0.7 + 0.44 * len(shown))
        axes.axvspan(1 / (1 + margin), 1 + margin, color=BAND, linewidth=0)
        axes.axvline(1, color=MUTED, linewidth=0.8)
        edges = [edge for row in shown for edge in (row["ci95"] or [row["ratio"]])] + [1 / (1 + margin), 1 + margin]
        left, right = min(edges), max(edges)
        pad = 0.06 * (right - left)
        for index, row in enumerate(shown):
            colour = {"faster": GOOD, "slower": BAD}.get(row["verdict"], INK)
            if row["ci95"]:
                axes.plot(row["ci95"], [index, index], color=colour, linewidth=2.2, solid_capstyle="butt")
            fill = colour if row["ci95"] else PAPER
            axes.plot(row["ratio"], index, "o", color=colour, markerfacecolor=fill, markersize=5)
            text = f"{short(row['a'])} / {short(row['b'])}"
            axes.annotate(
                text,
                (0, index - 0.2),
                xycoords=("axes fraction", "data"),
                va="bottom",
                fontsize=TEXT - 1.5,
                bbox=_CLEAR,
            )
        axes.set_xlim(left - pad, right + pad)
        axes.set_ylim(len(shown) - 0.6, -0.95)
        axes.set_yticks([])
        axes.set_xlabel(f"throughput ratio with 95 % interval; band: margin of ±{percent(margin)}")
        return _finish(figure, name, f"Throughput ratios: {'; '.join(map(_ratio_text, shown))}.")


_CLEAR = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0, "alpha": 0.85}


def _ratio_text(row: Mapping[str, Any]) -> str:
    value, interval = ratio(row["ratio"], row["ci95"])
    return f"{row['a']} over {row['b']} {value}, interval {interval}, {row['verdict']}"


MAX_STEPS = 3


def timeline(name: str, events: Sequence[Mapping[str, Any]], stages: int) -> tuple[Markup, str] | None:
    """Which stage runs which micro-batch when, and a caption with the share of time the stages are idle."""
    shown = [event for event in events if event["step"] < MAX_STEPS]
    if not shown:
        return None
    start, end = min(e["start_s"] for e in shown), max(e["end_s"] for e in shown)
    scale, unit = (1e3, "ms") if end - start >= 1e-3 else (1e6, "µs")
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _axes(WIDE, 0.65 + 0.42 * stages)
        every = _label_every(shown, end - start)
        for event in shown:
            left, width = (event["start_s"] - start) * scale, (event["end_s"] - event["start_s"]) * scale
            colour = SERIES[event["micro_batch"] % len(SERIES)]
            axes.barh(event["stage"], width, left=left, height=0.74, color=colour, alpha=0.45, edgecolor=PAPER)
            if event["micro_batch"] % every == 0:
                text = str(event["micro_batch"])
                axes.text(left + width / 2, event["stage"], text, ha="center", va="center", fontsize=TEXT - 1)
        axes.set_yticks(range(stages), [f"stage {stage}" for stage in range(stages)], color=INK)
        axes.set_ylim(stages - 0.5, -0.5)
        axes.set_xlim(0, (end - start) * scale)
        axes.xaxis.set_major_formatter(FuncFormatter(_grouped))
        axes.set_xlabel(f"{unit} since the first micro-batch started; numbers are micro-batches")
        return _finish(figure, name, _timeline_text(shown, stages)), _idle(shown, stages, end - start, events)


def _label_every(events: Sequence[Mapping[str, Any]], span_s: float) -> int:
    """Every how many micro-batches a number has room, by the usual width of a box and the longest number."""
    box = 0.94 * WIDE * 72 * median(event["end_s"] - event["start_s"] for event in events) / span_s if span_s else 0
    wanted = 2 + 0.62 * TEXT * max(len(str(event["micro_batch"])) for event in events)  # a digit is 0.62 of its height
    return math.ceil(wanted / box) if box else 1


def _timeline_text(events: Sequence[Mapping[str, Any]], stages: int) -> str:
    parts = []
    for stage in range(stages):
        mine = sorted((e for e in events if e["stage"] == stage), key=lambda e: e["start_s"])
        parts.append(f"stage {stage} runs micro-batches {', '.join(str(e['micro_batch']) for e in mine) or 'none'}")
    return f"Timeline: {'; '.join(parts)}."


def _covered_s(events: Sequence[Mapping[str, Any]]) -> float:
    """Seconds in which at least one of the events goes on: micro-batches may take turns."""
    covered, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["start_s"]):
        covered += max(0.0, event["end_s"] - max(event["start_s"], until))
        until = max(until, event["end_s"])
    return covered


def _idle(shown: Sequence[Mapping[str, Any]], stages: int, span: float, events: Sequence[Mapping[str, Any]]) -> str:
    busy = sum(_covered_s([event for event in shown if event["stage"] == stage]) for stage in range(stages))
    idle = percent(max(0.0, 1 - busy / (stages * span))) if span > 0 else NOT_MEASURED
    cut = f" The first {MAX_STEPS} steps are drawn." if len(shown) < len(events) else ""
    return f"Stages are idle for {idle} of the time drawn.{cut}"
