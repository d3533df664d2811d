"""What a run's records support: throughputs, intervals, verdicts, and the warnings that belong beside them.

Sources: Kalibera and Jones, "Rigorous benchmarking in reasonable time" (ISMM 2013), for replicating at the level at
which the noise enters (here the launch: a fresh process group), with blocks below it; Student's t for the intervals.
Arms are compared inside a block, where they ran shortly after one another, so drift of the machine cancels.

No torch in here. Times are in seconds, sizes in bytes, unknown values are None. The records are those of
docs/run-folder.md; a block's time is the slowest rank's; warm-up blocks never enter a figure.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

Record = Mapping[str, Any]
Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")

MIN_LAUNCHES = 5
"""Launches from which on an interval is over launches and thus speaks about another launch, too."""
MIN_SENSITIVITY = 0.1
"""The negative control must move the logits by more, or the model cannot tell right from wrong (DESIGN.md, 7)."""

UNIT_LAUNCH = "launch"
UNIT_BLOCK = "block within this launch"
UNIT_BLOCKS = "block within these launches"
SEED_LABEL = (
    "as the seed computes them: paired t-test over iterations (here blocks) and Cohen's d with the two arms' pooled SD;"
    " blocks of one launch are not independent, so do not trust these"
)
MEMORY_PARTS = ("parameters", "kv_cache", "activations_peak", "communication_buffer")


class BlockKey(NamedTuple):
    """Arms that ran in the same block share this key."""

    launch: int
    block: int


Times = Mapping[BlockKey, float]


class Estimate(NamedTuple):
    """Mean of n units, their SD, and the 95 % t interval of the mean; None where the units do not suffice."""

    mean: float
    sd: float | None
    ci95: tuple[float, float] | None
    n: int
    unit: str


# --- records ---------------------------------------------------------------------------------------------------------


def block_times(records: Iterable[Record], arm: str, phase: Phase) -> dict[BlockKey, float]:
    """Seconds of each timed block of `arm`: the slowest rank's. Blocks without a time from every rank are left out."""
    times: dict[BlockKey, float] = {}
    for record in _of_kind(records, "block", arm):
        ranks: list[Any] = record.get(f"{phase}_s") or [None]
        usable = all(seconds is not None and math.isfinite(seconds) and seconds > 0 for seconds in ranks)
        if usable and not record.get("warmup"):
            times.setdefault(BlockKey(record["launch"], record["block"]), max(ranks))
    return times


def _of_kind(records: Iterable[Record], kind: str, arm: str | None = None) -> Iterator[Record]:
    return (record for record in records if record["kind"] == kind and (arm is None or record["arm"] == arm))


def _last(records: Iterable[Record]) -> Record | None:
    return next(iter(list(records)[-1:]), None)


def is_verified(records: Sequence[Record], arm: str) -> bool:
    """Whether the arm was checked against the reference at least once and passed every time."""
    verdicts = [record["verified"] is True for record in _of_kind(records, "verify", arm)]
    return bool(verdicts) and all(verdicts)


# --- estimates -------------------------------------------------------------------------------------------------------


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of independent `values`: mean -+ t(n-1, 0.975) * SD / sqrt(n); None for n < 2."""
    if len(values) < 2:
        return None
    from scipy.special import stdtrit  # scipy.stats would take a second to import

    half = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def by_launch(values: Mapping[BlockKey, float]) -> dict[int, list[float]]:
    """The values of each launch, both in ascending order of their index."""
    groups: dict[int, list[float]] = {}
    for key in sorted(values):
        groups.setdefault(key.launch, []).append(values[key])
    return groups


def estimate(values: Mapping[BlockKey, float]) -> Estimate | None:
    """Mean and interval over launch means from MIN_LAUNCHES launches on, else over blocks, which `unit` then says.

    The mean is over the same units as the interval, so it always lies inside. None if there are no values.
    """
    launches = by_launch(values)
    if not launches:
        return None
    if len(launches) >= MIN_LAUNCHES:
        units, unit = [fmean(group) for group in launches.values()], UNIT_LAUNCH
    else:
        units, unit = list(values.values()), UNIT_BLOCK if len(launches) == 1 else UNIT_BLOCKS
    sd = stdev(units) if len(units) > 1 else None
    return Estimate(fmean(units), sd, t_interval(units), len(units), unit)


def log_ratios(a: Times, b: Times) -> dict[BlockKey, float]:
    """log(throughput of a / throughput of b) = log(time of b / time of a) in each block that has both."""
    return {key: math.log(b[key] / a[key]) for key in sorted(a.keys() & b.keys())}


def throughput_ratio(a: Times, b: Times) -> Estimate | None:
    """Throughput of a over throughput of b with its interval: above 1 means that a is faster, in either phase.

    Geometric: mean and interval are those of the log ratios, taken back by exp; `sd` is the SD of the log ratios.
    """
    logs = estimate(log_ratios(a, b))
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


def _figure(values: Mapping[BlockKey, float], convert: Callable[[float], float]) -> dict[str, Any] | None:
    """Estimate of `convert(seconds)`; a launch's value is that of its mean time, so that TPS x TPOT = batch holds."""
    launches = by_launch(values)
    if len(launches) >= MIN_LAUNCHES:
        units = {BlockKey(launch, 0): convert(fmean(group)) for launch, group in launches.items()}
    else:
        units = {key: convert(seconds) for key, seconds in values.items()}
    figure = estimate(units)
    return figure and {**figure._asdict(), "ci95": figure.ci95 and list(figure.ci95)}


def _timing(workload: Mapping[str, Any], prefill: Times, decode: Times) -> dict[str, Any]:
    tokens, batch, steps = workload["batch"] * workload["seq"], workload["batch"], workload["decode_steps"]
    return {
        "prefill_tokens_per_s": _figure(prefill, lambda seconds: tokens / seconds),
        "decode_tpot_s": _figure(decode, lambda seconds: seconds / steps),
        "decode_tokens_per_s": _figure(decode, lambda seconds: batch * steps / seconds),
    }


def _memory(ranks: Sequence[Mapping[str, Any]] | None) -> dict[str, int | None] | None:
    """Bytes of each part on the rank that has most of it; `total` is the largest sum of one rank."""
    if not ranks:
        return None
    rows = [[rank.get(f"{part}_bytes") for part in MEMORY_PARTS] for rank in ranks]
    rows = [[*row, None if None in row else sum(row)] for row in rows]
    columns = zip((*MEMORY_PARTS, "total"), zip(*rows, strict=True), strict=True)
    return {part: _known(max, column) for part, column in columns}


def _known(choose: Callable[[list[Any]], Any], values: Iterable[Any]) -> Any:
    """The chosen one of the values (max, min), or None if any of them is unknown."""
    listed = list(values)
    return None if None in listed else choose(listed)


def _memory_of(records: Sequence[Record], arm: str) -> dict[str, Any]:
    every = list(_of_kind(records, "memory", arm))
    last = every[-1] if every else None
    return {
        "memory_bytes": _memory([rank for record in every for rank in record["per_rank"]]),
        "memory_predicted_bytes": _memory(last["predicted"] if last else None),
        "memory_measured_by": last["measured_by"] if last else None,
    }


def _traffic(records: Sequence[Record], arm: str, timed: bool) -> list[dict[str, Any]]:
    """The rows of the last traffic record of each phase, without their times where the arm may not show any."""
    last = {record["phase"]: record for record in _of_kind(records, "traffic", arm)}
    return [
        {"phase": phase, **op, "time_s": op["time_s"] if timed else None, "as_predicted": last[phase]["as_predicted"]}
        for phase in PHASES
        if phase in last
        for op in last[phase]["ops"]
    ]


def relative_error(records: Iterable[Record], arm: str) -> float | None:
    """The largest relative L2 error of the arm over all phases and launches; None if any of them is unknown."""
    errors = [
        phase["relative_error"] for record in _of_kind(records, "verify", arm) for phase in record["phases"].values()
    ]
    return _known(max, errors) if errors else None


def _arm(design: Mapping[str, Any], records: Sequence[Record], arm: Mapping[str, str]) -> dict[str, Any]:
    label = arm["label"]
    verified = is_verified(records, label)
    check = _last(_of_kind(records, "verify", label))
    times = {phase: block_times(records, label, phase) if verified else {} for phase in PHASES}
    return {
        **{key: arm[key] for key in ("label", "layout", "role")},
        "verified": verified,
        "relative_error": relative_error(records, label),
        "verify": check and {key: value for key, value in check.items() if key not in ("kind", "arm", "time_s")},
        **_timing(design["workload"], times["prefill"], times["decode"]),
        **_memory_of(records, label),
        "traffic": _traffic(records, label, verified),
    }


# --- arms against each other -----------------------------------------------------------------------------------------


def is_grid(layout: str) -> bool:
    """Whether the layout cuts heads into m > 1 channel slices (n4m4:batch; m = 1 is tensor parallelism)."""
    match = re.search(r"m(\d+)", layout.partition(":")[0])
    return match is not None and int(match.group(1)) > 1


def pairs(arms: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Which arms are compared: every one with the baseline, and every n x m one with every other arm but A/A."""
    baseline = next(arm["label"] for arm in arms if arm["role"] == "baseline")
    chosen = [(arm["label"], baseline) for arm in arms if arm["label"] != baseline]
    plain = [arm for arm in arms if arm["role"] != "aa"]
    for a in (arm["label"] for arm in plain if is_grid(arm["layout"])):
        for b in (arm["label"] for arm in plain):
            if a != b and (a, b) not in chosen and (b, a) not in chosen:
                chosen.append((a, b))
    return chosen


def _comparison(
    records: Sequence[Record], a: str, b: str, phase: Phase, margin: float, allowed: bool
) -> dict[str, Any]:
    times_a, times_b = ((block_times(records, arm, phase) if allowed else {}) for arm in (a, b))
    ratio = throughput_ratio(times_a, times_b)
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
    return [
        _comparison(records, a, b, phase, design["margin"], {a, b} <= verified)
        for phase in PHASES
        for a, b in pairs(design["arms"])
    ]


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


def _control(records: Sequence[Record]) -> dict[str, Any] | None:
    """The negative control at its weakest: it has to be rejected in every launch, and move the logits in every one."""
    controls = list(_of_kind(records, "control"))
    if not controls:
        return None
    return {
        "layout": controls[-1]["layout"],
        "rejected": all(record["rejected"] is True for record in controls),
        "relative_error": _known(min, (record["relative_error"] for record in controls)),
        "sensitivity": _known(min, (record["sensitivity"] for record in controls)),
    }


# --- what a reader must know first -----------------------------------------------------------------------------------


def cpu_warning(ranks: int, cores: int | None = None) -> str:
    """The sentence that every result from a CPU carries."""
    host = f"{cores} cores" if cores else "this host's cores"
    return f"Times of {ranks} ranks on {host} say nothing about GPUs; the accuracy, the bytes and the memory do."


def missing_blocks(design: Mapping[str, Any], records: Sequence[Record]) -> tuple[int, int]:
    """How many timed blocks of verified arms the journal lacks, and how many the design asks for."""
    labels = [arm["label"] for arm in design["arms"] if is_verified(records, arm["label"])]
    asked = len(labels) * design["launches"] * design["blocks"]
    there = sum(
        len(block_times(records, label, "prefill").keys() & block_times(records, label, "decode").keys())
        for label in labels
    )
    return max(0, asked - there), asked


def is_complete(design: Mapping[str, Any], records: Sequence[Record]) -> bool:
    """Whether the run said that it ended, every arm was checked, and no block of a verified arm is missing."""
    end = _last(_of_kind(records, "end"))
    checked = {record["arm"] for record in _of_kind(records, "verify")}
    every_arm = all(arm["label"] in checked for arm in design["arms"])
    return end is not None and end["completed"] is True and every_arm and missing_blocks(design, records)[0] == 0


def _accuracy_warnings(summary: Mapping[str, Any]) -> Iterator[str]:
    for arm in summary["arms"]:
        if not arm["verified"]:
            check = arm["verify"] or {"reason": "it was not checked"}
            reason = check["reason"] or "a check in an earlier launch failed"
            yield f"{arm['label']} is not verified ({reason}); its times are withheld."
        if any(row["as_predicted"] is False for row in arm["traffic"]):
            yield f"{arm['label']} moved other bytes than its layout predicts."
    control = summary["control"]
    if control is None:
        yield "No negative control was run, so nothing shows that the accuracy check can fail."
    elif not control["rejected"]:
        yield "The negative control passed the accuracy check: no verdict on accuracy in this run can be trusted."
    elif (control["sensitivity"] or 0.0) <= MIN_SENSITIVITY:
        yield "The model is not sensitive enough: the negative control moves its logits by 10 % or less."


def _noise_warnings(design: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    twins = {arm["label"] for arm in design["arms"] if arm["role"] == "aa"}
    if not twins:
        yield "No A/A arm was run, so this machine's own false differences are unknown."
    for row in summary["comparisons"]:
        if row["a"] not in twins or row["ci95"] is None:
            continue
        low, high = row["ci95"]
        if not low <= 1 <= high:
            yield (
                f"In {row['phase']} this machine called two copies of the same arm different (ratio {row['ratio']:.3f},"
                f" 95 % interval {low:.3f} to {high:.3f}): differences of this size between arms mean nothing."
            )
        elif row["verdict"] != "equivalent":
            yield (
                f"In {row['phase']} this machine cannot resolve the margin of {design['margin']:.1%}: two copies of the"
                f" same arm differ by anything from {low - 1:+.1%} to {high - 1:+.1%}."
            )


def _replication_warnings(records: Sequence[Record], summary: Mapping[str, Any]) -> Iterator[str]:
    launches = len({record["launch"] for record in _of_kind(records, "block") if not record.get("warmup")})
    if 0 < launches < MIN_LAUNCHES:
        yield (
            f"With {launches} of the {MIN_LAUNCHES} launches that are needed, the intervals describe only what was"
            " launched; another launch may differ by more."
        )
    if any(row["ratio"] is not None and row["ci95"] is None for row in summary["comparisons"]):
        yield "Where there is only one block there is no interval, and the verdict is inconclusive whatever the ratio."


def _identity_warnings(design: Mapping[str, Any], records: Sequence[Record]) -> Iterator[str]:
    launches = list(_of_kind(records, "launch"))
    if any(record["design_hash"] != design["hash"] for record in launches):
        yield "A launch ran another design than the one in this folder."
    for key, what in (("input_sha256", "inputs"), ("weights_sha256", "weights"), ("device_names", "devices")):
        if len({str(record.get(key)) for record in launches}) > 1:
            yield f"The launches had different {what}."


def _completeness_warnings(design: Mapping[str, Any], records: Sequence[Record], complete: bool) -> Iterator[str]:
    triples = [
        (record["launch"], record["block"], record["arm"])
        for record in _of_kind(records, "block")
        if not record.get("warmup")
    ]
    if len(triples) != len(set(triples)):
        yield "Some blocks are in the journal twice; the first of each is used."
    if complete:
        return
    missing, asked = missing_blocks(design, records)
    yield "The run is incomplete" + (f": {missing} of {asked} timed blocks are missing." if missing else ".")


def _warnings(design: Mapping[str, Any], records: Sequence[Record], summary: Mapping[str, Any]) -> list[str]:
    warnings = [cpu_warning(design["ranks"])] if design["device"] == "cpu" else []
    warnings += _completeness_warnings(design, records, summary["complete"])
    warnings += _accuracy_warnings(summary)
    warnings += _identity_warnings(design, records)
    warnings += _noise_warnings(design, summary)
    warnings += _replication_warnings(records, summary)
    return warnings


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
        "arms": [_arm(design, records, arm) for arm in design["arms"]],
        "comparisons": _comparisons(design, records),
        "negative_control_rejected": control and control["rejected"],
        "control": control,
        "reproducibility": [_reproducibility(records, arm["label"]) for arm in design["arms"]],
        "complete": is_complete(design, records),
    }
    summary["warnings"] = _warnings(design, records, summary)
    return summary
