"""Telemetry laid over the journal: the time windows of timed phases, and each counter as points that fall into them.

Pure functions of records, without torch. Times are Unix seconds of the host of rank 0, lengths of the monotonic clock
of the host itself.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headgrid.experiment.records import Phase, Record, latest_attempts, of_kind, turns_s
from headgrid.experiment.telemetry import COUNTERS, Session, Telemetry

PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Window:
    """The time of one arm's phase in one turn of a block: from the barrier to the slowest rank's end."""

    launch: int
    block: int
    arm: str
    phase: Phase
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Point:
    """One counter at one sample: `values[key]` holds from `start_s` to `end_s`, `seconds` of the monotonic clock.

    A gauge has `start_s` = `end_s`. Of a total, `values` is its growth in that time. Keys: GPUs and cores by index, 0
    for the host, processes by their ids.
    """

    start_s: float
    end_s: float
    seconds: float
    values: Mapping[int, float]


def windows(records: Sequence[Record]) -> list[Window]:
    """Windows of the turns of the blocks that count, in the order of time; empty for journals without start times."""
    found = []
    for record in of_kind(latest_attempts(records), "block"):
        for phase in PHASES:
            if record.get(f"{phase}_start_s") is None or not record.get(f"{phase}_s") or record.get("warmup"):
                continue
            starts = record["turns"][f"{phase}_start_s"] if record.get("turns") else [record[f"{phase}_start_s"]]
            place = (record["launch"], record["block"], record["arm"], phase)
            spans = zip(starts, turns_s(record, phase), strict=True)
            found += [Window(*place, start_s, start_s + seconds) for start_s, seconds in spans]
    return sorted(found, key=lambda window: window.start_s)


class Timeline:
    """Finds the windows of a moment. Windows do not overlap: ranks time one phase after the other."""

    def __init__(self, found: Sequence[Window]) -> None:
        """`found`: in the order of time."""
        self.windows = found
        self._starts = [window.start_s for window in found]
        self._ends = [window.end_s for window in found]

    def around(self, point: Point) -> Window | None:
        """The window that holds the whole point, so that nothing of another arm is in its figure."""
        at = bisect_right(self._starts, point.start_s) - 1
        return self.windows[at] if at >= 0 and point.end_s <= self._ends[at] else None

    def touched(self, start_s: float, end_s: float) -> Sequence[Window]:
        """Every window that shares a moment with [start_s, end_s]."""
        return self.windows[bisect_left(self._ends, start_s) : bisect_right(self._starts, end_s)]


def points(telemetry: Telemetry, name: str) -> list[Point]:
    """All points of one counter, session by session."""
    return [point for session in telemetry.sessions for point in _session_points(session, name)]


def _session_points(session: Session, name: str) -> Iterator[Point]:
    counter = COUNTERS[name]
    before: tuple[Mapping[str, Any], dict[int, float]] | None = None
    last: Mapping[str, Any] = session.start
    for sample in session.samples:
        values = values_of(sample, name)
        if values is not None:
            if counter.kind == "gauge":
                yield Point(sample["time_s"], sample["time_s"], 0.0, values)
            elif counter.kind == "total" and before is not None:
                grown = {key: value - before[1][key] for key, value in values.items() if key in before[1]}
                yield _point(before[0], sample, grown)
            elif counter.kind in ("interval", "bits"):
                yield _point(last, sample, values)
            before = (sample, values)
        last = sample


def _point(first: Mapping[str, Any], second: Mapping[str, Any], values: Mapping[int, float]) -> Point:
    return Point(first["time_s"], second["time_s"], second["monotonic_s"] - first["monotonic_s"], values)


def merged(found: Sequence[Point], least_s: float) -> Iterator[Point]:
    """Neighbouring points of a host's total put together until they last `least_s`; a shorter rest is left out."""
    held: Point | None = None
    for point in found:
        if held is None or held.end_s != point.start_s:
            held = point
        else:
            grown = {key: value + point.values.get(key, 0.0) for key, value in held.values.items()}
            held = Point(held.start_s, point.end_s, held.seconds + point.seconds, grown)
        if held.seconds >= least_s:
            yield held
            held = None


def values_of(sample: Mapping[str, Any], name: str) -> dict[int, float] | None:
    """What a sample says of a counter, by key, without unknown values; None if it was not asked for."""
    place = COUNTERS[name].place
    row = sample.get("host" if place == "core" else place, {}).get(name)
    if row is None:
        return None
    if place == "host":
        return {0: row}
    keys = sample["process"]["pids"] if place == "process" else range(len(row))
    return {key: value for key, value in zip(keys, row, strict=True) if value is not None}


def rank_gpus(telemetry: Telemetry, records: Sequence[Record]) -> list[int]:
    """Indices of the GPUs that ranks ran on; all that were sampled if no launch names one of them."""
    used = {uuid for record in of_kind(records, "launch") for uuid in record.get("device_uuids") or [] if uuid}
    rows = telemetry.sessions[-1].start["gpus"] if telemetry.sessions else []
    return [row["index"] for row in rows if row["uuid"] in used] or [row["index"] for row in rows]


def rank_pids(records: Sequence[Record], host: int = 0) -> dict[int, int]:
    """The rank of each process id that a launch names on a host."""
    found: dict[int, int] = {}
    for record in of_kind(records, "launch"):
        pids = record.get("pids") or []
        hosts = record.get("hosts") or [0] * len(pids)
        found |= {pid: rank for rank, (pid, at) in enumerate(zip(pids, hosts, strict=True)) if at == host}
    return found


def ranks_of_hosts(records: Sequence[Record]) -> dict[int, int]:
    """How many ranks each host had, rank 0's first, by the newest launch; empty without a launch."""
    hosts = [record.get("hosts") or [0] * record["ranks"] for record in of_kind(records, "launch")]
    return {host: hosts[-1].count(host) for host in sorted(set(hosts[-1]))} if hosts else {}
