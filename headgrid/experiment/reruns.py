"""What a pilot decided and what followed: the dependence of the turns that were timed, and the blocks run again.

A block is run again, all arms of it and at once, if a sentinel beside one of its turns was out of the pilot's band: by
the rule that the design declares, once at most, and for a share of a launch's blocks. The times of arms have no part in
that. First tries stay in the journal, and what the ratios would be with them is told.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from headgrid.experiment.design import analysis_of
from headgrid.experiment.pilot import PilotRule, is_shown, out_of_band, pilot_bands, pilot_of, rule_of, tau_int
from headgrid.experiment.records import (
    Phase,
    Record,
    block_times,
    first_tries,
    is_verified,
    latest_attempts,
    of_kind,
    turns_s,
)
from headgrid.experiment.stats import PHASES, throughput_ratio

Reading = Mapping[str, Sequence[float]]


@dataclass(slots=True)
class Try:
    """A block that was run once, of whatever arms: the sentinels before each and, if `closed`, behind the last."""

    launch: int
    attempt: int
    block: int
    retry: int
    warmup: bool
    read: list[Reading] = field(default_factory=list)
    closed: bool = False

    @property
    def place(self) -> tuple[int, int, int, int]:
        """What its records have in common."""
        return self.launch, self.attempt, self.block, self.retry


@dataclass(frozen=True, slots=True)
class Decision:
    """A timed block's try against the rule: what was `out` of the band, whether it was `due` again, and `was`."""

    tried: Try
    out: tuple[tuple[str, float], ...]
    due: bool
    was: bool


def tries(records: Sequence[Record]) -> Iterator[Try]:
    """All blocks as they were run, in order."""
    current: Try | None = None
    for record in records:
        if record["kind"] not in ("launch", "block", "pilot", "rerun", "end"):
            continue
        block = record["kind"] == "block"
        place = (record["launch"], record.get("attempt", 0), record["block"], record.get("retry", 0)) if block else None
        read = record.get("sentinels")
        if current is not None and place != current.place:
            if record["kind"] in ("block", "rerun", "end") and read:
                current.read.append(read)
                current.closed = True
            yield current
            current = None
        if place is not None:
            current = current or Try(*place, bool(record["warmup"]))
            current.read += [read] if read else []
    if current is not None:
        yield current


def decisions(rule: PilotRule, blocks: int, records: Sequence[Record]) -> Iterator[Decision]:
    """Of every timed block behind the pilot whose readings are all there, whether the rule has it run again.

    `blocks`: of a launch. What was run again in an earlier attempt at a launch counts, too.
    """
    pilot = pilot_of(records)
    if pilot is None:
        return
    bands, behind = pilot_bands(rule, pilot), next(n for n, record in enumerate(records) if record is pilot)
    reruns = {(r["launch"], r["attempt"], r["block"]) for r in of_kind(records, "rerun")}
    again: dict[int, set[int]] = {}
    for tried in tries(records[behind:]):
        if tried.warmup or not tried.closed:
            continue
        out, mine = tuple(out_of_band(bands, tried.read)), again.setdefault(tried.launch, set())
        free = not tried.retry and tried.block not in mine and len(mine) < rule.reruns(blocks)
        was = not tried.retry and tried.place[:3] in reruns
        yield Decision(tried, out, bool(out) and free, was)
        if was:
            mine.add(tried.block)


def summarise_pilot(
    design: Mapping[str, Any], records: Sequence[Record], comparisons: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """`pilot` and `reruns` of summary.json, both None where none was declared; nothing for designs before that.

    `comparisons` are the summary's.
    """
    if analysis_of(design) < 3:
        return {}
    rule, pilot = rule_of(design), pilot_of(records)
    if rule is None or pilot is None:
        return {"pilot": None, "reruns": None}
    keys = ("turn_s", "tau_int", "tau_shown", "turns", "capped")
    told = {"block_s": rule.block_s, "pilot_turns": len(pilot["prefill_s"]), **{key: pilot[key] for key in keys}}
    return {
        "pilot": told | {"followed": list(_followed(design, records))},
        "reruns": _reruns(design, records, rule, comparisons),
    }


def _followed(design: Mapping[str, Any], records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    """For each attempt at a launch the dependence of all its timed turns, in the order of time, each log time less the
    median of its arm.
    """
    verified = {arm["label"] for arm in design["arms"] if is_verified(records, arm["label"])}
    kept = [r for r in of_kind(latest_attempts(records), "block") if r["arm"] in verified and not r["warmup"]]
    for launch, attempt in dict.fromkeys((r["launch"], r["attempt"]) for r in kept):
        turns = [
            (r["arm"], math.log(prefill + decode))
            for r in kept
            if (r["launch"], r["attempt"]) == (launch, attempt)
            for prefill, decode in zip(turns_s(r, "prefill"), turns_s(r, "decode"), strict=True)
        ]
        usual = {label: median(value for arm, value in turns if arm == label) for label in {arm for arm, _ in turns}}
        series = [value - usual[arm] for arm, value in turns]
        told = {"turns": len(series), "tau_int": tau_int(series), "tau_shown": is_shown(series)}
        yield {"launch": launch, "attempt": attempt, **told}


def _reruns(
    design: Mapping[str, Any], records: Sequence[Record], rule: PilotRule, comparisons: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    found = list(decisions(rule, design["blocks"], records))
    again = [_again(decision) for decision in found if decision.was and decision.out]
    return {
        "blocks": len(list(of_kind(records, "rerun"))),
        "of_blocks": design["launches"] * design["blocks"],
        "allowed_per_launch": rule.reruns(design["blocks"]),
        "again": again,
        "still_out": sum(bool(d.out) for d in found if d.tried.retry),
        "left_out_of_band": sum(bool(d.out) and not d.was for d in found if not d.tried.retry),
        "sensitivity": list(_sensitivity(design, records, comparisons)) if again else [],
    }


def _again(decision: Decision) -> dict[str, Any]:
    (kind, ratio), tried = decision.out[0], decision.tried
    return {"launch": tried.launch, "block": tried.block, "sentinel": kind.removesuffix("_s"), "ratio": ratio}


def _sensitivity(
    design: Mapping[str, Any], records: Sequence[Record], comparisons: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Each ratio beside what it would be with the first tries instead."""
    before = first_tries(records)
    for row in comparisons:
        phase: Phase = row["phase"]
        if row["ratio"] is None or phase not in PHASES:
            continue
        times = [block_times(before, row[side], phase) for side in ("a", "b")]
        found = throughput_ratio(times[0], times[1], analysis_of(design))
        told = {"first_tries": found and found.mean, "first_tries_ci95": found and found.ci95 and list(found.ci95)}
        yield {"a": row["a"], "b": row["b"], "phase": phase, "ratio": row["ratio"], **told}
