"""A trace of one pass on all ranks in the Trace Event Format, which ui.perfetto.dev and chrome://tracing open.

Format: Trace Event Format, Google 2016: complete events (ph X) with `ts` and `dur` in microseconds, names of processes
and threads as metadata (ph M). Ranks are processes; the streams of a GPU, or what a CPU's rank does, are threads.
"""

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_EVENTS = 120_000
"""Of a file: about 20 bytes each when compressed."""
STEP = "step"
"""Name and track of the bar that spans a whole pass on a GPU, from where its account begins."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of the picture, in nanoseconds from the barrier before the pass."""

    track: str
    name: str
    start: int
    end: int
    category: str
    args: Mapping[str, Any]

    def to_json(self) -> list[Any]:
        """As ranks tell each other."""
        return [self.track, self.name, self.start, self.end, self.category, self.args]


def first_bars(bars: Sequence[Bar], most: int) -> tuple[list[Bar], str | None]:
    """At most so many of them, the earliest; and what was left out, if anything was."""
    if len(bars) <= most:
        return list(bars), None
    kept = sorted(bars, key=lambda bar: bar.start)[:most]
    return kept, f"the first {most} of {len(bars)} events of a rank"


def document(ranks: Sequence[tuple[str, Sequence[Bar]]], about: Mapping[str, Any]) -> dict[str, Any]:
    """The whole trace: of each rank its name and its bars. `about` goes into it as metadata."""
    events: list[dict[str, Any]] = []
    for rank, (name, bars) in enumerate(ranks):
        events.append(_metadata("process_name", rank, 0, name=name))
        events.append(_metadata("process_sort_index", rank, 0, sort_index=rank))
        for tid, (track, lane) in enumerate(_lanes(bars), start=1):
            events.append(_metadata("thread_name", rank, tid, name=track))
            events.append(_metadata("thread_sort_index", rank, tid, sort_index=tid))
            events += [_event(bar, rank, tid) for bar in lane]
    return {"displayTimeUnit": "ms", "otherData": dict(about), "traceEvents": events}


def _metadata(what: str, pid: int, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}


def _event(bar: Bar, pid: int, tid: int) -> dict[str, Any]:
    event = {
        "ph": "X",
        "name": bar.name,
        "cat": bar.category,
        "pid": pid,
        "tid": tid,
        "ts": bar.start / 1e3,
        "dur": (bar.end - bar.start) / 1e3,
    }
    return event | ({"args": dict(bar.args)} if bar.args else {})


def _lanes(bars: Sequence[Bar]) -> Iterator[tuple[str, list[Bar]]]:
    """Each track's bars by start, on as many threads as it takes for them to lie side by side or inside each other."""
    for track in sorted({bar.track for bar in bars}, key=_natural):
        lanes: list[_Lane] = []
        for bar in sorted((each for each in bars if each.track == track), key=lambda each: (each.start, -each.end)):
            lane = next((lane for lane in lanes if lane.takes(bar)), None)
            if lane is None:
                lanes.append(lane := _Lane())
            lane.put(bar)
        for number, lane in enumerate(lanes, start=1):
            yield track if number == 1 else f"{track} ({number})", lane.bars


class _Lane:
    """A thread of the picture."""

    def __init__(self) -> None:
        self.bars: list[Bar] = []
        self._around: list[Bar] = []

    def takes(self, bar: Bar) -> bool:
        """Whether the bar lies beside the others or inside one; bars come by start."""
        while self._around and self._around[-1].end <= bar.start:
            self._around.pop()
        return not self._around or self._around[-1].end >= bar.end

    def put(self, bar: Bar) -> None:
        """Draw it here."""
        self.bars.append(bar)
        self._around.append(bar)


def _natural(text: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def file_name(layout: str, phase: str) -> str:
    """Of a layout's trace of a phase, inside the run folder."""
    return f"traces/{re.sub(r'[^A-Za-z0-9.]+', '-', layout)}-{phase}.json.gz"


def packed(trace: Mapping[str, Any]) -> bytes:
    """The file's bytes: the same trace gives the same bytes."""
    return gzip.compress(json.dumps(trace, allow_nan=False, separators=(",", ":")).encode(), mtime=0)
