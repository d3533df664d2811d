"""The section `breakdown` of summary.json: where each arm's time goes, beside what its timed blocks took."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from headgrid.experiment.records import Phase, Record, block_times, is_verified, last_of, of_kind

PHASES: tuple[Phase, ...] = ("prefill", "decode")
PARTS = ("compute_s", "exposed_s", "idle_s")
"""Of a step: together they are all of it."""
CLOSED = 0.02
"""By so much of the step the parts may miss it."""


def closure(rank: Mapping[str, Any]) -> float | None:
    """By how much of a rank's step its parts, each measured, exceed it; None where a part is not known."""
    parts = [rank[part] for part in PARTS]
    return None if None in parts else sum(parts) / rank["step_s"] - 1


def summarise_breakdown(design: Mapping[str, Any], records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row for each verified arm and phase that was watched, from its newest record; times are of one step. The A/A
    arm and the planted one have none: theirs is the baseline's engine, which is watched once.

    `step_s` is the slowest rank's, `timed_s` the timed blocks' median, `slow_down` the former over the latter: what
    watching cost. `compute_s`, `exposed_s`, `idle_s` and `hidden_s` are means over ranks, `mean_step_s` the mean of the
    steps that they make up. `closure` is the rank's whose parts miss its step by most.
    """
    found: list[dict[str, Any]] = []
    for arm in design["arms"]:
        label = arm["label"]
        if arm["role"] in ("baseline", "arm") and is_verified(records, label):
            for phase in PHASES:
                mine = [record for record in of_kind(records, "breakdown", label) if record["phase"] == phase]
                if (record := last_of(mine)) is not None:
                    steps = 1 if phase == "prefill" else design["workload"]["decode_steps"]
                    times = list(block_times(records, label, phase).values())
                    found.append(_row(record, median(times) / steps if times else None))
    return found


def _row(record: Record, timed_s: float | None) -> dict[str, Any]:
    ranks, steps = record["ranks"], record["steps"]
    step_s = max(rank["step_s"] for rank in ranks) / steps
    closures = [closure(rank) for rank in ranks]
    known = [each for each in closures if each is not None]
    return {
        "label": record["arm"],
        "phase": record["phase"],
        "steps": steps,
        "source": record["source"],
        "step_s": step_s,
        "timed_s": timed_s,
        "slow_down": step_s / timed_s if timed_s else None,
        "mean_step_s": fmean(rank["step_s"] for rank in ranks) / steps,
        **{part: _mean(ranks, part, steps) for part in (*PARTS, "hidden_s")},
        "closure": max(known, key=abs) if len(known) == len(closures) else None,
        "unknown": record["unavailable"] or record["without_idle"],
        "unmatched": record["unmatched"],
        "calls": [_call(row, steps) for row in record["calls"]],
        "trace": (record["trace"] or {}).get("file"),
        "trace_cut": (record["trace"] or {}).get("cut"),
    }


def _mean(ranks: Sequence[Mapping[str, Any]], part: str, steps: int) -> float | None:
    values = [rank[part] for rank in ranks]
    return None if None in values else fmean(values) / steps


def _call(row: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """A row of one step and one of the ranks that issue such calls."""
    of_step = {key: value / steps for key, value in row.items() if key.endswith("_s") and isinstance(value, float)}
    each = row["ranks"] * steps
    layers = row["layers"] and {"count": row["layers"]["count"]} | {
        name: found and {key: value if key == "max_layer" else value / steps for key, value in found.items()}
        for name, found in row["layers"].items()
        if name != "count"
    }
    sizes = {"calls": row["calls"] / each, "bytes": row["bytes"] / each}
    return {**row, **of_step, **sizes, "bus_bytes_per_s": row["bus_bytes_per_s"], "layers": layers}


def sentences(breakdown: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a reader must know before quoting the breakdown."""
    open_ = [row for row in breakdown if row["closure"] is not None and abs(row["closure"]) > CLOSED]
    if open_:
        worst = max(open_, key=lambda row: abs(row["closure"]))
        which = ", ".join(f"{row['label']} in {row['phase']}" for row in open_)
        yield (
            f"Breakdown: compute, exposed communication and idle miss the step's own time by more than {CLOSED:.0%}"
            f" on a rank of {which} (by up to {worst['closure']:+.1%})."
        )
    for reason in dict.fromkeys(row["unknown"] for row in breakdown if row["unknown"]):
        yield f"Breakdown: not known of every arm ({reason})."
    for reason in dict.fromkeys(row["unmatched"] for row in breakdown if row["unmatched"]):
        yield f"Breakdown: collectives could not all be told apart ({reason})."
