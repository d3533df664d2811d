"""The tables about conditions: what disturbed the run, and what the counters said while it was timed."""

from collections.abc import Mapping, Sequence
from typing import Any

from headgrid.experiment.records import Phase
from headgrid.report import format as fmt
from headgrid.report.marks import LEGEND
from headgrid.report.table import Cell, Table

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
    """One row for each counter, one column for each arm: mean ± SD; below it the share of the ceiling, n."""
    found = summary.get("telemetry") or {"arms": [], "missing": [], "hz": 0}
    arms: Sequence[Mapping[str, Any]] = found["arms"]
    by_arm = [{row["counter"]: row for row in arm["phases"][phase]} for arm in arms]
    names = list(dict.fromkeys(name for rows in by_arm for name in rows))
    rows = [
        [Cell(_label(next(r[name] for r in by_arm if name in r)), "name"), *(_cell(r.get(name)) for r in by_arm)]
        for name in names
    ]
    labels, note = tuple(arm["label"] for arm in arms), _note(found, by_arm) if rows else ""
    return Table(f"Telemetry: {phase}", ("Counter", *labels), rows, note, columns=("", *labels), sortable=False)


def _label(row: Mapping[str, Any]) -> str:
    """The counter, its unit unless values show it, and the ceiling that shares are of."""
    unit = "" if row["unit"] in ("B", "B/s", "") else f", {row['unit']}"
    measured = "measured " if row.get("ceiling_measured") else ""
    shown = " ".join(_in_unit(row, row["ceiling"], None)).rstrip() if _has_share(row) else ""
    ceiling = f" (of {measured}{shown}{row['unit'] * (row['unit'] == '%')})" if shown else ""
    return f"{row['label']}{unit}{ceiling}{' (derived)' if row['derived'] else ''}"


def _has_share(row: Mapping[str, Any]) -> bool:
    return row["share_of_ceiling"] is not None and (row["unit"] != "%" or bool(row.get("ceiling_measured")))


def _in_unit(row: Mapping[str, Any], mean: float, sd: float | None) -> tuple[str, str]:
    """Mean ± SD with the same decimals: two digits of the SD, between three and four of the mean; and the unit."""
    of_bytes = row["unit"] in ("B", "B/s")
    unit, divisor = fmt.byte_unit(mean) if of_bytes else ("", 1)
    decimals = max(0, fmt.decimals_for(mean / divisor, 3)) if mean else 0
    if sd and mean:
        finest = max(0, fmt.decimals_for(mean / divisor, 4))
        decimals = min(finest, max(decimals, fmt.decimals_for(sd / divisor, 2)))
    elif sd:
        decimals = max(0, fmt.decimals_for(sd, 2))
    text = " ± ".join(fmt.fixed(value / divisor, decimals) for value in (mean, sd) if value is not None)
    return text, unit + row["unit"][1:] if of_bytes else ""


def _cell(row: Mapping[str, Any] | None) -> Cell:
    if row is None:
        return Cell(fmt.NOT_MEASURED, "number unknown")
    figures = " ".join(_in_unit(row, row["mean"], row["sd"])).rstrip()
    share = f"{fmt.percent(row['share_of_ceiling'])}, " if _has_share(row) else ""
    return Cell(f"{figures}\n{share}n {row['n']:,}", "number")


def _note(found: Mapping[str, Any], by_arm: Sequence[Mapping[str, Any]]) -> str:
    derived = {row["label"]: row["derived"] for rows in by_arm for row in rows.values() if row["derived"]}
    parts = [
        "Means over samples that lie wholly inside timed blocks, of the mean over the ranks' GPUs, cores or processes;"
        " ± SD over samples, which follow one another and are not independent; n counts them. Per cents without a unit"
        " beside the name are shares of the ceiling that the name gives: the driver's, or the calibration's where it is"
        " called measured."
    ]
    parts += [f"{label} (derived): {how}." for label, how in derived.items()]
    if found["missing"]:
        named = "; ".join(f"{row['counter']} ({row['why']})" for row in found["missing"])
        parts.append(f"Not available: {named}.")
    return " ".join(parts)
