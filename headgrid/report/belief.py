"""The tables and lines that say whether to believe the others: accuracy, the control, the noise, the seed's checks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headgrid.experiment.records import Record
from headgrid.experiment.stats import PHASES
from headgrid.report import format as fmt
from headgrid.report.format import NOT_MEASURED
from headgrid.report.marks import isolation_line, sampling_line
from headgrid.report.resolving import reproducible
from headgrid.report.resolving import rows as resolving_rows
from headgrid.report.table import Cell, Table, arm_cell, cells, name_cell, yes_or_no

Summary = Mapping[str, Any]


def verdicts(summary: Summary) -> Table:
    """Accuracy of every arm, phase by phase, beside the noise floor of the same dtype."""
    head = (
        "Arm",
        "Verified",
        "Phase",
        "Relative error",
        "Noise floor",
        "Error / floor",
        "Bound",
        "Largest absolute error",
        "Greedy tokens",
    )
    rows = [row for arm in summary["arms"] for row in _verdict_rows(arm)]
    note = (
        "Relative L2 error of the logits against the fp64 reference. The noise floor is the error of the plain"
        " single-device model in the same dtype; the bound is the multiple of it that the design allows. Greedy tokens"
        " must match wherever the reference's top two differ by more than rounding; ties are where they do not. An arm"
        " with FP8 linears has the floor of the single-device model with FP8 linears."
    )
    return Table("Accuracy", head, rows, note)


def _verdict_rows(arm: Mapping[str, Any]) -> Iterator[list[Cell]]:
    check = arm["verify"] or {"phases": {}, "greedy": None}
    for number, phase in enumerate(PHASES):
        figures = check["phases"].get(phase) or {}
        error, floor, bound = (figures.get(key) for key in ("relative_error", "floor", "bound"))
        multiple = fmt.fixed(error / floor, 2) if fmt.known(error) and fmt.known(floor) and floor else NOT_MEASURED
        texts = (fmt.scientific(error), fmt.scientific(floor), multiple, fmt.scientific(bound))
        row = [Cell(phase), *cells((*texts, fmt.scientific(figures.get("max_abs_error"))))]
        if number == 0:
            verified = yes_or_no(arm["verified"] if arm["verify"] else None)
            row = [arm_cell(arm, len(PHASES)), Cell(verified.text, verified.css, len(PHASES)), *row]
            row.append(Cell(_greedy(check["greedy"]), "", len(PHASES)))
        yield row


def _greedy(greedy: Mapping[str, int] | None) -> str:
    if not greedy:
        return NOT_MEASURED
    ties = greedy["ties"]
    text = f"{greedy['matched']:,} of {greedy['compared']:,} matched, {ties:,} {'tie' if ties == 1 else 'ties'}"
    return text + (f", {greedy['mismatched']:,} wrong" if greedy["mismatched"] else "")


def control_line(summary: Summary) -> str:
    """Whether the check rejected what it has to reject."""
    control = summary["control"]
    if control is None:
        return f"Negative control: {NOT_MEASURED}."
    rejected = "rejected, as it must be" if control["rejected"] else "NOT rejected: the check above cannot be trusted"
    return (
        f"Negative control {control['layout']} (every slice takes its own softmax): relative error"
        f" {fmt.significant(control['relative_error'], 2)}, {rejected}. It moves this model's logits by"
        f" {fmt.percent(control['sensitivity'])}; a model that it hardly moves could not tell right from wrong."
    )


def noise_line(summary: Summary) -> str:
    """What this machine makes of two copies of the same arm: no smaller difference than that can be believed."""
    twins = {arm["label"] for arm in summary["arms"] if arm["role"] == "aa"}
    rows = [row for row in summary["comparisons"] if row["a"] in twins and row["ci95"]]
    if not rows:
        return f"Smallest difference that this machine can show: {NOT_MEASURED} (no A/A arm with an interval)."
    bounds = " and ".join(f"{fmt.percent(max(abs(x - 1) for x in row['ci95']))} in {row['phase']}" for row in rows)
    return f"Two copies of {rows[0]['b']} (A/A) differ here by up to {bounds}; smaller differences say nothing."


def validation(summary: Summary, records: Sequence[Record]) -> Table:
    """The seed's validation checks."""
    launches = [record for record in records if record["kind"] == "launch"]
    inputs = {record["input_sha256"] for record in launches}
    rows = [
        [name_cell("Numerical accuracy"), Cell(_accuracy(summary))],
        [name_cell("Reproducibility"), Cell(_spread(summary))],
        [name_cell("Fairness"), Cell(_fairness(len(launches), inputs))],
        *([name_cell(name), *cells([text], "")] for name, text in resolving_rows(summary)),
        [name_cell("Isolation from other work"), *cells([isolation_line(summary)], "")],
        [name_cell("GPU, memory bandwidth and NVLink utilization"), *cells([sampling_line(summary)], "")],
    ]
    return Table("Validation checks", ("Check", "Result"), rows, sortable=False)


def _accuracy(summary: Summary) -> str:
    errors = [arm["relative_error"] for arm in summary["arms"] if arm["relative_error"] is not None]
    verified = sum(arm["verified"] for arm in summary["arms"])
    largest = f"; largest relative error {fmt.scientific(max(errors))} ({fmt.percent(max(errors))})" if errors else ""
    return f"{verified} of {len(summary['arms'])} arms verified{largest}"


def _spread(summary: Summary) -> str:
    known = [row for row in summary["reproducibility"] if row["prefill"] is not None]
    if not known:
        return NOT_MEASURED
    parts = (f"{row['label']} {fmt.percent(row['prefill'])} and {fmt.percent(row['decode'])}" for row in known)
    launches = max(row["launches"] for row in known)
    text = f"SD of the means of {launches} launches, prefill and decode: {'; '.join(parts)}"
    return reproducible(launches, text)


def _fairness(launches: int, inputs: set[str]) -> str:
    if not launches:
        return NOT_MEASURED
    if len(inputs) > 1:
        return "the launches had DIFFERENT input sequences"
    return f"identical input sequences for all arms and launches (SHA-256 {next(iter(inputs))[:12]}…)"
