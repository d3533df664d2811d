"""Do two clocks tell of the same events? Durations that ranks counted against the wall clock of the records.

Whoever rewrites times and makes every hash and summary again has to keep these consistent, too.
"""

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from statistics import median

from headgrid.experiment.check.finding import Finding, Outcome
from headgrid.experiment.check.run import Run, segments
from headgrid.experiment.records import Record, block_times, of_kind, turns_s
from headgrid.experiment.stats import PHASES

CLOCK_STEP_S = 1.0
"""A host's clock may be set back so far without a word (NTP)."""
CLOCK_READ_S = 2e-3
"""Two clocks are read one after the other, and the wall clock may be slewed meanwhile."""
IDLE_S, IDLE_SHARE = 0.1, 0.02
"""What an arm may idle between blocks more than the others do: seconds, and share of its block. Measured: 2 to 7 ms on
H200s, whatever the arm."""
LONGEST_IDLE_S, LONGEST_IDLE_SHARE = {"cuda": 2.0, "cpu": 30.0}, 1.0
"""What a single block may idle: a busy host, a slow disk; a desktop may be suspended for a while."""
UNTIMED_PREFILL = 1.5
"""A prefill of the planted arm that is not timed takes so many times a timed one at most."""
PIPELINE_RANGE = (0.7, 1.6)
"""A prefill that is watched, over one that is timed. Measured: 0.995 to 1.004 where it takes seconds on H200s."""


def _duration_s(block: Record) -> float:
    """Of all its turns: the slowest rank's time."""
    return sum(sum(turns_s(block, phase)) for phase in PHASES)


def clocks(run: Run) -> Outcome:
    """Records are written in time: none before the design, none in the future, none before the one ahead of it."""
    times = [record["time_s"] for record in run.records]
    if not times:
        return
    created = datetime.fromisoformat(run.design["created"]).timestamp()
    if times[0] < created - CLOCK_STEP_S:
        yield Finding("time.order", "record 1", f"written {created - times[0]:.0f} s before the design was made")
    if times[-1] > time.time() + 86_400:
        yield Finding("time.order", f"record {len(times)}", f"written at {times[-1]:.0f} s, which is still to come")
    for place, (before, after) in enumerate(itertools.pairwise(times), start=2):
        if after < before - CLOCK_STEP_S:
            yield Finding("time.order", f"record {place}", f"written {before - after:.3f} s before the one ahead of it")
    for segment in segments(run.records):
        ready = segment.records[0]["time_s"] - segment.records[0]["start_s"]
        begun = segment.records[0].get("started_s", ready)
        if begun > ready + CLOCK_STEP_S:
            what = f"ranks were started {begun - ready:.3f} s too late for the time that they took"
            yield Finding("time.order", segment.where, what)
        if segment.records[0]["start_s"] < 0:
            yield Finding("time.order", segment.where, "ranks took less than no time to start")
        if segment.start and begun < times[segment.start - 1] - CLOCK_STEP_S:
            yield Finding("time.order", segment.where, f"began {times[segment.start - 1] - begun:.3f} s too early")


def block_clocks(run: Run) -> Outcome:
    """A block's record follows the one before it after its own duration, and not much later.

    The wall clock of the records and the duration counters of the ranks are different clocks of the same events.
    """
    idle: dict[str, list[float]] = defaultdict(list)
    lengths: dict[str, list[float]] = defaultdict(list)
    planted = {arm["label"] for arm in run.design["arms"] if arm["role"] == "planted"}
    for segment in segments(run.records):
        for before, record in itertools.pairwise(segment.records):
            if record["kind"] != "block":
                continue
            gap, duration = record["time_s"] - before["time_s"], _duration_s(record)
            where = f"{segment.where}, block {record['block']} of {record['arm']}"
            yield from _starts(before, record, where)
            if duration > gap + CLOCK_READ_S + CLOCK_READ_S * duration:
                yield Finding("time.blocks", where, f"took {duration:.4f} s within {gap:.4f} s")
            gap -= _untimed_s(record) if record["arm"] in planted else 0.0
            if (
                gap - duration > max(LONGEST_IDLE_S[run.design["device"]], LONGEST_IDLE_SHARE * duration)
                and before["kind"] == "block"
            ):
                yield Finding("time.blocks", where, f"took {duration:.4f} s of {gap:.4f} s: the rest is unexplained")
            if before["kind"] == "block":
                idle[record["arm"]].append(gap - duration)
                lengths[record["arm"]].append(duration)
    usual = median([median(values) for values in idle.values()]) if idle else 0.0
    for arm, values in idle.items():
        allowed = max(IDLE_S, IDLE_SHARE * median(lengths[arm]), 3 * usual)
        if abs(median(values) - usual) > allowed:
            what = f"idles {median(values):.4f} s around each block, the arms at the median {usual:.4f} s"
            yield Finding("time.idle", arm, f"{what}: its durations are not those that passed")


def _starts(before: Record, record: Record, where: str) -> Iterator[Finding]:
    """Prefill begins after the record ahead, decode after prefill, and the record follows both.

    All by rank 0, which also stamps: where cores are scarce, others leave a barrier tens of milliseconds earlier. Of
    several turns its durations are known as means only, so that the whole is held against the whole.
    """
    own = {phase: record[f"{phase}_s"][0] for phase in PHASES}
    turns = len(turns_s(record, "prefill"))
    told = own if turns == 1 else dict.fromkeys(PHASES, 0.0)
    stamps = [(phase, start, told[phase]) for row in _stamps(record) for phase, start in zip(PHASES, row, strict=True)]
    written = ("the record", record["time_s"], 0.0)
    pairs = list(itertools.pairwise([("the record ahead", before["time_s"], 0.0), *stamps, written]))
    if turns > 1:
        pairs.append((("its turns", stamps[0][1], turns * sum(own.values())), written))
    for (name, start, duration), (then, later, _) in pairs:
        if start + duration > later + CLOCK_READ_S + CLOCK_READ_S * duration:
            late = start + duration - later
            yield Finding("time.blocks", where, f"{then} is stamped {late:.4f} s before {name} had ended")


def _stamps(record: Record) -> list[tuple[float, ...]]:
    """Of each turn, when its phases began; nothing in journals without start times."""
    keys = [f"{phase}_start_s" for phase in PHASES]
    if record.get("turns"):
        return list(zip(*(record["turns"][key] for key in keys), strict=True))
    return [tuple(record[key] for key in keys)] if all(record.get(key) is not None for key in keys) else []


def _untimed_s(record: Record) -> float:
    """What a planted arm does between its timed phases: another prefill, which is not timed."""
    lengths = turns_s(record, "prefill")
    gaps = [decode - prefill - took for (prefill, decode), took in zip(_stamps(record), lengths, strict=False)]
    return min(max(0.0, sum(gaps)), UNTIMED_PREFILL * sum(lengths))


def pipeline_clocks(run: Run) -> Outcome:
    """A prefill whose stages are watched takes as long as one that is timed (on GPUs, where it takes a second or more:
    on a CPU others may use the cores in the meantime).
    """
    for record in of_kind(run.records, "pipeline"):
        events = [event for event in record["events"] if event["phase"] == "prefill"]
        if any(event["end_s"] < event["start_s"] for event in events):
            yield Finding("time.pipeline", record["arm"], "a stage ends before it begins")
        span = max(e["end_s"] for e in events) - min(e["start_s"] for e in events)
        times = list(block_times(run.records, record["arm"], "prefill").values())
        if not times or median(times) < 1.0 or run.design["device"] == "cpu":
            continue
        ratio = span / median(times)
        if not PIPELINE_RANGE[0] <= ratio <= PIPELINE_RANGE[1]:
            what = f"prefill took {span:.3f} s when its stages were watched, {median(times):.3f} s when it was timed"
            yield Finding("time.pipeline", record["arm"], what)
