"""What a run's records support: throughputs, intervals, verdicts, and the warnings that belong beside them.

Sources: Kalibera and Jones, "Rigorous benchmarking in reasonable time" (ISMM 2013), for replicating at the level at
which the noise enters (here the launch: a fresh process group), with blocks below it; `confidence` for the intervals.
Arms are compared inside a block, where they ran shortly after one another, so drift of the machine cancels. A run is
analysed as its design declares: `analysis` 1, that of older runs, takes the blocks of a launch for independent.

No torch in here. Times are in seconds, sizes in bytes, unknown values are None. The records are those of
docs/run-folder.md; a block's time is the slowest rank's; warm-up blocks never enter a figure.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from statistics import fmean, stdev
from typing import Any, NamedTuple

from headgrid.experiment import cautions
from headgrid.experiment.accuracy import with_fp8
from headgrid.experiment.confidence import confidence_of
from headgrid.experiment.design import ANALYSIS, analysis_of
from headgrid.experiment.multiplicity import family, judged_jointly, p_claim
from headgrid.experiment.records import (
    MIN_LAUNCHES,
    BlockKey,
    Phase,
    Record,
    Times,
    block_times,
    by_launch,
    is_complete,
    is_verified,
    last_of,
    of_kind,
)
from headgrid.experiment.resolution import resolved
from headgrid.experiment.sentinel_bands import sentinel_bands
from headgrid.experiment.steady import steady_states
from headgrid.experiment.tails import tails

PHASES: tuple[Phase, ...] = ("prefill", "decode")

UNIT_LAUNCH = "launch"
UNIT_BLOCK = "block within this launch"
UNIT_BLOCKS = "block within these launches"
SEED_LABEL = (
    "as the seed computes them: paired t-test over iterations (here blocks) and Cohen's d with the two arms' pooled SD;"
    " blocks of one launch are not independent, so do not trust these"
)
MEMORY_PARTS = ("parameters", "kv_cache", "activations_peak", "communication_buffer")


class Estimate(NamedTuple):
    """Mean of n units, their SD, and the 95 % interval of the mean; None where the units do not suffice."""

    mean: float
    sd: float | None
    ci95: tuple[float, float] | None
    n: int
    unit: str


# --- estimates -------------------------------------------------------------------------------------------------------


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of independent `values`: mean -+ t(n-1, 0.975) * SD / sqrt(n); None for n < 2."""
    if len(values) < 2:
        return None
    from scipy.special import stdtrit  # scipy.stats would take a second to import

    half = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def estimate(values: Mapping[BlockKey, float], analysis: int = ANALYSIS) -> Estimate | None:
    """Mean and interval over launch means from MIN_LAUNCHES launches on, else over blocks, which `unit` then says.

    None if there are no values.
    """
    launches = by_launch(values)
    if not launches:
        return None
    if len(launches) >= MIN_LAUNCHES:
        units, unit = [fmean(group) for group in launches.values()], UNIT_LAUNCH
    else:
        units, unit = list(values.values()), UNIT_BLOCK if len(launches) == 1 else UNIT_BLOCKS
    sd = stdev(units) if len(units) > 1 else None
    if analysis == 1:
        return Estimate(fmean(units), sd, t_interval(units), len(units), unit)
    confidence, mean = confidence_of(values), fmean(units)
    return Estimate(mean, sd, confidence and _around(mean, confidence.ci95), len(units), unit)


def _around(mean: float, ci95: tuple[float, float]) -> tuple[float, float]:
    """The interval, which a mean that weights blocks otherwise might leave by a hair."""
    return min(ci95[0], mean), max(ci95[1], mean)


def log_ratios(a: Times, b: Times) -> dict[BlockKey, float]:
    """log(throughput of a / throughput of b) = log(time of b / time of a) in each block that has both."""
    return {key: math.log(b[key] / a[key]) for key in sorted(a.keys() & b.keys())}


def throughput_ratio(a: Times, b: Times, analysis: int = ANALYSIS) -> Estimate | None:
    """Throughput of a over throughput of b with its interval: above 1 means that a is faster, in either phase.

    Geometric: mean and interval are those of the log ratios, taken back by exp; `sd` is the SD of the log ratios.
    """
    logs = estimate(log_ratios(a, b), analysis)
    if logs is None:
        return None
    interval = logs.ci95 and (math.exp(logs.ci95[0]), math.exp(logs.ci95[1]))
    return logs._replace(mean=math.exp(logs.mean), ci95=interval)


def verdict(ci95: Sequence[float] | None, margin: float) -> str:
    """What the interval of a throughput ratio says against the declared margin.

    Margins are symmetric in the logarithm, [1/(1+margin), 1+margin], so that swapping the arms swaps the verdict.
    """
    if ci95 is None:
        return "inconclusive"
    low, high = 1 / (1 + margin), 1 + margin
    if ci95[0] > high:
        return "faster"
    if ci95[1] < low:
        return "slower"
    return "equivalent" if low <= ci95[0] and ci95[1] <= high else "inconclusive"


def seed_statistics(a: Times, b: Times) -> dict[str, Any]:
    """The p-value and effect size of the seed experiment, kept for comparison with it only.

    Paired two-sided t-test over the blocks' throughputs (1/s), and Cohen's d = difference of the means over the
    pooled SD sqrt((SDa^2 + SDb^2) / 2). Both divide by the noise: a quieter machine makes any difference "large".
    """
    keys = sorted(a.keys() & b.keys())
    rates_a, rates_b = [1 / a[key] for key in keys], [1 / b[key] for key in keys]
    result: dict[str, Any] = {"p_value": None, "cohens_d": None, "label": SEED_LABEL}
    if len(keys) < 2:
        return result
    difference = [x - y for x, y in zip(rates_a, rates_b, strict=True)]
    if spread := stdev(difference):
        from scipy.special import stdtr

        t = fmean(difference) / (spread / math.sqrt(len(keys)))
        result["p_value"] = 2 * float(stdtr(len(keys) - 1, -abs(t)))
    if pooled := math.sqrt((stdev(rates_a) ** 2 + stdev(rates_b) ** 2) / 2):
        result["cohens_d"] = fmean(difference) / pooled
    return result


# --- one arm ---------------------------------------------------------------------------------------------------------


def _figure(
    values: Mapping[BlockKey, float], convert: Callable[[float], float], analysis: int
) -> dict[str, Any] | None:
    """Estimate of `convert(seconds)`; a launch's value is that of its mean time, so that TPS x TPOT = batch holds.

    Over blocks, the interval is that of the logarithm: wide as it may be, no rate in it is negative.
    """
    launches = by_launch(values)
    if len(launches) >= MIN_LAUNCHES:
        units = {BlockKey(launch, 0): convert(fmean(group)) for launch, group in launches.items()}
    else:
        units = {key: convert(seconds) for key, seconds in values.items()}
    figure = estimate(units, analysis)
    if figure and figure.ci95 and analysis > 1 and len(launches) < MIN_LAUNCHES:
        logs = estimate({key: math.log(value) for key, value in units.items()})
        low, high = logs.ci95 if logs and logs.ci95 else figure.ci95
        figure = figure._replace(ci95=_around(figure.mean, (math.exp(low), math.exp(high))))
    return figure and {**figure._asdict(), "ci95": figure.ci95 and list(figure.ci95)}


def _timing(design: Mapping[str, Any], prefill: Times, decode: Times) -> dict[str, Any]:
    workload, analysis = design["workload"], analysis_of(design)
    tokens, batch, steps = workload["batch"] * workload["seq"], workload["batch"], workload["decode_steps"]
    return {
        "prefill_tokens_per_s": _figure(prefill, lambda seconds: tokens / seconds, analysis),
        "decode_tpot_s": _figure(decode, lambda seconds: seconds / steps, analysis),
        "decode_tokens_per_s": _figure(decode, lambda seconds: batch * steps / seconds, analysis),
    }


def _memory(ranks: Sequence[Mapping[str, Any]] | None) -> dict[str, int | None] | None:
    """Bytes of each part on the rank that has most of it; `total` is the largest sum of one rank, in which activations
    have communication buffers among them.
    """
    if not ranks:
        return None
    rows: list[list[Any]] = [[rank.get(f"{part}_bytes") for part in MEMORY_PARTS] for rank in ranks]
    counted = [part != "communication_buffer" for part in MEMORY_PARTS]
    rows = [[*row, None if None in row else sum(compress(row, counted))] for row in rows]
    columns = zip((*MEMORY_PARTS, "total"), zip(*rows, strict=True), strict=True)
    return {part: _known(max, column) for part, column in columns}


def _known(choose: Callable[[list[Any]], Any], values: Iterable[Any]) -> Any:
    """The chosen one of the values (max, min), or None if any of them is unknown."""
    listed = list(values)
    return None if None in listed else choose(listed)


def _memory_of(records: Sequence[Record], arm: str) -> dict[str, Any]:
    every = list(of_kind(records, "memory", arm))
    last = every[-1] if every else None
    return {
        "memory_bytes": _memory([rank for record in every for rank in record["per_rank"]]),
        "memory_predicted_bytes": _memory(last["predicted"] if last else None),
        "memory_measured_by": last["measured_by"] if last else None,
    }


def _traffic(records: Sequence[Record], arm: str, timed: bool) -> list[dict[str, Any]]:
    """The rows of the last traffic record of each phase, without their times where the arm may not show any."""
    last = {record["phase"]: record for record in of_kind(records, "traffic", arm)}
    return [
        {"phase": phase, **op, "time_s": op["time_s"] if timed else None, "as_predicted": last[phase]["as_predicted"]}
        for phase in PHASES
        if phase in last
        for op in last[phase]["ops"]
    ]


def relative_error(records: Iterable[Record], arm: str) -> float | None:
    """The largest relative L2 error of the arm over all phases and launches; None if any of them is unknown."""
    errors = [
        phase["relative_error"] for record in of_kind(records, "verify", arm) for phase in record["phases"].values()
    ]
    return _known(max, errors) if errors else None


def _arm(design: Mapping[str, Any], records: Sequence[Record], arm: Mapping[str, str]) -> dict[str, Any]:
    label = arm["label"]
    verified = is_verified(records, label)
    check = last_of(of_kind(records, "verify", label))
    times = {phase: block_times(records, label, phase) if verified else {} for phase in PHASES}
    return {
        **{key: arm[key] for key in ("label", "layout", "role")},
        "verified": verified,
        "relative_error": relative_error(records, label),
        "verify": check and {key: value for key, value in check.items() if key not in ("kind", "arm", "time_s")},
        **_timing(design, times["prefill"], times["decode"]),
        **_memory_of(records, label),
        "traffic": _traffic(records, label, verified),
    }


# --- arms against each other -----------------------------------------------------------------------------------------


def is_grid(layout: str) -> bool:
    """Whether the layout cuts heads into m > 1 channel slices (n4m4:batch; m = 1 is tensor parallelism)."""
    match = re.search(r"m(\d+)", layout.partition(":")[0])
    return match is not None and int(match.group(1)) > 1


def pairs(arms: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Which arms are compared: every one with the baseline, and every n x m one with every other arm but A/A.

    The arm with the planted slow-down is no contestant: `resolution` has it.
    """
    baseline = next(arm["label"] for arm in arms if arm["role"] == "baseline")
    chosen = [(arm["label"], baseline) for arm in arms if arm["role"] in ("aa", "arm")]
    plain = [arm for arm in arms if arm["role"] in ("baseline", "arm")]
    for a in (arm["label"] for arm in plain if is_grid(arm["layout"])):
        for b in (arm["label"] for arm in plain):
            if a != b and (a, b) not in chosen and (b, a) not in chosen:
                chosen.append((a, b))
    return chosen


def _comparison(a: str, b: str, phase: Phase, times_a: Times, times_b: Times, design: Mapping[str, Any]) -> Record:
    ratio, margin = throughput_ratio(times_a, times_b, analysis_of(design)), design["margin"]
    return {
        "a": a,
        "b": b,
        "phase": phase,
        "ratio": ratio and ratio.mean,
        "ci95": ratio and ratio.ci95 and list(ratio.ci95),
        "verdict": verdict(ratio and ratio.ci95, margin),
        "unit": ratio and ratio.unit,
        "n": ratio.n if ratio else 0,
        "seed_statistics": seed_statistics(times_a, times_b),
    }


def _comparisons(design: Mapping[str, Any], records: Sequence[Record]) -> list[dict[str, Any]]:
    verified = {arm["label"] for arm in design["arms"] if is_verified(records, arm["label"])}
    rows, claims = [], []
    for phase in PHASES:
        times = {label: block_times(records, label, phase) for label in verified}
        for a, b in pairs(design["arms"]):
            both = (times[a], times[b]) if {a, b} <= verified else ({}, {})
            confidence = confidence_of(log_ratios(*both)) if analysis_of(design) > 1 else None
            claims.append(confidence and p_claim(confidence, design["margin"]))
            rows.append({**_comparison(a, b, phase, *both, design), "family": family((a, b), design["arms"])})
    if analysis_of(design) == 1:
        return [{key: value for key, value in row.items() if key != "family"} for row in rows]
    return judged_jointly(rows, claims)


def _reproducibility(records: Sequence[Record], arm: str) -> dict[str, Any]:
    """SD / mean of the launches' mean times, per phase; None with fewer than two launches or an unverified arm."""
    row: dict[str, Any] = {"label": arm, "launches": 0, "prefill": None, "decode": None}
    if not is_verified(records, arm):
        return row
    for phase in PHASES:
        means = [fmean(group) for group in by_launch(block_times(records, arm, phase)).values()]
        row["launches"] = max(row["launches"], len(means))
        row[phase] = stdev(means) / fmean(means) if len(means) > 1 else None
    return row


def _resolution(design: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any] | None:
    """What the planted slow-down and the A/A pair say of this run; None where none was planted."""
    labels = {arm["role"]: arm["label"] for arm in design["arms"] if arm["role"] != "arm"}
    if "planted" not in labels:
        return None
    rows = []
    for phase in PHASES:
        times = {role: block_times(records, label, phase) for role, label in labels.items()}
        usable = is_verified(records, labels["baseline"])  # they share its engine
        found, null = (
            throughput_ratio(times.get(role, {}), times["baseline"]) if usable else None for role in ("planted", "aa")
        )
        rows.append(resolved(design["planted"], phase, found, null))
    return {"planted": design["planted"], "label": labels["planted"], "phases": rows}


def _protocol(design: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """What the run says of itself as a measurement; nothing for runs that did not declare it."""
    if analysis_of(design) == 1:
        return {}
    return {
        "resolution": _resolution(design, records),
        "steady": steady_states(design, records),
        "sentinels": sentinel_bands(records),
        "tails": tails(design, records),
    }


def _control(records: Sequence[Record]) -> dict[str, Any] | None:
    """The negative control at its weakest: it has to be rejected in every launch, and move the logits in every one."""
    controls = list(of_kind(records, "control"))
    if not controls:
        return None
    return {
        "layout": controls[-1]["layout"],
        "rejected": all(record["rejected"] is True for record in controls),
        "relative_error": _known(min, (record["relative_error"] for record in controls)),
        "sensitivity": _known(min, (record["sensitivity"] for record in controls)),
    }


# --- everything ------------------------------------------------------------------------------------------------------


def summarise(design: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """summary.json: what `records` say about `design`. A pure function, so a summary can always be made again.

    `ratio` in a comparison is the throughput of a over that of b: above 1 means that a is faster, in both phases.
    Arms that are not verified have no times. `run` is for the caller, who knows the folder.
    """
    control = _control(records)
    summary: dict[str, Any] = {
        "schema": 1,
        "run": None,
        "device": design["device"],
        "arms": with_fp8([_arm(design, records, arm) for arm in design["arms"]]),
        "comparisons": _comparisons(design, records),
        "negative_control_rejected": control and control["rejected"],
        "control": control,
        "reproducibility": [_reproducibility(records, arm["label"]) for arm in design["arms"]],
        "complete": is_complete(design, records),
        **_protocol(design, records),
    }
    summary["warnings"] = cautions.warnings(design, records, summary)
    return summary
