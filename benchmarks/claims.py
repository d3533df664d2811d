"""Writes docs/seed-claims.md: each claim of the seed experiment against this folder's journals and against physics.

`python benchmarks/claims.py` (no GPU, seconds). What is claimed, and which formulas it is held against, is data in
seed_claims.toml; figures come from the journals (by `experiment.stats`, not from their summaries), from the layouts'
predictions and from constants that name their source. Nothing measured is typed in here or there.
"""

import argparse
import ast
import math
import operator
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from claim_quantities import Figure, Quantities, at

HERE = Path(__file__).parent
CLAIMS, PAGE = HERE / "seed_claims.toml", HERE.parent / "docs" / "seed-claims.md"
TOLERANCE = 0.05
IMPOSSIBLE, REPRODUCED, BEATEN, NOT_REPRODUCED, NOT_TESTED = (
    "impossible as stated",
    "reproduced",
    "beaten",
    "not reproduced",
    "not tested",
)
HOLDS: dict[str, Callable[[float, float, float], bool]] = {
    "<=": lambda claim, bound, _: claim <= bound,
    ">=": lambda claim, bound, _: claim >= bound,
    "==": lambda claim, bound, tolerance: abs(claim - bound) <= tolerance * abs(bound),
}
WORDS = {"<=": "at most", ">=": "at least", "==": "equal to"}


# --- formulas ---------------------------------------------------------------------------------------------------------

_OPERATORS: dict[type, tuple[Callable[[float, float], float], str, int]] = {
    ast.Add: (operator.add, "+", 1),
    ast.Sub: (operator.sub, "-", 1),
    ast.Mult: (operator.mul, "x", 2),
    ast.Div: (operator.truediv, "/", 2),
    ast.Pow: (operator.pow, "^", 3),
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"sqrt": math.sqrt, "abs": abs, "max": max}


def compute(formula: str, known: Mapping[str, Figure]) -> Figure:
    """The formula's value. With one uncertain quantity, in which it is monotone, its interval is passed through."""
    tree = ast.parse(formula, mode="eval").body
    names = named(formula, known)
    uncertain = [name for name in names if known[name].ci95]
    value = _value(tree, known)
    halves = any(isinstance(node, ast.Name) and node.id == "half" for node in ast.walk(tree))
    if len(uncertain) != 1 or halves:
        return Figure(value)
    ends = [_value(tree, {**known, uncertain[0]: Figure(end)}) for end in known[uncertain[0]].ci95 or ()]
    return Figure(value, (min(ends), max(ends)))


def named(formula: str, known: Mapping[str, Figure]) -> list[str]:
    """The quantities that the formula names, in its order."""
    every = ast.walk(ast.parse(formula, mode="eval"))
    return list(dict.fromkeys(node.id for node in every if isinstance(node, ast.Name) and node.id in known))


def _value(node: ast.expr, known: Mapping[str, Figure]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name(id=name):
            return known[name].value
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)][0](_value(left, known), _value(right, known))
        case ast.Call(func=ast.Name(id="half"), args=[ast.Name(id=name)]):
            return half_width(known[name])
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _FUNCTIONS[name](*(_value(argument, known) for argument in arguments))
    raise ValueError(f"no arithmetic: {ast.unparse(node)}")


def half_width(figure: Figure) -> float:
    """Half the interval, relative to the value."""
    if figure.ci95 is None:
        raise ValueError(f"{figure.source} has no interval")
    return (figure.ci95[1] - figure.ci95[0]) / 2 / abs(figure.value)


def arithmetic(formula: str, known: Mapping[str, Figure]) -> str:
    """The formula with its quantities' values in place of their names."""
    return _written(ast.parse(formula, mode="eval").body, known, 0)


def _written(node: ast.expr, known: Mapping[str, Figure], outer: int) -> str:
    match node:
        case ast.BinOp(left=left, op=op, right=right):
            _, sign, level = _OPERATORS[type(op)]
            text = f"{_written(left, known, level)} {sign} {_written(right, known, level + (sign in '-/'))}"
            return f"({text})" if level < outer else text
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return f"{name}({', '.join(_written(argument, known, 0) for argument in arguments)})"
    return number(_value(node, known))


def number(value: float) -> str:
    """Four significant digits, in full where that is readable."""
    if value and not 1e-3 <= abs(value) < 1e7:
        digits, _, exponent = f"{value:.3e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    decimals = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


# --- verdicts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A claim with everything computed that the page says about it."""

    claim: Mapping[str, Any]
    value: float
    evidence: tuple[Figure, ...]
    bounds: tuple[tuple[float, bool], ...]

    @cached_property
    def judge(self) -> tuple[Mapping[str, Any], Figure] | None:
        """The evidence that decides."""
        listed = self.claim.get("evidence", ())
        first = listed[0] if listed else {"judges": False}
        return (first, self.evidence[0]) if first.get("judges", True) else None

    @property
    def is_possible(self) -> bool:
        """Whether all bounds hold. Of those that are `reading`s of an ambiguous claim, one is enough."""
        listed = zip(self.claim.get("bounds", ()), self.bounds, strict=True)
        held = [(bound.get("reading", False), holds) for bound, (_, holds) in listed]
        readings = [holds for reading, holds in held if reading]
        return all(holds for reading, holds in held if not reading) and (not readings or any(readings))

    @property
    def verdict(self) -> str:
        """Bounds first; then the evidence, equal within TOLERANCE, or on the better or the worse side."""
        if not self.is_possible:
            return IMPOSSIBLE
        if "verdict" in self.claim:
            return self.claim["verdict"]
        if self.judge is None:
            return NOT_TESTED
        found = self.judge[1].value
        if abs(found - self.value) <= TOLERANCE * abs(self.value):
            return REPRODUCED
        better = {"higher": found > self.value, "lower": found < self.value, "same": False}[self.claim["better"]]
        return BEATEN if better else NOT_REPRODUCED

    @property
    def shown(self) -> str:
        """The verdict, saying so where it rests on something that was not measured itself."""
        entry = self.judge[0] if self.judge else {"kind": "measured"}
        rests_on = entry.get("caveat", "" if entry["kind"] == "measured" else entry["kind"])
        decided = self.verdict in (REPRODUCED, BEATEN, NOT_REPRODUCED)
        return f"{self.verdict} ({rests_on})" if rests_on and decided else self.verdict


def judge(claim: Mapping[str, Any], known: Mapping[str, Figure]) -> Judged:
    """Compute a claim's value, evidence and bounds."""
    value = compute(claim["value"], known).value
    bounds = []
    for bound in claim.get("bounds", ()):
        limit = compute(bound["formula"], known).value
        bounds.append((limit, HOLDS[bound["holds"]](value, limit, bound.get("tolerance", TOLERANCE))))
    evidence = tuple(compute(entry["formula"], known) for entry in claim.get("evidence", ()))
    return Judged(claim, value, evidence, tuple(bounds))


# --- the page ---------------------------------------------------------------------------------------------------------


def page(claims: Mapping[str, Any], known: Quantities) -> str:
    """The whole of docs/seed-claims.md."""
    judged = [judge(claim, known) for claim in claims["claims"]]
    parts = [_HEAD.format(tolerance=round(100 * TOLERANCE)), _tally(judged)]
    for section in dict.fromkeys(item.claim["section"] for item in judged):
        rows = [_claim_row(item, known) for item in judged if item.claim["section"] == section]
        parts.append(_table(section, ("the seed experiment", "here", "what it must satisfy", "verdict"), rows))
    parts += [f"## The setting\n\nRun `{claims['setting_run']}`, which most figures of 4 GPUs are from."]
    for group in claims["settings"]:
        rows = [_setting_row(row, claims["setting_run"], known) for row in group["rows"]]
        parts.append("#" + _table(group["section"], ("the seed experiment", "here", ""), rows))
    parts.append(_table("Quantities", ("name", "value", "source"), [_quantity_row(n, known[n]) for n in known]))
    return "\n\n".join(parts) + "\n"


_HEAD = """# The seed experiment's claims

Generated by `python benchmarks/claims.py`; do not edit. The claims are in `benchmarks/seed_claims.toml`, figures of
runs come from the journals under `benchmarks/`. "The seed experiment" is the report that this project is to repeat.

- **impossible as stated**: a bound fails that holds on any machine, or the claim contradicts figures beside it.
- **reproduced**: the first figure under "here" is within {tolerance} % of it. **beaten**: on its better side.
  **not reproduced**: on its worse side. In brackets, what that rests on where the same thing was not measured:
  *predicted* is from the layout's formulas for 16 ranks, *derived* is computed from measured figures, not counted.
  What else the brackets say is how far the measured thing is from the claimed one: so many GPUs, and the like.
- **not tested**: nothing here measures it, or not enough to say so.

Nobody here has 16 H100 of two hosts. Figures that were measured or derived are from H200s of one host, 2 or 4 as each
row says, so a speed of a GPU compares two kinds of GPU. Intervals (in brackets, 95 %) are over blocks of one launch, or
over launches where the table of quantities says so. `benchmarks/claim_predictions.py` says how times are predicted.
SUSPECT: the named code marks some of the blocks behind a figure (`run-folder.md` says what each means)."""


def _tally(judged: list[Judged]) -> str:
    order = (IMPOSSIBLE, NOT_REPRODUCED, REPRODUCED, BEATEN, NOT_TESTED)
    counts = [f"{sum(item.verdict == name for item in judged)} {name}" for name in order]
    return f"Of {len(judged)} claims: {', '.join(counts)}."


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _claim_row(item: Judged, known: Quantities) -> tuple[str, ...]:
    claim = item.claim
    words, unit = claim["words"], f" {claim['unit']}" if claim["unit"] else ""
    if not claim["value"].replace(".", "").isdigit():
        words += f": {number(item.value)}{unit}"
    here = [_evidence(*pair, claim, known) for pair in zip(claim.get("evidence", ()), item.evidence, strict=True)]
    here += [claim["because"]] if "because" in claim else []
    must: list[str] = []
    for bound, (limit, holds) in zip(claim.get("bounds", ()), item.bounds, strict=True):
        failed = "" if holds else f"; **{number(item.value)} is not**"
        sum_ = arithmetic(bound["formula"], known)
        equals = f" = {number(limit)}" if sum_ != number(limit) else ""
        either = "or " if must and bound.get("reading") else ""
        must.append(f"{either}{WORDS[bound['holds']]} {sum_}{equals}{unit} ({bound['says']}){failed}")
    return words, "<br>".join(here), "<br>".join(must), item.shown


def _evidence(entry: Mapping[str, Any], figure: Figure, claim: Mapping[str, Any], known: Quantities) -> str:
    """A figure with its interval, what it is of, its arithmetic where that is to be seen, and the GPUs that gave it."""
    text = f"{entry['kind']}: **{number(figure.value)}**{_interval(figure)}{_unit(claim, entry)} {entry['says']}"
    text += f" = {arithmetic(entry['formula'], known)}" if entry.get("arithmetic") else ""
    figures = [known[name] for name in named(entry["formula"], known)]
    codes = sorted({code for figure in figures for code in figure.codes})
    said = list(dict.fromkeys(figure.machine for figure in figures if figure.machine))
    said += [f"SUSPECT: {', '.join(codes)}"] * bool(codes)
    return text + (f" ({'; '.join(said)})" if said else "")


def _unit(claim: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """The claim's unit and a comma; an entry that does not judge says its own unit."""
    return (f" {claim['unit']}" if claim["unit"] else "") + "," if entry.get("judges", True) else ""


def _interval(figure: Figure) -> str:
    return f" [{number(figure.ci95[0])}, {number(figure.ci95[1])}]" if figure.ci95 else ""


def _setting_row(row: Mapping[str, Any], run: str, known: Quantities) -> tuple[str, ...]:
    if "here" not in row:
        return row["words"], row["text"], row.get("note", "")
    found = [_setting(path, run, known) for path in row["here"]]
    same = "the same" if found == row.get("expected") else ""
    said = "; ".join(filter(None, (same, row.get("note", ""))))
    return row["words"], " x ".join(_plain(*pair) for pair in zip(row["here"], found, strict=True)), said


def _setting(path: str, run: str, known: Quantities) -> Any:
    """A field of the run's documents, or the kinds of collectives that an arm issued."""
    document, _, field = path.partition(":")
    if document != "kinds":
        return at(known.run(run).document(document), field)
    arm = known.run(run).arm(field)
    return ", ".join(sorted({f"{op['collective']} over {op['axis']}" for op in arm["traffic"]}))


def _plain(path: str, value: Any) -> str:
    if path.endswith("_bytes"):
        return f"{number(value / 1e9)} GB"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _quantity_row(name: str, figure: Figure) -> tuple[str, ...]:
    return f"`{name}`", number(figure.value) + _interval(figure), figure.source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--runs", type=Path, default=HERE)
    arguments = parser.parse_args()
    claims = tomllib.loads(CLAIMS.read_text(encoding="utf-8"))
    arguments.out.write_text(page(claims, Quantities(claims, arguments.runs)), encoding="utf-8")


if __name__ == "__main__":
    main()
