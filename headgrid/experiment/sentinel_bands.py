"""Sentinels of a run: fixed pieces of work between the arms of a block, and the band in which the machine does them.

Before each arm's turns in a block, behind the last one's, and between the pilot's turns, every rank times the same
matrix product, all ranks the same all-reduce, and every host thread the same loop (`sentinel`). No arm's work is in
them, so a reading that is out of the run's own band says that the machine was another one there. No torch in here.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from headgrid.experiment.records import Record, latest_attempts

KINDS = ("gemm_s", "all_reduce_s", "host_s")
BAND_MADS = 5.0
"""Half the band in SDs, the SD taken from the median absolute deviation (x 1.4826), which a few disturbed readings do
not widen. Of Gaussian noise 6 readings in ten million are beyond it; what is has longer tails, and is worth a look."""
LEAST_BAND = 0.03
"""Half the band at least, as a share: on a quiet machine a few microseconds would be many SDs."""
LEAST_READINGS = 8
_SD_OF_MAD = 1.4826


class Reading(NamedTuple):
    """Seconds of each sentinel, the slowest rank's, and the blocks just before and after it, None at either end."""

    seconds: Mapping[str, float]
    before: Record | None
    after: Record | None


class Band(NamedTuple):
    """Median of a sentinel's seconds, and the edges of its band; how many readings they come from."""

    median_s: float
    low_s: float
    high_s: float
    readings: int


def readings(records: Sequence[Record]) -> Iterator[Reading]:
    """All of a journal, in order, those of blocks that were done again left out.

    Where a block was run again on the sentinels' word, the reading before its first try still tells of the turn ahead
    of that. The re-run begins with a reading of its own, behind which no other turn lies.
    """
    before: Record | None = None
    kept = {id(record) for record in latest_attempts(records)}
    for record in records:
        if record["kind"] in ("launch", "rerun"):
            before = None
        if id(record) not in kept:
            if record.get("retry") == 0 and record["sentinels"] and before is not None:
                yield Reading(_slowest(record), before, None)
                before = None
            continue
        if record["kind"] not in ("block", "end"):
            continue
        after = record if record["kind"] == "block" else None
        if record.get("sentinels"):
            yield Reading(_slowest(record), before, after)
        before = after


def _slowest(record: Record) -> dict[str, float]:
    return {kind: max(ranks) for kind, ranks in record["sentinels"].items()}


def bands(found: Sequence[Reading]) -> dict[str, Band]:
    """Each sentinel's band over the timed part of a run; without warm-up, and of too few readings none."""
    timed = [reading for reading in found if not (reading.after or {}).get("warmup")]
    if len(timed) < LEAST_READINGS:
        return {}
    return {kind: band([reading.seconds[kind] for reading in timed]) for kind in KINDS}


def band(seconds: Sequence[float], mads: float = BAND_MADS) -> Band:
    """Of readings of one sentinel. In the logarithm: times of busy machines are skewed."""
    logs = [math.log(value) for value in seconds]
    middle = median(logs)
    spread = _SD_OF_MAD * median(abs(value - middle) for value in logs)
    half = max(mads * spread, math.log1p(LEAST_BAND))
    return Band(math.exp(middle), math.exp(middle - half), math.exp(middle + half), len(logs))


def outside(found: Sequence[Reading]) -> Iterator[tuple[Reading, str, float]]:
    """Timed readings out of their band: which sentinel, and its time over the median."""
    limits = bands(found)
    for reading in found:
        if (reading.after or {}).get("warmup"):
            continue
        for kind, band in limits.items():
            if not band.low_s <= reading.seconds[kind] <= band.high_s:
                yield reading, kind, reading.seconds[kind] / band.median_s


def sentinel_bands(records: Sequence[Record]) -> list[dict[str, Any]]:
    """`sentinels` of summary.json: each one's band, and how many readings were outside."""
    found = list(readings(records))
    kinds = [kind for _, kind, _ in outside(found)]
    return [
        {"sentinel": kind.removesuffix("_s"), **band._asdict(), "outside": kinds.count(kind)}
        for kind, band in bands(found).items()
    ]
