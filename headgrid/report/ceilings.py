"""The table of shares: how near each arm comes to what its devices can do."""

from collections.abc import Mapping
from typing import Any

from headgrid.report import format as fmt
from headgrid.report.naming import named
from headgrid.report.table import Cell, Table

COLUMNS = (
    ("prefill", "mfu", "measured", "MFU of prefill, measured products"),
    ("prefill", "mfu", "data sheet", "MFU of prefill, data sheet"),
    ("prefill", "floor", "measured", "Prefill, measured products and attention"),
    ("decode", "bytes", "measured", "Decode: KV and weights at measured copying"),
    ("decode", "bytes", "data sheet", "Decode: KV and weights, data sheet"),
)
FITS_CACHE = "fits a cache"


def table(summary: Mapping[str, Any]) -> Table | None:
    """One row for each arm but the A/A twin; None where no ceiling is known."""
    found = summary.get("ceilings")
    if not found:
        return None
    rows = {(row["label"], row["phase"], row["kind"], row["of"]): row for row in found["shares"]}
    columns = [column for column in COLUMNS if any(row[1:] == column[:3] for row in rows)]
    arms = [arm for arm in summary["arms"] if arm["role"] in ("baseline", "arm")]
    body = []
    for arm in arms:
        cells = (_cell(rows.get((arm["label"], *column[:3]))) for column in columns)
        body.append([Cell(named(arm), "name", arms=(arm["label"],)), *cells])
    return Table("Shares of ceilings", ("Method", *(column[3] for column in columns)), body, _note(found))


def _cell(row: Mapping[str, Any] | None) -> Cell:
    if row is None or row["share"] is None:
        cached = row is not None and row["why"] is not None
        return Cell(FITS_CACHE if cached else fmt.NOT_MEASURED, "number unknown")
    share = row["share"]
    digits = 3 if share["mean"] >= 0.1 else fmt.decimals_for(share["mean"], 2)
    interval = " [{}, {}]".format(*(fmt.fixed(edge, digits) for edge in share["ci95"])) if share["ci95"] else ""
    return Cell(f"{fmt.fixed(share['mean'], digits)}{interval}", "number")


def _note(found: Mapping[str, Any]) -> str:
    parts = [
        "What the work needs at least at a ceiling, over the time that it took; 95 % intervals are those of the time."
        " MFU: operations of the model, masked pairs not counted, at the rate of products. KV and weights: bytes that"
        " the fullest rank reads in a mean decode step, each once."
    ]
    if sheet := found["data_sheet"]:
        parts.append(f"Data sheet: {sheet['source']}; nothing reaches it.")
    if made := found["calibration"]:
        spreads = ", ".join(f"{name} {fmt.percent(value)}" for name, value in made["spreads"].items())
        parts.append(
            f"Measured: {made['ranks']} x {made['device_name']}, all at the same time, {made['created']} (SHA-256"
            f" {made['sha256'][:12]}…); half ranges of the ceilings: {spreads}."
        )
        if made["unsettled"]:
            parts.append(f"Rates had NOT settled when they were measured: {', '.join(made['unsettled'])}.")
    else:
        parts.append("Without a calibration (`headgrid calibrate`) there is no measured ceiling.")
    return " ".join(parts)
