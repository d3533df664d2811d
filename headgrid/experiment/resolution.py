"""What a run could have seen: did it find the slow-down that was planted in it, and how small a one would it find?

The planted arm is the baseline's layout and engine. After its own timed work each rank waits inside the timed region
until that work's duration has grown by the declared share (`stopwatch`), so every rank's time, and with it the slowest
one's, is that of the work times 1 + share. It proves the path from the ranks' clocks over the journal to the verdict,
at this run's noise. It is no slower kernel or exchange: it does not show what a slow rank does to the others.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


class Ratio(Protocol):
    """A throughput ratio with its interval, as `stats.Estimate` has them."""

    @property
    def mean(self) -> float:
        """The ratio."""
        ...

    @property
    def ci95(self) -> tuple[float, float] | None:
        """Its interval."""
        ...


class Slowdown(NamedTuple):
    """How much more time than the baseline: a share, and its 95 % interval."""

    share: float
    ci95: tuple[float, float] | None


def slowdown(ratio: Ratio) -> Slowdown:
    """Of a throughput ratio over the baseline."""
    interval = ratio.ci95 and (1 / ratio.ci95[1] - 1, 1 / ratio.ci95[0] - 1)
    return Slowdown(1 / ratio.mean - 1, interval)


def half_width(ratio: Ratio | None) -> float | None:
    """Half of a ratio's interval, as a share: a difference of more is told from none."""
    if ratio is None or ratio.ci95 is None:
        return None
    return math.expm1((math.log(ratio.ci95[1]) - math.log(ratio.ci95[0])) / 2)


def resolved(planted: float, phase: str, found: Ratio | None, null: Ratio | None) -> dict[str, Any]:
    """One phase: `found` is the planted arm's throughput over the baseline's, `null` the A/A arm's.

    `smallest_detectable` is the larger half width of the two; None without an interval.
    """
    slow = slowdown(found) if found else None
    low, high = slow.ci95 if slow and slow.ci95 else (-math.inf, math.inf)
    known = low > -math.inf
    widths = [width for width in (half_width(found), half_width(null)) if width is not None]
    return {
        "phase": phase,
        "recovered": slow and slow.share,
        "ci95": [low, high] if known else None,
        "excludes_zero": known and not low <= 0 <= high,
        "holds_planted": known and low <= planted <= high,
        "smallest_detectable": max(widths, default=None),
    }


def sentences(resolution: dict[str, Any] | None) -> Sequence[str]:
    """Warnings: where the planted slow-down was not found, or was found but not as large as it is."""
    told: list[str] = []
    for row in resolution["phases"] if resolution else ():
        share = f"{resolution['planted']:.2%}" if resolution else ""
        said = "it was not measured"
        if row["ci95"]:
            said = f"it came out as {row['recovered']:+.2%}, {row['ci95'][0]:+.2%} to {row['ci95'][1]:+.2%}"
        if not row["excludes_zero"]:
            told.append(
                f"In {row['phase']} a planted slow-down of {share} was not found ({said}): differences of that size are"
                " invisible in this run."
            )
        elif not row["holds_planted"]:
            told.append(
                f"In {row['phase']} a planted slow-down of {share} was found, but not as large as it is ({said}):"
                " ratios of this run are off by more than their intervals say."
            )
    return told
