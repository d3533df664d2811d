"""What happened when: every block in the order in which blocks ran, and what the counters said meanwhile."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from headgrid.experiment.records import Phase, Record
from headgrid.experiment.telemetry import COUNTERS, Telemetry
from headgrid.experiment.telemetry_series import Point, Window, points, rank_gpus, windows
from headgrid.report.blocks import Block
from headgrid.report.format import duration, percent
from headgrid.report.plots import SETTINGS, TEXT, WIDE, WIDTH, axes_of, finish, grouped, label_rows
from headgrid.report.svg import BAD, BAND, INK, MUTED, PAPER, RULE, SERIES, Marks

# --- blocks ----------------------------------------------------------------------------------------------------------

Place = tuple[int, bool, int]
LEAST_SCALE, LARGEST_SCALE = 0.005, 0.25
"""Deviation from the median that half a row stands for: at least the first, lest rounding look like noise; what lies
beyond the second is drawn at the row's edge, lest one block flatten all others."""
ROOM = 0.36
"""Of a row's height, to either side of its middle."""
MANY_PLACES = 60
"""From so many blocks on the drawing takes the page's width."""
MAX_MARKS = 1_000
"""Of a drawing, else it has lines alone: each mark is some hundred bytes of the page."""


def is_wide(blocks: Sequence[Block]) -> bool:
    """Whether the blocks need the whole width of the page."""
    return len({block.place for block in blocks}) > MANY_PLACES


def blocks_over_time(
    name: str, labels: Sequence[str], blocks: Sequence[Block], phase: Phase
) -> tuple[Markup, str] | None:
    """A row for each arm: every block's time against the median of the arm's timed ones, and how to read it.

    `labels` of arms by their numbers; marks are numbered as in `blocks`. None without timed blocks.
    """
    timed = [(index, block) for index, block in enumerate(blocks) if block.seconds[phase] is not None]
    arms = sorted({block.arm for _, block in timed if not block.warm_up})
    if not arms:
        return None
    places = {place: at for at, place in enumerate(sorted({block.place for _, block in timed}))}
    medians = {arm: _median(blocks, arm, phase) for arm in arms}
    scale = _scale(timed, medians, phase)
    with matplotlib.rc_context(SETTINGS):
        figure, axes = axes_of(WIDE if is_wide(blocks) else WIDTH, 0.75 + 0.42 * len(arms))
        marks = Marks()
        for row, arm in enumerate(arms):
            mine = [(index, block) for index, block in timed if block.arm == arm]
            _row(axes, row, mine, phase, (places, medians[arm], scale), marks)
            if len(timed) <= MAX_MARKS:
                _dots(axes, row, mine, phase, (places, medians[arm], scale), marks)
        label_rows(axes, [(arm, labels[arm]) for arm in arms], marks)
        _mark_launches(axes, places)
        axes.set_xlim(-0.6, len(places) - 0.4)
        axes.set_xlabel(f"launch; row height ±{percent(scale)} of median")
        told = (f"{labels[arm]} {_range(blocks, arm, phase)}" for arm in arms)
        text = f"Block times in the order they ran, shortest to longest: {'; '.join(told)}."
        return finish(figure, name, text, marks, rows=True), _caption(timed, medians, phase, scale)


def _median(blocks: Sequence[Block], arm: int, phase: Phase) -> float:
    return median(_seconds(blocks, arm, phase))


def _seconds(blocks: Sequence[Block], arm: int, phase: Phase) -> list[float]:
    mine = (block.seconds[phase] for block in blocks if block.arm == arm and not block.warm_up)
    return [seconds for seconds in mine if seconds is not None]


def _range(blocks: Sequence[Block], arm: int, phase: Phase) -> str:
    listed = _seconds(blocks, arm, phase)
    return f"{duration(min(listed))} to {duration(max(listed))}"


def _deviation(block: Block, middle: float, phase: Phase) -> float:
    return (block.seconds[phase] or 0.0) / middle - 1


def _scale(timed: Iterable[tuple[int, Block]], medians: Mapping[int, float], phase: Phase) -> float:
    far = (abs(_deviation(b, medians[b.arm], phase)) for _, b in timed if not b.warm_up)
    return min(LARGEST_SCALE, max(LEAST_SCALE, *far, 0.0))


def _caption(timed: Sequence[tuple[int, Block]], medians: Mapping[int, float], phase: Phase, scale: float) -> str:
    beyond = sum(abs(_deviation(b, medians[b.arm], phase)) > scale for _, b in timed if b.arm in medians)
    parts = ["Up is slower. Figures at the right: medians. Drift moves all rows alike."]
    if any(block.warm_up for _, block in timed):
        parts.append("Grey rings are warm-up, which no figure uses.")
    if any(block.codes for _, block in timed):
        parts.append("Red rings: the block is suspect or invalid, see Isolation.")
    if len(timed) > MAX_MARKS:
        parts = ["Up is slower. Figures at the right: medians. Lines only: there are too many blocks for marks."]
    elif beyond:
        parts.append(f"Beyond their row, drawn at its edge: {beyond:,}.")
    return " ".join(parts)


Geometry = tuple[Mapping[Place, int], float, float]
"""Places from left to right, the arm's median in seconds, and the deviation that fills half a row."""


def _at(row: int, block: Block, phase: Phase, geometry: Geometry) -> tuple[float, float]:
    places, middle, scale = geometry
    deviation = max(-scale, min(scale, _deviation(block, middle, phase)))
    return places[block.place], row - ROOM * deviation / scale


def _row(
    axes: Axes, row: int, mine: Sequence[tuple[int, Block]], phase: Phase, geometry: Geometry, marks: Marks
) -> None:
    places, middle, _ = geometry
    arm = mine[0][1].arm
    (base,) = axes.plot([-0.6, len(places) - 0.6], [row, row], color=RULE, linewidth=0.6)
    base.set_gid(marks.add(arm, row=row))
    for launch in sorted({block.launch for _, block in mine}):
        timed = [block for _, block in mine if block.launch == launch and not block.warm_up]
        xs, ys = _columns([_at(row, block, phase, geometry) for block in timed])
        (line,) = axes.plot(xs, ys, color=SERIES[0], linewidth=0.9, alpha=0.6)
        line.set_gid(marks.add(arm, row=row))
    style = {"va": "center", "fontsize": TEXT - 1.5, "color": MUTED}
    end = (len(places) - 1, row)
    text = axes.annotate(duration(middle), end, (8, 0), textcoords="offset points", **style)
    text.set_gid(marks.add(arm, row=row))


def _dots(
    axes: Axes, row: int, mine: Sequence[tuple[int, Block]], phase: Phase, geometry: Geometry, marks: Marks
) -> None:
    styles = (
        (lambda block: block.warm_up, {"color": MUTED, "markerfacecolor": PAPER, "markersize": 4.2}),
        (lambda block: not block.warm_up and not block.codes, {"color": SERIES[0], "markersize": 4.6}),
        (lambda block: bool(block.codes), {"color": BAD, "markerfacecolor": PAPER, "markersize": 5.6}),
    )
    for chosen, style in styles:
        if found := [(index, block) for index, block in mine if chosen(block)]:
            xs, ys = _columns([_at(row, block, phase, geometry) for _, block in found])
            (dots,) = axes.plot(xs, ys, linestyle="none", marker="o", **style)
            dots.set_gid(marks.add(mine[0][1].arm, row=row, points=[index for index, _ in found]))


def _columns(xy: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in xy], [y for _, y in xy]


def _mark_launches(axes: Axes, places: Mapping[Place, int]) -> None:
    firsts: dict[int, int] = {}
    for (launch, _, _), at in places.items():
        firsts.setdefault(launch, at)
    for at in list(firsts.values())[1:]:
        axes.axvline(at - 0.5, color=RULE, linewidth=0.8)
    every = -(-len(firsts) // 12)
    shown = {launch: at for launch, at in firsts.items() if list(firsts).index(launch) % every == 0}
    axes.set_xticks([at - 0.3 for at in shown.values()], [str(launch) for launch in shown], ha="left")


# --- telemetry -------------------------------------------------------------------------------------------------------

PANELS = (("sm_clock_mhz", "power_w", "temperature_c"), ("cpu_busy_s",))
"""Counters that are drawn: those of GPUs, and without GPUs the load of the cores."""
MAX_POINTS = 300
"""Of a line: more could not be told apart."""
MAX_LINES = 4
"""GPUs with a line of their own; of more, the mean is drawn."""
MAX_BOXES = 400


def telemetry_over_time(
    name: str, telemetry: Telemetry | None, records: Sequence[Record], numbers: Mapping[str, int]
) -> tuple[Markup, str] | None:
    """Counters from the first timed block to the last, the arms' turns below, and how to read it. None without."""
    turns = [turn for turn in windows(records) if turn.arm in numbers]
    panels = _panels(telemetry, records, turns) if telemetry and turns else {}
    if not panels:
        return None
    start = turns[0].start_s
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDE, 0.6 + 1.25 * len(panels)), layout="constrained", facecolor="none")
        ratios = [*[1.0] * len(panels), 0.22]
        every = figure.subplots(len(ratios), sharex=True, gridspec_kw={"height_ratios": ratios}, squeeze=False)[:, 0]
        marks = Marks()
        for axes, (counter, lines) in zip(every, panels.items(), strict=False):
            _panel(axes, counter, lines, start)
            _bands(axes, turns, start)
        _lane(every[-1], turns, start, numbers, marks)
        every[-1].set_xlabel("s since the first timed block began; below, whose turn it was")
        if len(next(iter(panels.values()))) > 1:
            handles, labels = every[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False, labelcolor=INK)
        where = " Of rank 0's host alone." * bool(telemetry and telemetry.others)
        return finish(figure, name, _alternative(panels), marks), _telemetry_caption(turns, panels) + where


Lines = Mapping[str, Sequence[tuple[float, float]]]
"""Of one counter: for each GPU its times, in Unix seconds, and values."""


def _panels(telemetry: Telemetry, records: Sequence[Record], turns: Sequence[Window]) -> dict[str, Lines]:
    first, last = turns[0].start_s, turns[-1].end_s
    for group in PANELS:
        found = {}
        for counter in group:
            inside = [point for point in points(telemetry, counter) if first <= point.end_s <= last]
            if lines := _lines(counter, inside, rank_gpus(telemetry, records)):
                found[counter] = lines
        if found:
            return found
    return {}


def _lines(counter: str, inside: Sequence[Point], gpus: Sequence[int]) -> Lines:
    if COUNTERS[counter].place != "gpu":
        rates = [(p.end_s, fmean(p.values.values()) / p.seconds) for p in inside if p.values and p.seconds > 0]
        return {"mean": _thinned(rates)} if rates else {}
    series = {f"GPU {gpu}": [(p.end_s, p.values[gpu]) for p in inside if gpu in p.values] for gpu in gpus}
    if len(gpus) > MAX_LINES:
        ours = [(p.end_s, [p.values[gpu] for gpu in gpus if gpu in p.values]) for p in inside]
        series = {f"mean of {len(gpus)} GPUs": [(end_s, fmean(values)) for end_s, values in ours if values]}
    return {label: _thinned(values) for label, values in series.items() if values}


def _thinned(series: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over neighbours, so that at most MAX_POINTS are left."""
    size = -(-len(series) // MAX_POINTS)
    groups = (series[at : at + size] for at in range(0, len(series), size))
    return [(fmean(t for t, _ in group), fmean(value for _, value in group)) for group in groups]


def _panel(axes: Axes, counter: str, lines: Lines, start: float) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_facecolor("none")
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    for index, (label, series) in enumerate(lines.items()):
        xs, ys = _columns(series)
        axes.plot([x - start for x in xs], ys, color=SERIES[2 * index % len(SERIES)], linewidth=1, label=label)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.locator_params(axis="y", nbins=4)
    axes.yaxis.set_major_formatter(FuncFormatter(grouped))
    axes.set_title(f"{COUNTERS[counter].label}, {COUNTERS[counter].unit}", loc="left", fontsize=TEXT - 1, color=MUTED)


def _bands(axes: Axes, turns: Sequence[Window], start: float) -> None:
    """Behind each block, from its first turn to its last; of many, behind each launch."""
    for by_block in (True, False):
        spans: dict[tuple[int, ...], list[float]] = {}
        for turn in turns:
            key = (turn.launch, turn.block) if by_block else (turn.launch,)
            spans.setdefault(key, []).extend((turn.start_s - start, turn.end_s - start))
        if len(spans) <= 60:
            break
    for edges in spans.values():
        axes.axvspan(min(edges), max(edges), color=BAND, alpha=0.55, linewidth=0, zorder=0)


def _lane(axes: Axes, turns: Sequence[Window], start: float, numbers: Mapping[str, int], marks: Marks) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_facecolor("none")
    axes.tick_params(length=0)
    axes.set_yticks([])
    boxes = _boxes(turns)
    for turn in boxes[:MAX_BOXES]:
        number, left = numbers[turn.arm], turn.start_s - start
        colour, share = SERIES[number % len(SERIES)], 0.75 if turn.phase == "prefill" else 0.4
        box = axes.barh(0, turn.end_s - turn.start_s, left=left, height=1, color=colour, alpha=share, linewidth=0)
        phase = turn.phase if len(boxes) == len(turns) else "all turns"
        place = f"launch {turn.launch}, block {turn.block}, {phase}"
        text = f"{turn.arm}: {place}, {left:,.1f} to {turn.end_s - start:,.1f} s"
        box[0].set_gid(marks.add(number, text=text))


def _boxes(turns: Sequence[Window]) -> list[Window]:
    """Each turn's phases, or where these are too many one box for all turns of an arm in a block."""
    if len(turns) <= MAX_BOXES:
        return list(turns)
    whole: dict[tuple[int, int, str], Window] = {}
    for turn in turns:
        first = whole.setdefault((turn.launch, turn.block, turn.arm), turn)
        whole[turn.launch, turn.block, turn.arm] = replace(first, end_s=turn.end_s)
    return list(whole.values())


def _alternative(panels: Mapping[str, Lines]) -> str:
    parts = []
    for counter, lines in panels.items():
        values = [value for series in lines.values() for _, value in series]
        low, high = min(values), max(values)
        parts.append(f"{COUNTERS[counter].label} {low:,.4g} to {high:,.4g} {COUNTERS[counter].unit}")
    return f"Telemetry over time: {'; '.join(parts)}."


def _telemetry_caption(turns: Sequence[Window], panels: Mapping[str, Lines]) -> str:
    first, last = turns[0].start_s, turns[-1].end_s
    most = max(len(series) for lines in panels.values() for series in lines.values())
    boxes = len(_boxes(turns))
    cut = f" Of {boxes:,} turns the first {MAX_BOXES} are drawn." if boxes > MAX_BOXES else ""
    return f"Means over {(last - first) / most:.2g} s and longer; bands are timed blocks, arm after arm.{cut}"
