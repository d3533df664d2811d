"""Samples of the hosts beside rank 0's, in rank 0's time.

`telemetry-1.jsonl` is of host 1 (numbers as in launch records), line by line as its sampler wrote it, by its own clock.
Among the lines are `clock` records: at that time the clock was ahead of rank 0's by `offset_s`, within `error_s` either
way. Such a bound needs no symmetry of the network: this host asked before rank 0 read its clock, and had the answer
after that (F. Cristian, Probabilistic clock synchronization, 1989). Between two records the offset is interpolated.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
_NAME = re.compile(r"telemetry-([1-9]\d*)\.jsonl")


def file_of(host: int) -> str:
    """The name of the file with the samples of a host other than rank 0's."""
    return f"telemetry-{host}.jsonl"


def files(folder: Path) -> dict[int, Path]:
    """Those that a run folder has, by host."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("telemetry-*.jsonl"))
    return dict(sorted((int(name[1]), path) for name, path in found if name))


def clocks_of(records: Sequence[Row]) -> list[Row]:
    """The clock records, in the order of time."""
    return sorted((r for r in records if r["kind"] == "clock"), key=lambda record: record["time_s"])


def in_rank_0_time(records: Sequence[Row]) -> list[Row]:
    """All records but the clock's, with `time_s` by rank 0's clock; none of a session in which no clock was compared.

    A run that was resumed has several sessions, perhaps of different machines, each with clocks of its own.
    """
    starts = [place for place, record in enumerate(records) if record["kind"] == "start"]
    found: list[Row] = []
    for first, last in pairwise([0, *starts[1:], len(records)]):
        session = records[first:last]
        if clocks := clocks_of(session):
            rows = (record for record in session if record["kind"] != "clock")
            found += [{**row, "time_s": row["time_s"] - offset_s(clocks, row["time_s"])} for row in rows]
    return found


def offset_s(clocks: Sequence[Row], time_s: float) -> float:
    """By how much a clock is ahead when it shows `time_s`. `clocks`: at least one, in the order of time."""
    after = bisect_right([clock["time_s"] for clock in clocks], time_s)
    if after in (0, len(clocks)):
        return clocks[min(after, len(clocks) - 1)]["offset_s"]
    first, second = clocks[after - 1], clocks[after]
    share = (time_s - first["time_s"]) / (second["time_s"] - first["time_s"])
    return first["offset_s"] + share * (second["offset_s"] - first["offset_s"])
