"""What every arm holds and sends: memory and collectives, measured beside what its layout predicts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from headgrid.experiment.records import Phase
from headgrid.experiment.stats import MEMORY_PARTS
from headgrid.report import format as fmt
from headgrid.report.format import NOT_MEASURED
from headgrid.report.table import NOT_APPLICABLE, Cell, Table, arm_cell, cells, yes_or_no

Summary = Mapping[str, Any]


def _without_twins(summary: Summary) -> list[Mapping[str, Any]]:
    """All arms but A/A, which is the baseline's own engine under another label: bytes would only be repeated."""
    return [arm for arm in summary["arms"] if arm["role"] != "aa"]


def memory(summary: Summary) -> Table:
    """Bytes of the fullest rank, measured above predicted, all in one unit."""
    keys = ("memory_bytes", "memory_predicted_bytes")
    arms = _without_twins(summary)
    sizes = [value for arm in arms for key in keys for value in (arm[key] or {}).values() if value]
    unit, divisor = fmt.byte_unit(max(sizes, default=0))
    head = ("Method", "", "Parameters", "KV cache", "Activations, peak", "Communication buffers", "Total", "Difference")
    rows = [row for arm in arms for row in _memory_rows(arm, divisor)]
    how = sorted({arm["memory_measured_by"] for arm in arms if arm["memory_measured_by"]})
    note = (
        f"{unit} of the rank that has most of it; the total is the largest sum of one rank. Predicted: computed from"
        f" the layout alone. Difference: measured over predicted. Measured by: {'; '.join(how) or NOT_MEASURED}."
    )
    return Table(f"Memory per rank, {unit}", head, rows, note)


def _memory_rows(arm: Mapping[str, Any], divisor: int) -> Iterator[list[Cell]]:
    measured, predicted = arm["memory_bytes"], arm["memory_predicted_bytes"]
    for number, values in enumerate((measured, predicted)):
        columns = (*MEMORY_PARTS, "total")
        texts = [_share((values or {}).get(part), divisor) for part in columns]
        shown = cells(texts, "number" if number == 0 else "number quiet")
        sized = [replace(cell, value=(values or {}).get(part)) for cell, part in zip(shown, columns, strict=True)]
        row = [Cell(("measured", "predicted")[number]), *sized]
        if number == 0:
            both = measured and predicted and measured["total"] and predicted["total"]
            change = measured["total"] / predicted["total"] - 1 if both else None
            text = fmt.change(change)
            row = [arm_cell(arm, 2), *row, Cell(text, "number" if both else "number unknown", 2)]
        yield row


def _share(value: float | None, divisor: int) -> str:
    """Bytes in the table's unit; what would be only zeros in it in its own unit."""
    if value and value < divisor / 10_000:
        return fmt.size(value)
    return fmt.significant(value / divisor, 4) if value is not None else NOT_MEASURED


def traffic(summary: Summary, phase: Phase, layers: Mapping[str, int]) -> Table | None:
    """What every arm sends in one phase, by collective; `layers` = layers on a rank of each layout.

    An arm whose calls were watched and timed has a breakdown that tells more of them (report/breakdown.py), and is left
    out; None if that are all.
    """
    found = [row for row in summary.get("breakdown") or () if row["phase"] == phase]
    watched = {row["label"] for row in found if all(call["time_s"] is not None for call in row["calls"])}
    arms = [arm for arm in _without_twins(summary) if arm["label"] not in watched]
    if not arms:
        return None
    head = (
        "Method",
        "Collective",
        "Axis",
        "Where",
        "Calls",
        "Bytes per rank",
        "Time",
        "Bytes per layer",
        "Time per layer",
        "As predicted",
    )
    rows = [row for arm in arms for row in _traffic_rows(arm, phase, layers.get(arm["layout"]))]
    whole = "one prefill of the whole batch" if phase == "prefill" else "one decode step"
    note = (
        f"Calls, bytes and time are for {whole}. Times are those of the slowest rank in a separate, untimed pass; they"
        " include waiting for other ranks and need not add up to a share of the times above. Messages between stages"
        " and weights gathered ahead travel while a rank computes: a time of their own was not measured."
    )
    of = ", arms whose calls were not watched and timed" if watched else ""
    return Table(f"Communication breakdown: {phase}{of}", head, rows, note)


def _traffic_rows(arm: Mapping[str, Any], phase: Phase, layers: int | None) -> Iterator[list[Cell]]:
    ops = [op for op in arm["traffic"] if op["phase"] == phase]
    if not ops:  # an arm is verified after its traffic was watched
        yield [
            arm_cell(arm),
            *cells(["none issued" if arm["verified"] else NOT_MEASURED] + [NOT_APPLICABLE] * 2, ""),
            *cells([NOT_APPLICABLE] * 5),
            Cell(NOT_APPLICABLE),
        ]
    total = [_total(ops, key) for key in ("calls", "bytes_per_rank", "time_s")]
    for number, op in enumerate(ops):
        share = layers if op["per_layer"] and layers else None
        row = [Cell(op["collective"]), Cell(op["axis"]), Cell("each layer" if op["per_layer"] else "not per layer")]
        row += cells((f"{op['calls']:,}", fmt.size(op["bytes_per_rank"]), fmt.duration(op["time_s"])))
        row += cells((_per(op["bytes_per_rank"], share, fmt.size), _per(op["time_s"], share, fmt.duration)))
        head = [arm_cell(arm, len(ops) + (len(ops) > 1))] if number == 0 else []
        yield [*head, *row, yes_or_no(op["as_predicted"])]
    if len(ops) > 1:
        texts = (f"{total[0]:,}", fmt.size(total[1]), fmt.duration(total[2]), NOT_APPLICABLE, NOT_APPLICABLE)
        yield [
            Cell("all together", "total"),
            Cell("", "total"),
            Cell("", "total"),
            *cells(texts, "number total"),
            Cell(""),
        ]


def _total(ops: Sequence[Mapping[str, Any]], key: str) -> Any:
    values = [op[key] for op in ops]
    return None if None in values else sum(values)


def _per(value: float | None, layers: int | None, show: Any) -> str:
    """A phase's figure for one layer; a dash where the collective does not belong to a layer."""
    if layers is None:
        return NOT_APPLICABLE
    return show(None if value is None else value / layers)
