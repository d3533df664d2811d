"""The plots of a report, as SVG elements. Each returns None if there is nothing to draw."""

import io
import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter

from headgrid.experiment.multiplicity import claimed
from headgrid.report.format import NOT_MEASURED, percent, ratio, significant
from headgrid.report.svg import BAD, BAND, GOOD, INK, MUTED, PAPER, RULE, SERIES, Marks, inline

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


def axes_of(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches with one set of axes: no frame, no background."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    return figure, axes


def finish(figure: Figure, name: str, alternative: str, marks: Marks | None = None, *, rows: bool = False) -> Markup:
    """The drawing as an element; `rows`: its y axis counts rows, so that some may be taken out."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer)
    return inline(buffer.getvalue(), name, alternative, marks or (), _pitch(figure) if rows else 0.0)


def _pitch(figure: Figure) -> float:
    """Height of one row in units of the drawing, known once it has been laid out."""
    (axes,) = figure.axes
    bottom, top = axes.get_ylim()
    return axes.get_position().height * figure.get_figheight() * 72 / abs(top - bottom)


def grouped(value: float, _: float | None) -> str:
    """A tick's figure as the tables write it: 100,000."""
    return f"{value:,.10g}"


def short(label: str, length: int = 26) -> str:
    """`label`, cut to fit beside an axis; the tables have it whole."""
    return label if len(label) <= length else label[: length - 1] + "…"


def bars(name: str, arms: Sequence[Mapping[str, Any]], key: str, scale: float, unit: str) -> Markup | None:
    """Mean of the figure `key` for each arm as a bar, with error bars of two SDs on either side."""
    shown = [(number, arm["label"], arm[key]) for number, arm in enumerate(arms) if arm[key] is not None]
    if not shown:
        return None
    marks = Marks()
    with matplotlib.rc_context(SETTINGS):
        figure, axes = axes_of(WIDTH, 0.75 + 0.36 * len(shown))
        for row, (number, label, values) in enumerate(shown):
            told = f"{label}: {figure_text(values, scale)} {unit}"
            _bar(axes, row, values["mean"] * scale, 2 * scale * (values["sd"] or 0.0), marks, (number, told))
        label_rows(axes, [(number, label) for number, label, _ in shown], marks)
        axes.set_xlim(0, 1.2 * max(scale * (values["mean"] + 2 * (values["sd"] or 0.0)) for *_, values in shown))
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(FuncFormatter(grouped))
        axes.set_xlabel(f"{unit}; error bars ±2 SD")
        parts = (f"{label} {significant(values['mean'] * scale, 4)}" for _, label, values in shown)
        return finish(figure, name, f"Bar chart, {unit}: {'; '.join(parts)}.", marks, rows=True)


def figure_text(values: Mapping[str, Any], scale: float) -> str:
    """A figure with its SD, for those who point at it."""
    sd = f" ± {significant(values['sd'] * scale, 2)} (SD)" if values["sd"] is not None else ""
    return f"{significant(values['mean'] * scale, 6)}{sd}"


def stacked(
    name: str,
    arms: Mapping[str, Sequence[float]],
    parts: Sequence[str],
    unit: str,
    scale: float,
    numbers: Mapping[str, int],
) -> Markup | None:
    """Each arm's parts, in their order, side by side in one bar; the last one is pale. `numbers` of arms by label."""
    if not arms:
        return None
    colours, marks = [*SERIES[: 2 * len(parts) - 2 : 2], BAND], Marks()
    with matplotlib.rc_context(SETTINGS):
        figure, axes = axes_of(WIDTH, 1.05 + 0.36 * len(arms))
        left = [0.0] * len(arms)
        for place, part in enumerate(parts):
            widths = [values[place] * scale for values in arms.values()]
            colour, alpha = colours[place], 1.0 if part == parts[-1] else 0.6
            drawn = axes.barh(range(len(arms)), widths, left=left, height=0.62, color=colour, alpha=alpha, label=part)
            for row, (bar, label) in enumerate(zip(drawn, arms, strict=True)):
                told = f"{label}: {part} {significant(widths[row])} {unit}"
                bar.set_gid(marks.add(numbers[label], text=told, row=row))
            left = [one + width for one, width in zip(left, widths, strict=True)]
        label_rows(axes, [(numbers[label], label) for label in arms], marks)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(FuncFormatter(grouped))
        axes.set_xlabel(unit)
        figure.legend(loc="outside lower center", ncols=len(parts), frameon=False, labelcolor=INK)
        told = (
            f"{label} {', '.join(f'{part} {significant(v * scale)}' for part, v in zip(parts, values, strict=True))}"
            for label, values in arms.items()
        )
        return finish(figure, name, f"Stacked bar chart, {unit}: {'; '.join(told)}.", marks, rows=True)


def _bar(axes: Axes, row: int, mean: float, spread: float, marks: Marks, told: tuple[int, str]) -> None:
    number, text = told
    axes.barh(row, mean, height=0.62, color=SERIES[0], alpha=0.35)[0].set_gid(marks.add(number, text=text, row=row))
    if spread:
        ends = [mean - spread, mean + spread]
        (line,) = axes.plot(ends, [row, row], "|-", color=INK, markersize=7, linewidth=1.2, markeredgewidth=1.2)
        line.set_gid(marks.add(number, text=text, row=row))
    place = (mean + spread, row)
    figure = axes.annotate(
        significant(mean, 4), place, (6, 0), textcoords="offset points", va="center", fontsize=TEXT - 1
    )
    figure.set_gid(marks.add(number, row=row))


def label_rows(axes: Axes, arms: Sequence[tuple[int, str]], marks: Marks) -> None:
    """Arms, by number and label, beside an axis that counts rows downwards."""
    axes.set_yticks(range(len(arms)), [short(label) for _, label in arms], color=INK)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    for row, (text, (number, _)) in enumerate(zip(axes.get_yticklabels(), arms, strict=True)):
        text.set_gid(marks.add(number, row=row))


def ratios(name: str, rows: Sequence[Mapping[str, Any]], margin: float, numbers: Mapping[str, int]) -> Markup | None:
    """Throughput ratios with their intervals against the margin band; `numbers` of the arms by their labels."""
    shown = [row for row in rows if row["ratio"] is not None]
    if not shown:
        return None
    marks = Marks()
    with matplotlib.rc_context(SETTINGS):
        figure, axes = axes_of(WIDTH, 0.7 + 0.44 * len(shown))
        axes.axvspan(1 / (1 + margin), 1 + margin, color=BAND, linewidth=0)
        axes.axvline(1, color=MUTED, linewidth=0.8)
        edges = [edge for row in shown for edge in (row["ci95"] or [row["ratio"]])] + [1 / (1 + margin), 1 + margin]
        left, right = min(edges), max(edges)
        pad = 0.06 * (right - left)
        for index, row in enumerate(shown):
            colour = {"faster": GOOD, "slower": BAD}.get(claimed(row), INK)
            told = {"text": _ratio_text(row), "row": index}
            arms = (numbers[row["a"]], numbers[row["b"]])
            if row["ci95"]:
                (line,) = axes.plot(row["ci95"], [index, index], color=colour, linewidth=2.2, solid_capstyle="butt")
                line.set_gid(marks.add(*arms, **told))
            fill = colour if row["ci95"] else PAPER
            (dot,) = axes.plot(row["ratio"], index, "o", color=colour, markerfacecolor=fill, markersize=5)
            dot.set_gid(marks.add(*arms, **told))
            _name_ratio(axes, row, index).set_gid(marks.add(*arms, **told))
        axes.set_xlim(left - pad, right + pad)
        axes.set_ylim(len(shown) - 0.6, -0.95)
        axes.set_yticks([])
        axes.set_xlabel(f"throughput ratio with 95 % interval; band: margin of ±{percent(margin)}")
        return finish(figure, name, f"Throughput ratios: {'; '.join(map(_ratio_text, shown))}.", marks, rows=True)


def _name_ratio(axes: Axes, row: Mapping[str, Any], index: int) -> Annotation:
    place, text = (0, index - 0.2), f"{short(row['a'])} / {short(row['b'])}"
    return axes.annotate(text, place, xycoords=("axes fraction", "data"), va="bottom", fontsize=TEXT - 1.5, bbox=_CLEAR)


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
        figure, axes = axes_of(WIDE, 0.65 + 0.42 * stages)
        every, marks = _label_every(shown, end - start), Marks()
        for event in shown:
            left, width = (event["start_s"] - start) * scale, (event["end_s"] - event["start_s"]) * scale
            colour = SERIES[event["micro_batch"] % len(SERIES)]
            box = axes.barh(event["stage"], width, left=left, height=0.74, color=colour, alpha=0.45, edgecolor=PAPER)
            box[0].set_gid(marks.add(text=_event_text(event, left, left + width, unit)))
            if event["micro_batch"] % every == 0:
                text = str(event["micro_batch"])
                axes.text(left + width / 2, event["stage"], text, ha="center", va="center", fontsize=TEXT - 1)
        axes.set_yticks(range(stages), [f"stage {stage}" for stage in range(stages)], color=INK)
        axes.set_ylim(stages - 0.5, -0.5)
        axes.set_xlim(0, (end - start) * scale)
        axes.xaxis.set_major_formatter(FuncFormatter(grouped))
        axes.set_xlabel(f"{unit} since the first micro-batch started; numbers are micro-batches")
        return finish(figure, name, _timeline_text(shown, stages), marks), _idle(shown, stages, end - start, events)


def _event_text(event: Mapping[str, Any], start: float, end: float, unit: str) -> str:
    place = f"stage {event['stage']}, micro-batch {event['micro_batch']}, step {event['step']}"
    return f"{place}: {start:.4g} to {end:.4g} {unit}"


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
