"""Signs beside figures whose conditions were not clean, and the two lines of the validation table about conditions."""

from collections.abc import Mapping
from typing import Any

from headgrid.experiment.isolation import verdict_of
from headgrid.report.format import NOT_MEASURED, percent

SIGNS = {"SUSPECT": "\N{DAGGER}", "INVALID": "\N{DOUBLE DAGGER}"}
LEGEND = f"{SIGNS['SUSPECT']} suspect, {SIGNS['INVALID']} invalid: the conditions were disturbed, see Isolation."


def sign(summary: Mapping[str, Any], phase: str, *arms: str) -> str:
    """The sign of the worst verdict of these arms' figures of a phase; empty if all are clean or none was judged."""
    found = {verdict_of(summary.get("isolation"), arm, phase) for arm in arms}
    return next((f"\N{NO-BREAK SPACE}{SIGNS[verdict]}" for verdict in ("INVALID", "SUSPECT") if verdict in found), "")


def signed(text: str, mark: str) -> str:
    """`text` with its sign; what was not measured needs none."""
    return text if text == NOT_MEASURED else text + mark


def isolation_line(summary: Mapping[str, Any]) -> str:
    """How many timed blocks had the machine to themselves."""
    isolation = summary.get("isolation")
    if not isolation or isolation["verdict"] is None:
        return NOT_MEASURED
    counts = isolation["blocks"]
    total = sum(counts.values())
    return (
        f"{isolation['verdict']}: {counts['CLEAN']:,} of {total:,} timed blocks clean, {counts['SUSPECT']:,} suspect,"
        f" {counts['INVALID']:,} invalid; {len(isolation['checked'])} codes were checked,"
        f" {len(isolation['unchecked'])} could not be"
    )


def sampling_line(summary: Mapping[str, Any]) -> str:
    """How telemetry was taken, and what it cost."""
    telemetry = summary.get("telemetry")
    if not telemetry:
        return NOT_MEASURED
    share = telemetry["sampler_cpu_share"]
    cost = f"{percent(share, 3)} of a core" if share is not None else NOT_MEASURED
    return (
        f"{telemetry['samples']:,} samples at {telemetry['hz']:g} a second by a process of its own, which took {cost};"
        " see Telemetry"
    )
