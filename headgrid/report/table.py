"""A table of a report as a value: cells with their classes in the style sheet."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from headgrid.report.format import NOT_MEASURED
from headgrid.report.naming import named

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


def cells(texts: Iterable[str], css: str = "number") -> list[Cell]:
    """Of numbers, unless `css` says otherwise; what was not measured is marked."""
    return [Cell(text, f"{css} unknown" if text == NOT_MEASURED else css) for text in texts]


def name_cell(text: str) -> Cell:
    """Names a row."""
    return Cell(text, "name")


def arm_cell(arm: Mapping[str, Any], rowspan: int = 1) -> Cell:
    """Names the rows of an arm, as the summary has it."""
    return Cell(named(arm), "name", rowspan, (arm["label"],))


def yes_or_no(value: bool | None) -> Cell:
    """What must be yes."""
    if value is None:
        return Cell(NOT_MEASURED, "unknown")
    return Cell("yes", "good") if value else Cell("NO", "bad")
