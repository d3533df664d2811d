"""Codes that the journal alone gives: ranks that lag, drift, dependence between blocks, a cold start."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean, median

from headgrid.experiment.design import analysis_of
from headgrid.experiment.isolation_evidence import Check, Evidence, Finding
from headgrid.experiment.records import BlockKey, Phase, block_times, by_launch, is_verified, latest_attempts, of_kind
from headgrid.experiment.telemetry_series import PHASES
from headgrid.layout.layout import parse_layout

RANK_SKEW = 1.1
"""Slowest over median rank; research on clusters calls a rank beyond 1.1 a straggler."""
DRIFT_Z, DRIFT_BLOCKS = 3.0, 8
"""Mann-Kendall's z for a trend (two-sided p = 0.3 %), from as many blocks as its normal approximation needs."""
AUTOCORRELATION_Z, AUTOCORRELATION_BLOCKS = 3.0, 10
"""Lag-1 autocorrelation in units of its SD 1/sqrt(n) for independent blocks (Bartlett)."""
SLOW_FIRST, SLOW_FIRST_BLOCKS = 0.05, 4
"""First timed block over the median of the others, geometric mean over arms: the warm-up was too short."""


def _rank_skew(evidence: Evidence) -> Iterator[Finding]:
    """A block whose slowest rank lags more than it usually does in that arm.

    Stages of a pipeline and uneven shares end at different times by design, hence against the arm's own median; on GPUs
    ranks of arms without stages are compared outright, too.
    """
    for arm in evidence.design["arms"]:
        label, staged = arm["label"], parse_layout(arm["layout"]).pp > 1
        for phase in PHASES:
            skews = _skews(evidence, label, phase)
            usual = median(skews.values()) if skews else 1.0
            outright = evidence.design["device"] == "cuda" and not staged
            for key, skew in skews.items():
                if skew > RANK_SKEW * (1.0 if outright else usual):
                    text = f"the slowest rank took {skew:.2f} times the median rank's time, usually {usual:.2f}"
                    yield Finding("RANK_SKEW", "SUSPECT", text, key.launch, key.block, label, phase)


def _skews(evidence: Evidence, arm: str, phase: Phase) -> dict[BlockKey, float]:
    blocks = [r for r in of_kind(latest_attempts(evidence.records), "block", arm) if not r.get("warmup")]
    times = {BlockKey(r["launch"], r["block"]): r.get(f"{phase}_s") or [] for r in blocks}
    known = {key: row for key, row in times.items() if row and None not in row and min(row) > 0}
    return {key: max(row) / median(row) for key, row in known.items()}


def mann_kendall(values: Sequence[float]) -> float:
    """z of the Mann-Kendall test for a trend, continuity-corrected; 0 without a trend (Mann 1945, Kendall 1975)."""
    n = len(values)
    s = sum((values[j] > values[i]) - (values[j] < values[i]) for i in range(n) for j in range(i + 1, n))
    return (s - math.copysign(1, s)) / math.sqrt(n * (n - 1) * (2 * n + 5) / 18) if s else 0.0


def autocorrelation(values: Sequence[float]) -> float:
    """Lag-1 autocorrelation; 0 where there is no spread."""
    mean = fmean(values)
    spread = sum((value - mean) ** 2 for value in values)
    pairs = pairwise(values)
    return sum((a - mean) * (b - mean) for a, b in pairs) / spread if spread else 0.0


MAX_TREND_BLOCKS = 200


def _drift(evidence: Evidence) -> Iterator[Finding]:
    """An arm's time that grows or shrinks over a launch. If all arms share it, ratios within blocks stay right."""
    for label, phase, times in _verified_times(evidence):
        for launch, series in by_launch(times).items():
            # the test is quadratic; of long launches every so many blocks are as good
            thinned = series[:: max(1, math.ceil(len(series) / MAX_TREND_BLOCKS))]
            if len(thinned) < DRIFT_BLOCKS or abs(z := mann_kendall(thinned)) < DRIFT_Z:
                continue
            third = len(series) // 3
            change = median(series[-third:]) / median(series[:third]) - 1
            if abs(change) > evidence.design["margin"]:
                text = f"{phase} times changed by {change:+.1%} from the first to the last third of the blocks"
                yield Finding("DRIFT", "SUSPECT", f"{text} (Mann-Kendall z {z:.1f})", launch, arm=label, phase=phase)


def _autocorrelated(evidence: Evidence) -> Iterator[Finding]:
    """Blocks that resemble their predecessors beyond what all arms share. Intervals over blocks are too narrow then, or
    (from analysis 2 on) as wide as that makes them.
    """
    effect = "intervals are too narrow" if analysis_of(evidence.design) == 1 else "intervals over blocks allow for it"
    shared: dict[tuple[str, BlockKey], list[float]] = {}
    every = list(_verified_times(evidence))
    for _, phase, times in every:
        for key, seconds in times.items():
            shared.setdefault((phase, key), []).append(math.log(seconds))
    for label, phase, times in every:
        own = {key: math.log(seconds) - fmean(shared[phase, key]) for key, seconds in times.items()}
        for launch, series in by_launch(own).items():
            if len(series) < AUTOCORRELATION_BLOCKS:
                continue
            r = autocorrelation(series)
            if r > AUTOCORRELATION_Z / math.sqrt(len(series)):
                text = f"{phase} blocks resemble the one before (lag-1 autocorrelation {r:.2f}): {effect}"
                yield Finding("AUTOCORRELATED", "SUSPECT", text, launch, arm=label, phase=phase)


def _slow_first_block(evidence: Evidence) -> Iterator[Finding]:
    """Of runs from before `steady`, which says it of any number of blocks."""
    found: dict[tuple[str, int], list[float]] = {}
    first: dict[int, int] = {}
    for _, phase, times in _verified_times(evidence):
        for launch in {key.launch for key in times}:
            mine = sorted(key for key in times if key.launch == launch)
            if len(mine) >= SLOW_FIRST_BLOCKS:
                first[launch] = min(first.get(launch, mine[0].block), mine[0].block)
                rest = median(times[key] for key in mine[1:])
                found.setdefault((phase, launch), []).append(math.log(times[mine[0]] / rest))
    for (phase, launch), logs in found.items():
        if (excess := math.expm1(fmean(logs))) > SLOW_FIRST:
            text = f"in {phase}, the first block took {excess:.0%} longer than the others: the warm-up was too short"
            yield Finding("SLOW_FIRST_BLOCK", "SUSPECT", text, launch, first[launch], phase=phase)


def _verified_times(evidence: Evidence) -> Iterator[tuple[str, Phase, dict[BlockKey, float]]]:
    for arm in evidence.design["arms"]:
        if is_verified(evidence.records, arm["label"]):
            for phase in PHASES:
                yield arm["label"], phase, block_times(evidence.records, arm["label"], phase)


CHECKS = (
    Check({"RANK_SKEW": "one rank was much slower than the others"}, _rank_skew, telemetry=False),
    Check({"DRIFT": "times drifted over the blocks"}, _drift, telemetry=False),
    Check({"AUTOCORRELATED": "blocks were not independent"}, _autocorrelated, telemetry=False),
    Check({"SLOW_FIRST_BLOCK": "the first timed block was slow"}, _slow_first_block, telemetry=False, until=1),
)
