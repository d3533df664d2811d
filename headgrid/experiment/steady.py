"""When did a launch become steady, and did it stay so?

One series for each launch and phase: the log time of each arm in each block, less the median of the arm's timed blocks,
in the order in which they ran, warm-up among them. Arms take turns at random, so what is left is the machine's, and a
handful of blocks makes several times as many turns. White's MSER (K. P. White, "An effective truncation heuristic for
bias reduction in simulation output", 1997) says where to cut the beginning: where the squared standard error of the
rest is least, in the first half. A cut that changes little is none: it counts if the median of the turns before it
differs from that of the rest by more than the margin and by 3 standard errors (medians, because the machine's share is
what all arms have; one arm's own is DRIFT). The rest is steady unless it has a trend (Mann-Kendall beyond 3, which is p
= 0.3 %) that moves its last third from its first by more than the margin. "No steady state" is a result.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median, pvariance, variance
from typing import Any

from headgrid.experiment.isolation_run import DRIFT_Z, MAX_TREND_BLOCKS, mann_kendall
from headgrid.experiment.records import Phase, Record, is_verified, latest_attempts, of_kind, slowest_s
from headgrid.experiment.telemetry_series import PHASES

LEAST_TURNS = 8
CUT_Z = 3.0

Turns = Sequence[tuple[int, float]]
"""Block and log time of each arm in each block, in the order of time."""


def steady_states(design: Mapping[str, Any], records: Sequence[Record]) -> list[dict[str, Any]]:
    """`steady` of summary.json: for each launch, attempt and phase `from_block`, the first steady block (None: there is
    no steady state), `warmup_blocks` as declared, `change` and `trend`, which are shares, and how many `turns`.

    Blocks are counted from the first of the launch. Of fewer than LEAST_TURNS turns nothing is said.
    """
    verified = {arm["label"] for arm in design["arms"] if is_verified(records, arm["label"])}
    kept = [r for r in of_kind(latest_attempts(records), "block") if r["arm"] in verified]
    found = []
    for launch, attempt in dict.fromkeys((r["launch"], r.get("attempt", 0)) for r in kept):
        mine = [r for r in kept if (r["launch"], r.get("attempt", 0)) == (launch, attempt)]
        for phase in PHASES:
            turns = _turns(mine, phase)
            if len(turns) >= LEAST_TURNS:
                place = {"launch": launch, "attempt": attempt, "phase": phase}
                told = steady_state(turns, design["margin"])
                found.append(place | told | {"warmup_blocks": design["warmup_blocks"]})
    return found


def _turns(blocks: Sequence[Record], phase: Phase) -> Turns:
    times = [
        (r["block"], r["arm"], bool(r.get("warmup")), math.log(seconds))
        for r in blocks
        if (seconds := slowest_s(r, phase)) is not None
    ]
    timed: dict[str, list[float]] = {}
    for _, arm, warmup, value in times:
        if not warmup:
            timed.setdefault(arm, []).append(value)
    usual = {arm: median(values) for arm, values in timed.items()}
    return [(block, value - usual[arm]) for block, arm, _, value in times if arm in usual]


def steady_state(turns: Turns, margin: float) -> dict[str, Any]:
    """Where the series becomes steady, by how much the turns before differ, and the trend that is left behind it."""
    blocks = list(dict.fromkeys(block for block, _ in turns))
    start = min(blocks[: len(blocks) // 2 + 1], key=lambda block: _mser(turns, block))
    before = [value for block, value in turns if block < start]
    rest = [value for block, value in turns if block >= start]
    change = median(before) - median(rest) if before else 0.0
    error = math.sqrt(variance(rest) * (1 / len(before) + 1 / len(rest))) if before else 0.0
    if abs(change) <= max(math.log1p(margin), CUT_Z * error):
        start, change, rest = blocks[0], 0.0, [value for _, value in turns]
    thinned = rest[:: max(1, math.ceil(len(rest) / MAX_TREND_BLOCKS))]
    third = len(rest) // 3
    trend = median(rest[-third:]) - median(rest[:third])
    moving = abs(mann_kendall(thinned)) >= DRIFT_Z and abs(trend) > math.log1p(margin)
    return {
        "from_block": None if moving else start,
        "change": math.expm1(change),
        "trend": math.expm1(trend),
        "turns": len(turns),
    }


def _mser(turns: Turns, start: int) -> float:
    rest = [value for block, value in turns if block >= start]
    return pvariance(rest) / len(rest)
