"""What checks of isolation look at, and what they say: evidence, findings, and the form of a check. No torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from headgrid.experiment.records import Record
from headgrid.experiment.telemetry import COUNTERS, Telemetry
from headgrid.experiment.telemetry_series import (
    Point,
    Timeline,
    Window,
    points,
    rank_gpus,
    rank_pids,
    ranks_of_hosts,
    windows,
)

Severity = Literal["INFO", "SUSPECT", "INVALID"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One code at one place. A field that is None means everywhere: without a block, every block of the launch."""

    code: str
    severity: Severity
    text: str
    launch: int | None = None
    block: int | None = None
    arm: str | None = None
    phase: str | None = None


class Evidence:
    """Design, journal and telemetry of a run, and what several checks derive from them."""

    def __init__(
        self, design: Mapping[str, Any], records: Sequence[Record], telemetry: Telemetry | None, host: int = 0
    ) -> None:
        """`telemetry` is None if nothing was sampled; it and what it is laid to are of one `host`."""
        self.design, self.records, self.host = design, records, host
        self.telemetry = telemetry if telemetry is not None and telemetry.sessions else None
        self.timeline = Timeline(windows(records))
        self._points: dict[str, list[Point]] = {}

    @property
    def windows(self) -> Sequence[Window]:
        """Every timed phase of a block that counts, in the order of time."""
        return self.timeline.windows

    @cached_property
    def gpus(self) -> list[int]:
        """Indices of the ranks' GPUs among those sampled."""
        return rank_gpus(self.telemetry, self.records) if self.telemetry else []

    @cached_property
    def gpu_rows(self) -> list[Mapping[str, Any]]:
        """What the sampler said of the ranks' GPUs at its start."""
        rows = self.telemetry.sessions[-1].start["gpus"] if self.telemetry else []
        return [row for row in rows if row["index"] in self.gpus]

    @cached_property
    def pids(self) -> dict[int, int]:
        """Ranks by process id."""
        return rank_pids(self.records, self.host)

    @cached_property
    def ranks(self) -> int:
        """How many of the run's ranks this host has."""
        return ranks_of_hosts(self.records).get(self.host) or self.design["ranks"]

    @cached_property
    def cores(self) -> list[int]:
        """Cores that this run may use."""
        return self.telemetry.sessions[-1].start["host"]["cores"] if self.telemetry else []

    @property
    def first_start_s(self) -> float:
        """When the first ranks were started; -inf if no launch says it."""
        return min((r["started_s"] for r in self.records if r.get("started_s") is not None), default=float("-inf"))

    def points(self, name: str) -> list[Point]:
        """A counter's points; of the ranks' GPUs only. None where nothing was sampled."""
        if self.telemetry is None:
            return []
        if name not in self._points:
            found = points(self.telemetry, name)
            if COUNTERS[name].place == "gpu":
                found = [
                    Point(p.start_s, p.end_s, p.seconds, {key: p.values[key] for key in self.gpus if key in p.values})
                    for p in found
                ]
            self._points[name] = found
        return self._points[name]

    def during(self, code: str, severity: Severity, start_s: float, end_s: float, text: str) -> Iterator[Finding]:
        """A finding for each timed phase that shares a moment with this time."""
        for w in self.timeline.touched(start_s, end_s):
            yield Finding(code, severity, text, w.launch, w.block, w.arm, w.phase)

    def at(self, point: Point, code: str, severity: Severity, text: str) -> Iterator[Finding]:
        """The same for the time of a point."""
        return self.during(code, severity, point.start_s, point.end_s, text)

    def why_unchecked(self, check: "Check") -> str | None:
        """Why a check cannot be made on this run, or None if it can."""
        if check.device is not None and check.device != self.design["device"]:
            return f"this run has no device of the kind {check.device}"
        if not check.telemetry:
            return None
        if self.telemetry is None:
            return "no telemetry was sampled"
        if not self.windows:
            return "the journal's blocks have no start times"
        if check.device == "cuda" and not self.gpu_rows:
            return "no GPU could be sampled"
        missing = self.telemetry.sessions[-1].missing
        lacking = [f"{name}: {missing[name]}" for name in check.counters if name in missing]
        return "; ".join(lacking) or (check.unless(self) if check.unless else None)


@dataclass(frozen=True, slots=True, eq=False)
class Check:
    """One or more codes that one function finds.

    `counters` are those without which it cannot look, or other names that the sampler gives as missing; `telemetry`:
    whether it needs samples at all; `device`: the only kind of run that it concerns; `unless` says why it does not
    apply to some evidence. It is made of runs whose declared analysis is from `since` to `until`.
    """

    codes: Mapping[str, str]
    find: Callable[[Evidence], Iterator[Finding]]
    counters: tuple[str, ...] = ()
    telemetry: bool = True
    device: str | None = None
    unless: Callable[[Evidence], str | None] | None = None
    since: int = 1
    until: int | None = None

    def concerns(self, analysis: int) -> bool:
        """Whether a run of this analysis is checked for it."""
        return self.since <= analysis and (self.until is None or analysis <= self.until)


def block_means(evidence: Evidence, name: str) -> dict[tuple[Window, int], float]:
    """Mean of a counter in each timed phase, device by device; from samples that lie wholly inside."""
    found: dict[tuple[Window, int], list[float]] = {}
    for point in evidence.points(name):
        window = evidence.timeline.around(point)
        if window is not None:
            for key, value in point.values.items():
                found.setdefault((window, key), []).append(value)
    return {where: sum(values) / len(values) for where, values in found.items()}
