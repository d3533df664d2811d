"""The tables of times: the seed's, filled with our figures, and every block."""

from collections.abc import Mapping, Sequence
from typing import Any

from headgrid.experiment.multiplicity import claimed
from headgrid.experiment.records import BlockKey, Phase, Record, block_times
from headgrid.experiment.stats import PHASES, SEED_LABEL
from headgrid.report import format as fmt
from headgrid.report.format import NOT_MEASURED
from headgrid.report.marks import LEGEND, sign, signed
from headgrid.report.naming import names
from headgrid.report.resolving import interval_of, jointly, verdict
from headgrid.report.table import Cell, Table, arm_cell, cells, name_cell

Summary = Mapping[str, Any]


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
        rows.append([arm_cell(arm), *cells(texts)])
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


VERDICT_CSS = {"faster": "good", "slower": "bad"}


def _comparison(row: Mapping[str, Any], called: Mapping[str, str], mark: str) -> list[Cell]:
    changes = (row["ratio"] - 1, 1 / row["ratio"] - 1) if row["ratio"] else (None, None)
    seed, (ratio, ci95) = row["seed_statistics"], fmt.ratio(row["ratio"], row["ci95"])
    texts = (signed(ratio, mark), ci95, *(fmt.change(change) for change in changes))
    return [
        Cell(f"{called[row['a']]} / {called[row['b']]}", "name", arms=(row["a"], row["b"])),
        *cells(texts),
        Cell(verdict(row), VERDICT_CSS.get(claimed(row), "")),
        *cells([str(row["n"])]),
        *cells((fmt.p_value(seed["p_value"]), fmt.fixed(seed["cohens_d"], 2)), "number distrusted"),
    ]


def all_blocks(labels: Mapping[str, str], records: Sequence[Record], phase: Phase) -> Table:
    """Every timed block's time in ms, as the statistics use it; `labels` of arms, and what they are called."""
    times = {label: block_times(records, label, phase) for label in labels}
    keys: list[BlockKey] = sorted({key for series in times.values() for key in series})
    rows = [
        [
            name_cell(f"launch {key.launch}, block {key.block}"),
            *cells(
                fmt.significant(series[key] * 1e3, 6) if key in series else NOT_MEASURED for series in times.values()
            ),
        ]
        for key in keys
    ]
    title, head = f"Time of every {phase} block, ms (slowest rank)", ("Block", *labels.values())
    return Table(title, head, rows, level=4, columns=("", *labels))
