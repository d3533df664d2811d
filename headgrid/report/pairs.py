"""Every arm against every other: what the run compared as it had declared, and what nobody had asked for."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from headgrid.experiment.multiplicity import claimed
from headgrid.experiment.records import Phase, Record, block_times
from headgrid.experiment.stats import PHASES, throughput_ratio, verdict
from headgrid.report import format as fmt
from headgrid.report.marks import sign, signed

DECLARED, EXPLORATORY = "declared", "exploratory"
HEAD = ("Phase", "Throughput ratio", "95 % CI", "Verdict", "n", "Comparison")
NOTE = (
    "Ratio of throughputs, first arm over second: above 1 the first is faster. Declared: one of the comparisons"
    " that are judged jointly, with the verdict that they may be quoted with. Exploratory: computed from the same"
    " blocks in the same way, but judged alone; of many such pairs some differ by chance."
)
_SWAPPED = {"faster": "slower", "slower": "faster"}
Row = tuple[str, str, str, str, str]
Square = list[list[Row | None]]


def every_pair(
    summary: Mapping[str, Any], records: Sequence[Record], margin: float, analysis: int
) -> dict[str, Square]:
    """For each phase a square: at [a][b] ratio, 95 % interval, verdict, n with its unit, and how it came about.
    `margin` and `analysis` are the design's.

    Arms by their numbers in the summary; None on the diagonal. All texts, so that no script computes a figure. Pairs of
    the summary are copied from it, and one the other way round is its inverse: the intervals are symmetric in the
    logarithm.
    """
    count = len(summary["arms"])
    squares: dict[str, Square] = {phase: [[None] * count for _ in range(count)] for phase in PHASES}
    numbers = {arm["label"]: number for number, arm in enumerate(summary["arms"])}
    for phase in PHASES:
        for row, how in _rows(summary, records, phase, (margin, analysis)):
            a, b, mark = numbers[row["a"]], numbers[row["b"]], sign(summary, phase, row["a"], row["b"])
            squares[phase][a][b] = _texts(row, how, mark)
            squares[phase][b][a] = _texts(_inverse(row), how, mark)
    return squares


def _rows(
    summary: Mapping[str, Any], records: Sequence[Record], phase: Phase, declared_with: tuple[float, int]
) -> Iterator[tuple[Mapping[str, Any], str]]:
    margin, analysis = declared_with
    declared = [row for row in summary["comparisons"] if row["phase"] == phase]
    yield from ((row, EXPLORATORY if row.get("family") == "exploratory" else DECLARED) for row in declared)
    known = {frozenset((row["a"], row["b"])) for row in declared}
    verified = {arm["label"]: arm["verified"] for arm in summary["arms"]}
    times = {label: block_times(records, label, phase) if verified[label] else {} for label in verified}
    for a, b in combinations(verified, 2):
        if frozenset((a, b)) not in known:
            found = throughput_ratio(times[a], times[b], analysis)
            figures = {"ratio": found.mean, "ci95": found.ci95, "unit": found.unit, "n": found.n} if found else _UNKNOWN
            yield {"a": a, "b": b, **figures, "verdict": verdict(figures["ci95"], margin)}, EXPLORATORY


_UNKNOWN: Mapping[str, Any] = {"ratio": None, "ci95": None, "unit": None, "n": 0}


def _inverse(row: Mapping[str, Any]) -> dict[str, Any]:
    ratio, ci95 = row["ratio"], row["ci95"]
    turned = {"ratio": ratio and 1 / ratio, "ci95": ci95 and [1 / ci95[1], 1 / ci95[0]]}
    said = {key: _SWAPPED.get(row[key], row[key]) for key in ("verdict", "verdict_holm") if row.get(key)}
    return {**row, **turned, **said}


def _texts(row: Mapping[str, Any], how: str, mark: str) -> Row:
    ratio, ci95 = fmt.ratio(row["ratio"], row["ci95"])
    units = f"{row['n']} ({row['unit']})" if row["unit"] else str(row["n"])
    return signed(ratio, mark), ci95, claimed(row), units, how
