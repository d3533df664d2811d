"""Numbers as a reader wants them: units, sensible digits, and "not measured" for what is unknown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

NOT_MEASURED = "not measured"
MINUS = "\N{MINUS SIGN}"
SPACE = "\N{NO-BREAK SPACE}"
PER_CENT = f"{SPACE}%"
TIMES = "\N{MULTIPLICATION SIGN}"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def known(value: Any) -> TypeGuard[float]:
    """Whether `value` is a number that can be printed."""
    return isinstance(value, int | float) and math.isfinite(value)


def fixed(value: float | None, decimals: int) -> str:
    """`value` with thousands separators and so many decimals; negative ones round before the point."""
    if not known(value):
        return NOT_MEASURED
    return f"{round(value, decimals):,.{max(0, decimals)}f}".replace("-", MINUS)


def decimals_for(value: float, digits: int) -> int:
    """Decimals that show `value` with so many significant digits (negative: places before the point)."""
    return digits - 1 - math.floor(math.log10(abs(value))) if value else digits - 1


def significant(value: float | None, digits: int = 3) -> str:
    """`value` with so many significant digits, never in exponential notation, whole numbers in full."""
    if not known(value):
        return NOT_MEASURED
    return fixed(value, max(0, decimals_for(value, digits))) if value else "0"


def scientific(value: float | None) -> str:
    """Two significant digits and a power of ten: 4.5 x 10^-7."""
    if not known(value):
        return NOT_MEASURED
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    power = str(int(exponent)).translate(SUPERSCRIPTS)
    return f"{mantissa.replace('-', MINUS)}{SPACE}{TIMES}{SPACE}10{power}"


def percent(value: float | None, digits: int = 2) -> str:
    """A share as per cent with `digits` significant digits."""
    if not known(value):
        return NOT_MEASURED
    return f"{significant(value * 100, digits)}{PER_CENT}"


def change(value: float | None) -> str:
    """A relative change as per cent with its sign and two decimals."""
    if not known(value):
        return NOT_MEASURED
    return f"{value * 100:+,.2f}{PER_CENT}".replace("-", MINUS)


def p_value(value: float | None) -> str:
    """A probability, as tables print it."""
    if not known(value):
        return NOT_MEASURED
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def interval(ci95: Sequence[float] | None, decimals: int) -> str:
    """Both ends of an interval with the same decimals."""
    return f"{fixed(ci95[0], decimals)} to {fixed(ci95[1], decimals)}" if ci95 else NOT_MEASURED


def spread_decimals(mean: float, spread: float) -> int:
    """Decimals that show `spread` with two significant digits, within three and six of those of the mean."""
    finest = decimals_for(mean, 6)
    return max(decimals_for(mean, 3), min(finest, decimals_for(spread, 2) if spread else finest))


def figures(column: Sequence[Mapping[str, Any] | None], scale: float = 1.0) -> list[tuple[str, str, str]]:
    """Mean, 95 % interval and SD of each figure of a column times `scale`, all with the same decimals."""
    found = [values for values in column if values]
    decimals = max((spread_decimals(v["mean"] * scale, _spread(v) * scale) for v in found), default=0)
    return [_figure(values, scale, decimals) for values in column]


def _figure(values: Mapping[str, Any] | None, scale: float, decimals: int) -> tuple[str, str, str]:
    if values is None:
        return NOT_MEASURED, NOT_MEASURED, NOT_MEASURED
    ci95 = [edge * scale for edge in values["ci95"]] if values["ci95"] else None
    sd = None if values["sd"] is None else values["sd"] * scale
    return fixed(values["mean"] * scale, decimals), interval(ci95, decimals), fixed(sd, decimals)


def _spread(values: Mapping[str, Any]) -> float:
    """Half the interval, or the SD without one, or 0."""
    return (values["ci95"][1] - values["ci95"][0]) / 2 if values["ci95"] else values["sd"] or 0.0


def ratio(value: float | None, ci95: Sequence[float] | None) -> tuple[str, str]:
    """A throughput ratio and its interval."""
    return fixed(value, 4), interval(ci95, 4)


BYTE_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def byte_unit(largest: float) -> tuple[str, int]:
    """The largest unit of which `largest` makes at least one."""
    return next(((name, size) for name, size in BYTE_UNITS if largest >= size), BYTE_UNITS[-1])


def size(value: float | None) -> str:
    """Bytes in their own unit, three significant digits."""
    if not known(value):
        return NOT_MEASURED
    name, unit = byte_unit(value)
    return f"{significant(value / unit)} {name}"


def duration(seconds: float | None) -> str:
    """Seconds in s, ms or µs, three significant digits."""
    if seconds is None or not known(seconds):
        return NOT_MEASURED
    for name, unit in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= unit:
            return f"{significant(seconds / unit)} {name}"
    return f"{significant(seconds / 1e-6)} µs"


def ranks(numbers: Sequence[int]) -> str:
    """A list of ranks, runs of neighbours joined: 0 to 7, 12."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def plain(value: Any, *, unset: str = NOT_MEASURED) -> str:
    """Any value of a JSON document as text; a list of equal items is counted."""
    if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
        return unset
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        items = [plain(item) for item in value]
        if len(items) > 1 and len(set(items)) == 1:
            return f"{len(items)} {TIMES} {items[0]}"
        return ", ".join(items) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{value:.6g}"
    return str(value)
