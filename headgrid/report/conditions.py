"""The tables about conditions: what disturbed the run, and what the counters said while it was timed."""

from collections.abc import Mapping, Sequence
from typing import Any

from headgrid.experiment.records import Phase
from headgrid.report import format as fmt
from headgrid.report.marks import LEGEND
from headgrid.report.tables import Cell, Table

Summary = Mapping[str, Any]
SEVERITY_CSS = {"INVALID": "bad", "SUSPECT": "bad", "INFO": "quiet"}


def isolation(summary: Summary) -> Table:
    """Every code that was found, the gravest first; below, what was not checked and why."""
    found = summary.get("isolation") or {"findings": [], "checked": [], "unchecked": []}
    rows = [
        [
            Cell(row["code"], "name"),
            Cell(row["severity"].lower(), SEVERITY_CSS[row["severity"]]),
            Cell(row["meaning"]),
            Cell(f"{row['blocks']:,} of {row['of_blocks']:,}", "number"),
            Cell(row["example"]),
        ]
        for row in found["findings"]
    ]
    if found["checked"] and not rows:
        rows = [[Cell("none", "name"), Cell("clean", "good"), Cell("nothing was found"), Cell("0", "number"), Cell("")]]
    head = ("Code", "Verdict", "Meaning", "Timed blocks", "For example")
    return Table("Isolation", head, rows, f"{LEGEND} No block is left out of a figure for it. {_unchecked(found)}")


def _unchecked(isolation: Mapping[str, Any]) -> str:
    reasons: dict[str, list[str]] = {}
    for row in isolation["unchecked"]:
        reasons.setdefault(row["why"], []).append(row["code"])
    if not reasons:
        return ""
    return "Not checked: " + "; ".join(f"{', '.join(codes)} ({why})" for why, codes in reasons.items()) + "."


def telemetry(summary: Summary, phase: Phase) -> Table:
    """One row for each counter, one column for each arm: mean ± SD, the share of the ceiling, n."""
    found = summary.get("telemetry") or {"arms": [], "missing": [], "hz": 0}
    arms: Sequence[Mapping[str, Any]] = found["arms"]
    by_arm = [{row["counter"]: row for row in arm["phases"][phase]} for arm in arms]
    names = list(dict.fromkeys(name for rows in by_arm for name in rows))
    rows = [
        [Cell(_label(next(r[name] for r in by_arm if name in r)), "name"), *(_cell(r.get(name)) for r in by_arm)]
        for name in names
    ]
    return Table(
        f"Telemetry: {phase}", ("Counter", *(arm["label"] for arm in arms)), rows, _note(found, by_arm) if rows else ""
    )


def _label(row: Mapping[str, Any]) -> str:
    shown_by_value = row["unit"] in ("B", "B/s", "")
    unit = "" if shown_by_value else f", {row['unit']}"
    return f"{row['label']}{unit}{' (derived)' if row['derived'] else ''}"


def _cell(row: Mapping[str, Any] | None) -> Cell:
    if row is None:
        return Cell(fmt.NOT_MEASURED, "number unknown")
    show = (lambda value: fmt.size(value) + ("/s" if row["unit"] == "B/s" else "")) if row["unit"][:1] == "B" else None
    mean, sd = (show(v) if show and v is not None else fmt.significant(v) for v in (row["mean"], row["sd"]))
    text = f"{mean} ± {sd}" if row["sd"] is not None else mean
    if row["share_of_ceiling"] is not None and row["unit"] != "%":
        ceiling = show(row["ceiling"]) if show else fmt.significant(row["ceiling"])
        text += f", {fmt.percent(row['share_of_ceiling'])} of {ceiling}"
    return Cell(f"{text} (n {row['n']:,})", "number")


def _note(found: Mapping[str, Any], by_arm: Sequence[Mapping[str, Any]]) -> str:
    derived = {row["label"]: row["derived"] for rows in by_arm for row in rows.values() if row["derived"]}
    parts = [
        "Means over samples that lie wholly inside timed blocks, of the mean over the ranks' GPUs, cores or processes;"
        " ± SD over samples, which follow one another and are not independent; n counts them."
    ]
    parts += [f"{label} (derived): {how}." for label, how in derived.items()]
    if found["missing"]:
        named = "; ".join(f"{row['counter']} ({row['why']})" for row in found["missing"])
        parts.append(f"Not available: {named}.")
    return " ".join(parts)
