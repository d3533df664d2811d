"""Numbers as a reader wants them: units, sensible digits, and "not measured" for what is unknown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

NOT_MEASURED = "not measured"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def known(value: Any) -> bool:
    """Whether `value` is a number that can be printed."""
    return isinstance(value, int | float) and math.isfinite(value)


def fixed(value: float | None, decimals: int) -> str:
    """`value` with thousands separators and so many decimals; negative ones round before the point."""
    if value is None or not known(value):
        return NOT_MEASURED
    return f"{round(value, decimals):,.{max(0, decimals)}f}".replace("-", MINUS)


def decimals_for(value: float, digits: int) -> int:
    """Decimals that show `value` with so many significant digits (negative: places before the point)."""
    return digits - 1 - math.floor(math.log10(abs(value))) if value else digits - 1


def significant(value: float | None, digits: int = 3) -> str:
    """`value` with so many significant digits, never in exponential notation, whole numbers in full."""
    if value is None or not known(value):
        return NOT_MEASURED
    return fixed(value, max(0, decimals_for(value, digits)))


def scientific(value: float | None) -> str:
    """Two significant digits and a power of ten: 4.5 x 10^-7."""
    if value is None or not known(value):
        return NOT_MEASURED
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.replace('-', MINUS)} {TIMES} 10{str(int(exponent)).translate(SUPERSCRIPTS)}"


def percent(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A share as per cent with `digits` significant digits; with `sign` also for gains."""
    if value is None or not known(value):
        return NOT_MEASURED
    text = significant(abs(value) * 100, digits)
    return (MINUS if value < 0 else "+" if sign and value > 0 else "") + f"{text} %"


def p_value(value: float | None) -> str:
    """A probability, as tables print it."""
    if value is None or not known(value):
        return NOT_MEASURED
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def interval(ci95: Sequence[float] | None, decimals: int) -> str:
    """Both ends of an interval with the same decimals."""
    return f"{fixed(ci95[0], decimals)} to {fixed(ci95[1], decimals)}" if ci95 else NOT_MEASURED


def figure(values: Mapping[str, Any] | None, scale: float = 1.0) -> tuple[str, str, str]:
    """Mean, 95 % interval and SD of a figure times `scale`.

    The interval's half width, or the SD without one, decides the digits: it is shown with two of its own.
    """
    if values is None:
        return (NOT_MEASURED,) * 3
    ci95 = [edge * scale for edge in values["ci95"]] if values["ci95"] else None
    mean, sd = values["mean"] * scale, values["sd"] * scale if values["sd"] is not None else None
    spread = (ci95[1] - ci95[0]) / 2 if ci95 else sd
    decimals = min(decimals_for(spread, 2) if spread else 99, decimals_for(mean, 6))
    decimals = max(decimals, decimals_for(mean, 3))
    return fixed(mean, decimals), interval(ci95, decimals), fixed(sd, decimals + 1)


def ratio(value: float | None, ci95: Sequence[float] | None) -> tuple[str, str]:
    """A throughput ratio and its interval with three decimals, more if the interval needs them."""
    decimals = 3
    if ci95 and ci95[1] > ci95[0]:
        decimals = min(5, max(3, decimals_for(ci95[1] - ci95[0], 2)))
    return fixed(value, decimals), interval(ci95, decimals)


BYTE_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def byte_unit(largest: float) -> tuple[str, int]:
    """The largest unit of which `largest` makes at least one."""
    return next(((name, size) for name, size in BYTE_UNITS if largest >= size), BYTE_UNITS[-1])


def size(value: float | None) -> str:
    """Bytes in their own unit, three significant digits."""
    if value is None or not known(value):
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
    return str(value)
