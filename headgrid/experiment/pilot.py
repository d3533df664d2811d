"""The pilot: how many turns make a block, and in which band the machine does work that never changes.

A block is to be so long that the next one knows little of it, and that reading a clock is nothing beside it. Before the
first timed block the baseline runs some turns back to back. The integrated autocorrelation time of their log times,
tau = 1/2 + sum of the autocorrelations at lags 1 to W, in turns, is taken with Sokal's window: the smallest W that is
at least 5 tau (A. Sokal, "Monte Carlo methods in statistical mechanics: foundations and new algorithms", 1996, section
3; N. Madras and A. Sokal, J. Stat. Phys. 50, 109, 1988). Independent turns have 1/2. The rule is declared in the
design, its outcome is in the journal.

What two dozen turns can show is little: autocorrelations have a SD of 0.2 there, and nothing that changes more slowly
than the pilot lasts is seen at all. So tau counts only where the first autocorrelation is beyond chance, and intervals
go on allowing for blocks that depend (`confidence`). No torch in here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from statistics import fmean, median
from typing import Any, NamedTuple

from headgrid.errors import InvalidInput
from headgrid.experiment.records import Record
from headgrid.experiment.sentinel_bands import BAND_MADS, KINDS, Band, band

WINDOW = 5.0
"""Sokal's c: W >= c tau. Where correlations decay exponentially the bias is about exp(-c), the SD of the estimate tau
times sqrt(2 (2 W + 1) / n)."""
MOST_LAGS = 1000
"""In a series that only drifts no window would end before."""
INDEPENDENT = 0.5
"""The time of independent turns, and the least that is told: of turns that alternate it is smaller, and asks for
nothing."""
SHOWN_Z, LEAST_SERIES = 2.0, 12
"""The first autocorrelation of so many turns at least is beyond chance at 2/sqrt(n) (Bartlett; 2.3 % by chance)."""

FEW_READINGS = 80.0
"""Bands of n readings have 5 (1 + 80/n^2) SDs: of Gaussian noise one reading in a thousand is out, whether n is 7 or 25
(simulated); at 5 SDs it would be one in 60 of 8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotRule:
    """What is decided by it, declared before anything runs. Durations in seconds."""

    turns: int = 24
    least_turns: int = 2
    least_readings: int = 7
    """Of sentinels, those of the warm-up among them: of fewer there is no band."""
    most_s: float = 5.0
    """Only so many turns as fit, by the first one's time, but `least_turns`, and as many as the readings take."""
    block_s: float = 0.25
    """A block takes so long at least."""
    taus: float = 10.0
    """And so many autocorrelation times."""
    most_block_s: float = 1.0
    """But no longer than this, or than one turn."""
    most_turns: int = 64
    rerun_share: float = 0.25
    """Of a launch's blocks, how many may be run again."""

    def __post_init__(self) -> None:
        """Raise InvalidInput for a rule that decides nothing."""
        if not 0 < self.block_s <= self.most_block_s < math.inf:
            raise InvalidInput(
                f"a block of {self.block_s:g} s at least and {self.most_block_s:g} s at most",
                legal=("--block-seconds 0.25", "--block-seconds 0 for no pilot"),
            )
        if not 2 <= self.least_turns <= self.turns or self.most_turns < 1 or not 0 <= self.rerun_share <= 1:
            raise InvalidInput(f"a pilot of {self.least_turns} to {self.turns} turns, blocks of {self.most_turns}")

    def turns_due(self, first_s: float, readings: int) -> int:
        """Turns of the pilot whose first one took so long, in front of which there were so many readings."""
        fitting = int(self.most_s / first_s) if first_s <= self.most_block_s else 0
        return min(self.turns, max(self.least_turns, self.least_readings - readings, fitting))

    def reruns(self, blocks: int) -> int:
        """How many of a launch's blocks may be run again."""
        return int(self.rerun_share * blocks)


class Settled(NamedTuple):
    """What the pilot decides, and by what. `capped`: the length or the dependence asked for more turns than may be."""

    turn_s: float
    tau_int: float
    tau_shown: bool
    turns: int
    capped: bool


def rule_of(design: Mapping[str, Any]) -> PilotRule | None:
    """The rule in a design's JSON form; None where there was to be no pilot, as in all older ones."""
    declared = design.get("pilot")
    return PilotRule(**declared) if declared else None


def tau_int(values: Sequence[float]) -> float:
    """Integrated autocorrelation time of a series, in its steps; INDEPENDENT at least, and where there is no spread."""
    mean = fmean(values) if values else 0.0
    off = [value - mean for value in values]
    spread = sum(value * value for value in off)
    tau = INDEPENDENT
    for lag in range(1, min(MOST_LAGS, len(off) // 2) + 1) if spread else ():
        tau += sum(map(mul, off, off[lag:])) / spread
        if lag >= WINDOW * tau:
            break
    return max(INDEPENDENT, tau)


def is_shown(values: Sequence[float]) -> bool:
    """Whether a series' values depend on one another beyond chance."""
    if len(values) < LEAST_SERIES:
        return False
    mean = fmean(values)
    off = [value - mean for value in values]
    spread = sum(value * value for value in off)
    return sum(map(mul, off, off[1:])) > SHOWN_Z / math.sqrt(len(values)) * spread


def settle(rule: PilotRule, prefill_s: Sequence[float], decode_s: Sequence[float]) -> Settled:
    """From the pilot's turns, in seconds of the slowest rank: the turns of every block that is then timed."""
    times = [prefill + decode for prefill, decode in zip(prefill_s, decode_s, strict=True)]
    logs = [math.log(seconds) for seconds in times]
    turn_s, tau, shown = round(median(times), 9), round(tau_int(logs), 6), is_shown(logs)
    wanted = max(math.ceil(rule.block_s / turn_s), math.ceil(rule.taus * tau) if shown else 1)
    most = max(1, min(rule.most_turns, int(rule.most_block_s / turn_s)))
    return Settled(turn_s, tau, shown, min(wanted, most), wanted > most)


def pilot_of(records: Sequence[Record]) -> Record | None:
    """The pilot's record; the first one is what counts."""
    return next((record for record in records if record["kind"] == "pilot"), None)


def pilot_bands(rule: PilotRule, pilot: Record) -> dict[str, Band]:
    """The bands that the readings up to the pilot's end give, by which blocks are run again; of too few none.

    They are wider the fewer the readings: the median deviation of a dozen is often far too small.
    """
    number = min(len(pilot["sentinels"][kind]) for kind in KINDS)
    if number < rule.least_readings:
        return {}
    mads = BAND_MADS * (1 + FEW_READINGS / number**2)
    return {kind: band(pilot["sentinels"][kind], mads) for kind in KINDS}


def out_of_band(bands: Mapping[str, Band], read: Sequence[Mapping[str, Sequence[float]]]) -> list[tuple[str, float]]:
    """Of readings, each of all ranks: the sentinels whose slowest rank is out of its band, and its time over the
    median.
    """
    slowest = [(kind, limits, max(reading[kind])) for reading in read for kind, limits in bands.items()]
    return [(kind, s / limits.median_s) for kind, limits, s in slowest if not limits.low_s <= s <= limits.high_s]
