"""Do the times look measured? Digits, copies, spread, and the equality of arms that share an engine."""

import math
from collections import defaultdict
from collections.abc import Iterator
from statistics import fmean, stdev
from typing import Any

from headgrid.experiment.check.finding import Finding, Outcome
from headgrid.experiment.check.run import Run, Segment, segments
from headgrid.experiment.records import block_times, of_kind
from headgrid.experiment.stats import PHASES, log_ratios

TWIN_LEVEL = 1e-4
"""Error level at which A/A twins are called different, and the ratio that such a difference must exceed as well."""
TWIN_RATIO = 1.05


def digits(run: Run) -> Outcome:
    """Durations are rounded to nanoseconds, and use them."""
    blocks = list(of_kind(run.records, "block"))
    values = [s for record in blocks for phase in PHASES for s in record[f"{phase}_s"]]
    values += [s for record in blocks for phase in PHASES for s in (record.get("turns") or {}).get(f"{phase}_s", ())]
    odd = [seconds for seconds in values if round(seconds, 9) != seconds]
    if odd:
        yield Finding("noise.digits", "blocks", f"{len(odd)} durations are not whole nanoseconds, such as {odd[0]!r} s")
    coarse = [seconds for seconds in values if round(seconds, 5) == seconds]
    if len(coarse) > max(2, len(values) // 200):
        what = f"{len(coarse)} of {len(values)} durations are whole multiples of 10 us, such as {coarse[0]!r} s"
        yield Finding("noise.digits", "blocks", what)


def copies(run: Run) -> Outcome:
    """No two timings have the same nanoseconds on all ranks; and none in a block has another's times a factor."""
    seen: dict[tuple[float, ...], str] = {}
    neighbours: dict[tuple[Any, ...], list[tuple[str, list[float]]]] = defaultdict(list)
    for record in of_kind(run.records, "block"):
        where = f"launch {record['launch']}, block {record['block']} of {record['arm']}"
        for phase in PHASES:
            times = record[f"{phase}_s"]
            if len(times) > 1 and seen.setdefault(tuple(times), where) is not where:
                yield Finding("noise.copies", where, f"{phase} has the times of {seen[tuple(times)]}")
            key = (record["launch"], record["block"], record.get("attempt", 0), record.get("retry", 0), phase)
            for other, theirs in neighbours[key]:
                if _scaled(times, theirs):
                    yield Finding("noise.copies", where, f"{phase} has the times of {other}, times a factor")
            neighbours[key].append((where, times))


def _scaled(one: list[float], other: list[float]) -> bool:
    """Whether all ranks agree on a factor to the nanosecond. Fewer than four ranks may do so by chance."""
    if len(one) < 4 or len(one) != len(other) or max(one) - min(one) < 1e-6:
        return False
    factor = max(one) / max(other)
    return all(abs(a - factor * b) <= 1e-9 * (1 + factor) for a, b in zip(one, other, strict=True))


def spread(run: Run) -> Outcome:
    """Times vary, and so do ratios of arms."""
    times = {(arm, phase): block_times(run.records, arm, phase) for arm in run.labels for phase in PHASES}
    for (arm, phase), values in times.items():
        if len(values) > 2 and stdev(values.values()) < 1e-7 * fmean(values.values()):
            yield Finding("noise.spread", arm, f"{phase} took the same {fmean(values.values()):.6f} s every time")
    for phase in PHASES:
        for place, a in enumerate(run.labels):
            for b in run.labels[:place]:
                logs = list(log_ratios(times[a, phase], times[b, phase]).values())
                if len(logs) > 2 and stdev(logs) < 1e-7:
                    what = f"{phase} took {math.exp(fmean(logs)):.6f} times {a}'s in every single block"
                    yield Finding("noise.spread", b, what)


def twins(run: Run) -> Outcome:
    """Arms of one layout share an engine: they are examined once, and are equally fast but for what was planted."""
    groups: dict[str, list[str]] = defaultdict(list)
    planted = {arm["label"]: run.design["planted"] for arm in run.design["arms"] if arm["role"] == "planted"}
    for arm in run.design["arms"]:
        groups[arm["layout"]].append(arm["label"])
    for first, *others in groups.values():
        for other in others:
            for segment in segments(run.records):
                yield from _examined_alike(segment, first, other)
            for phase in PHASES:
                yield from _equally_fast(run, first, other, phase, planted.get(other, 0.0))


def _examined_alike(segment: Segment, a: str, b: str) -> Iterator[Finding]:
    """What both have: an attempt that was cut may have the first one's only."""
    for kind in ("memory", "traffic", "pipeline", "verify", "breakdown"):
        mine, others = (
            [{k: v for k, v in r.items() if k not in ("arm", "time_s")} for r in of_kind(segment.records, kind, arm)]
            for arm in (a, b)
        )
        if any(one != other for one, other in zip(mine, others, strict=False)):
            what = f"its {kind} record is not that of {a}, which is the same engine"
            yield Finding("twins.records", f"{segment.where}, {b}", what)


def _equally_fast(run: Run, a: str, b: str, phase: Any, planted: float) -> Iterator[Finding]:
    times = [block_times(run.records, arm, phase) for arm in (a, b)]
    logs = [log - math.log1p(planted) for log in log_ratios(*times).values()]
    if len(logs) < 3:
        return
    from scipy.special import stdtrit

    half = float(stdtrit(len(logs) - 1, 1 - TWIN_LEVEL / 2)) * stdev(logs) / math.sqrt(len(logs))
    if abs(fmean(logs)) - half > math.log(TWIN_RATIO):
        what = f"{phase} has {math.exp(fmean(logs)):.3f} times the throughput of {b}, which is the same engine"
        yield Finding(
            "twins.times",
            a,
            f"{what} (99.99 % interval {math.exp(fmean(logs) - half):.3f} to {math.exp(fmean(logs) + half):.3f})",
        )
