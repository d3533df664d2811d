"""The tables of a report: the seed's, filled with our figures, and those that say whether to believe them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from headgrid.experiment.multiplicity import claimed
from headgrid.experiment.records import BlockKey, Phase, Record, block_times
from headgrid.experiment.stats import MEMORY_PARTS, PHASES, SEED_LABEL
from headgrid.report import format as fmt
from headgrid.report.format import NOT_MEASURED
from headgrid.report.marks import LEGEND, isolation_line, sampling_line, sign, signed
from headgrid.report.naming import named, names
from headgrid.report.resolving import interval_of, jointly, reproducible, verdict
from headgrid.report.resolving import rows as resolving_rows

Summary = Mapping[str, Any]
NOT_APPLICABLE = "\N{EN DASH}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: its text, its class in the style sheet, and how many rows it spans.

    `arms`: labels of those that its row is about, for a cell that names a row. `value`: what to sort by, where the text
    does not tell, as of sizes in several units.
    """

    text: str
    css: str = ""
    rowspan: int = 1
    arms: tuple[str, ...] = ()
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table. A row whose leading cells come from a rowspan above it has fewer cells than the head."""

    title: str
    head: tuple[str, ...]
    rows: list[list[Cell]]
    note: str = ""
    level: int = 3
    columns: tuple[str, ...] = ()
    """Of each column the label of the arm that it is about, or nothing."""
    sortable: bool = True
    """Whether rows can be compared: counters of different kinds cannot."""

    @property
    def groups(self) -> list[tuple[tuple[str, ...], list[list[Cell]]]]:
        """Rows that belong together, as those of one arm, and whose they are: a group begins with a name."""
        found: list[tuple[tuple[str, ...], list[list[Cell]]]] = []
        for row in self.rows:
            if not found or row[0].css == "name":
                found.append((row[0].arms, []))
            found[-1][1].append(row)
        return found

    @property
    def numeric(self) -> frozenset[int]:
        """Columns that hold numbers and are set flush right."""
        full = [row for row in self.rows if len(row) == len(self.head)]
        return frozenset(index for row in full for index, cell in enumerate(row) if "number" in cell.css)


def _cells(texts: Iterable[str], css: str = "number") -> list[Cell]:
    return [Cell(text, f"{css} unknown" if text == NOT_MEASURED else css) for text in texts]


def _name(text: str) -> Cell:
    return Cell(text, "name")


def _arm(arm: Mapping[str, Any], rowspan: int = 1) -> Cell:
    return Cell(named(arm), "name", rowspan, (arm["label"],))


def _yes(value: bool | None) -> Cell:
    if value is None:
        return Cell(NOT_MEASURED, "unknown")
    return Cell("yes", "good") if value else Cell("NO", "bad")


# --- may it be believed ----------------------------------------------------------------------------------------------


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
        row = [Cell(phase), *_cells((*texts, fmt.scientific(figures.get("max_abs_error"))))]
        if number == 0:
            verified = _yes(arm["verified"] if arm["verify"] else None)
            row = [_arm(arm, len(PHASES)), Cell(verified.text, verified.css, len(PHASES)), *row]
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


# --- the seed's tables -----------------------------------------------------------------------------------------------


def performance(summary: Summary) -> Table:
    """Prefill and decode throughput and TPOT of every arm."""
    head = ("Method", "Prefill TPS", "95 % CI", "SD", "Decode TPS", "95 % CI", "TPOT, ms", "95 % CI", "SD", "n")
    arms = summary["arms"]
    prefill, decode = (fmt.figures([arm[f"{phase}_tokens_per_s"] for arm in arms]) for phase in PHASES)
    tpot = fmt.figures([arm["decode_tpot_s"] for arm in arms], 1e3)
    rows = []
    for index, arm in enumerate(arms):
        figure = arm["prefill_tokens_per_s"] or arm["decode_tpot_s"]
        units = str(figure["n"]) if figure else NOT_MEASURED
        marks = [sign(summary, phase, arm["label"]) for phase in PHASES]
        texts = [signed(prefill[index][0], marks[0]), *prefill[index][1:], signed(decode[index][0], marks[1])]
        texts += [decode[index][1], signed(tpot[index][0], marks[1]), *tpot[index][1:], units]
        rows.append([_arm(arm), *_cells(texts)])
    return Table("Performance metrics", head, rows, _performance_note(summary))


def _performance_note(summary: Summary) -> str:
    units = {
        arm[key]["unit"] for arm in summary["arms"] for key in ("prefill_tokens_per_s", "decode_tpot_s") if arm[key]
    }
    over = f" n counts the unit of the intervals: {' or '.join(sorted(units))}." if units else ""
    return (
        "TPS in tokens per second, all ranks together. Prefill TPS = batch times sequence length / time; TPOT = time of"
        f" all decode steps / their number; a block's time is that of its slowest rank.{over}{_legend(summary)}"
    )


def _legend(summary: Summary) -> str:
    labels = [arm["label"] for arm in summary["arms"]]
    return f" {LEGEND}" if any(sign(summary, phase, *labels) for phase in PHASES) else ""


def comparisons(summary: Summary, phase: Phase, margin: float) -> Table:
    """Ratios of throughputs with intervals and verdicts, and the seed's two statistics beside them."""
    head = (
        "Comparison",
        "Throughput ratio",
        "95 % CI",
        "Throughput",
        "Time",
        "Verdict",
        "n",
        "seed's p (not trusted)",
        "seed's d (not trusted)",
    )
    called = names(summary)
    chosen = [row for row in summary["comparisons"] if row["phase"] == phase]
    rows = [_comparison(row, called, sign(summary, phase, row["a"], row["b"])) for row in chosen]
    units = sorted({row["unit"] for row in summary["comparisons"] if row["unit"]})
    note = (
        "Ratio of throughputs, first arm over second: above 1 the first is faster. It is taken inside each block, so"
        f" drift cancels; the interval {interval_of(summary)} over n units ({' or '.join(units) or NOT_MEASURED})."
        f" Margin ±{fmt.percent(margin)}: faster or slower if the whole interval lies beyond it, equivalent if within,"
        f" else inconclusive.{jointly(summary)} The last two columns: {SEED_LABEL}."
    )
    return Table(f"Statistical analysis: {phase}", head, rows, note if phase == PHASES[-1] else "")


def noise_line(summary: Summary) -> str:
    """What this machine makes of two copies of the same arm: no smaller difference than that can be believed."""
    twins = {arm["label"] for arm in summary["arms"] if arm["role"] == "aa"}
    rows = [row for row in summary["comparisons"] if row["a"] in twins and row["ci95"]]
    if not rows:
        return f"Smallest difference that this machine can show: {NOT_MEASURED} (no A/A arm with an interval)."
    bounds = " and ".join(f"{fmt.percent(max(abs(x - 1) for x in row['ci95']))} in {row['phase']}" for row in rows)
    return f"Two copies of {rows[0]['b']} (A/A) differ here by up to {bounds}; smaller differences say nothing."


VERDICT_CSS = {"faster": "good", "slower": "bad"}


def _comparison(row: Mapping[str, Any], called: Mapping[str, str], mark: str) -> list[Cell]:
    changes = (row["ratio"] - 1, 1 / row["ratio"] - 1) if row["ratio"] else (None, None)
    seed, (ratio, ci95) = row["seed_statistics"], fmt.ratio(row["ratio"], row["ci95"])
    texts = (signed(ratio, mark), ci95, *(fmt.change(change) for change in changes))
    return [
        Cell(f"{called[row['a']]} / {called[row['b']]}", "name", arms=(row["a"], row["b"])),
        *_cells(texts),
        Cell(verdict(row), VERDICT_CSS.get(claimed(row), "")),
        *_cells([str(row["n"])]),
        *_cells((fmt.p_value(seed["p_value"]), fmt.fixed(seed["cohens_d"], 2)), "number distrusted"),
    ]


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
        cells = _cells(texts, "number" if number == 0 else "number quiet")
        sized = [replace(cell, value=(values or {}).get(part)) for cell, part in zip(cells, columns, strict=True)]
        row = [Cell(("measured", "predicted")[number]), *sized]
        if number == 0:
            both = measured and predicted and measured["total"] and predicted["total"]
            change = measured["total"] / predicted["total"] - 1 if both else None
            text = fmt.change(change)
            row = [_arm(arm, 2), *row, Cell(text, "number" if both else "number unknown", 2)]
        yield row


def _share(value: float | None, divisor: int) -> str:
    """Bytes in the table's unit; what would be only zeros in it in its own unit."""
    if value and value < divisor / 10_000:
        return fmt.size(value)
    return fmt.significant(value / divisor, 4) if value is not None else NOT_MEASURED


def traffic(summary: Summary, phase: Phase, layers: Mapping[str, int]) -> Table:
    """What every arm sends in one phase, by collective; `layers` = layers on a rank of each layout."""
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
    rows = [row for arm in _without_twins(summary) for row in _traffic_rows(arm, phase, layers.get(arm["layout"]))]
    whole = "one prefill of the whole batch" if phase == "prefill" else "one decode step"
    note = (
        f"Calls, bytes and time are for {whole}. Times are those of the slowest rank in a separate, untimed pass; they"
        " include waiting for other ranks and need not add up to a share of the times above. Messages between stages"
        " and weights gathered ahead travel while a rank computes: a time of their own was not measured."
    )
    return Table(f"Communication breakdown: {phase}", head, rows, note)


def _traffic_rows(arm: Mapping[str, Any], phase: Phase, layers: int | None) -> Iterator[list[Cell]]:
    ops = [op for op in arm["traffic"] if op["phase"] == phase]
    if not ops:  # an arm is verified after its traffic was watched
        yield [
            _arm(arm),
            *_cells(["none issued" if arm["verified"] else NOT_MEASURED] + [NOT_APPLICABLE] * 2, ""),
            *_cells([NOT_APPLICABLE] * 5),
            Cell(NOT_APPLICABLE),
        ]
    total = [_total(ops, key) for key in ("calls", "bytes_per_rank", "time_s")]
    for number, op in enumerate(ops):
        share = layers if op["per_layer"] and layers else None
        row = [Cell(op["collective"]), Cell(op["axis"]), Cell("each layer" if op["per_layer"] else "not per layer")]
        row += _cells((f"{op['calls']:,}", fmt.size(op["bytes_per_rank"]), fmt.duration(op["time_s"])))
        row += _cells((_per(op["bytes_per_rank"], share, fmt.size), _per(op["time_s"], share, fmt.duration)))
        head = [_arm(arm, len(ops) + (len(ops) > 1))] if number == 0 else []
        yield [*head, *row, _yes(op["as_predicted"])]
    if len(ops) > 1:
        texts = (f"{total[0]:,}", fmt.size(total[1]), fmt.duration(total[2]), NOT_APPLICABLE, NOT_APPLICABLE)
        yield [
            Cell("all together", "total"),
            Cell("", "total"),
            Cell("", "total"),
            *_cells(texts, "number total"),
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


def validation(summary: Summary, records: Sequence[Record]) -> Table:
    """The seed's validation checks."""
    launches = [record for record in records if record["kind"] == "launch"]
    inputs = {record["input_sha256"] for record in launches}
    rows = [
        [_name("Numerical accuracy"), Cell(_accuracy(summary))],
        [_name("Reproducibility"), Cell(_spread(summary))],
        [_name("Fairness"), Cell(_fairness(len(launches), inputs))],
        *([_name(name), *_cells([text], "")] for name, text in resolving_rows(summary)),
        [_name("Isolation from other work"), *_cells([isolation_line(summary)], "")],
        [_name("GPU, memory bandwidth and NVLink utilization"), *_cells([sampling_line(summary)], "")],
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


# --- raw -------------------------------------------------------------------------------------------------------------


def all_blocks(labels: Mapping[str, str], records: Sequence[Record], phase: Phase) -> Table:
    """Every timed block's time in ms, as the statistics use it; `labels` of arms, and what they are called."""
    times = {label: block_times(records, label, phase) for label in labels}
    keys: list[BlockKey] = sorted({key for series in times.values() for key in series})
    rows = [
        [
            _name(f"launch {key.launch}, block {key.block}"),
            *_cells(
                fmt.significant(series[key] * 1e3, 6) if key in series else NOT_MEASURED for series in times.values()
            ),
        ]
        for key in keys
    ]
    title, head = f"Time of every {phase} block, ms (slowest rank)", ("Block", *labels.values())
    return Table(title, head, rows, level=4, columns=("", *labels))
