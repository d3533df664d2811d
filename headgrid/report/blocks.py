"""Every block of a run as a page shows it: the timed ones, those that warmed up, and what was found about each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headgrid.experiment.records import BlockKey, Phase, Record, block_times, latest_attempts, of_kind, slowest_s
from headgrid.experiment.stats import PHASES
from headgrid.report.format import known

COLUMNS = (
    "arm",
    "launch",
    "block",
    "position",
    "warm_up",
    *(f"{phase}_s" for phase in PHASES),
    *(f"{phase}_start_s" for phase in PHASES),
    "verdict",
    "codes",
)
"""Of the table that a page can export. Arms by number; seconds of the slowest rank; starts in Unix seconds."""
MAX_BLOCKS = 1_500
"""That a page carries and lists: with more, as with the seed's 1000 iterations of each arm, it would be too large."""

Seconds = Mapping[Phase, float | None]


@dataclass(frozen=True, slots=True)
class Block:
    """One arm's turn in one block. `arm`: its number in the summary. Seconds: the slowest rank's, None if unknown."""

    arm: int
    launch: int
    block: int
    position: int | None
    warm_up: bool
    seconds: Seconds
    start_s: Seconds
    verdict: str
    codes: tuple[str, ...]

    @property
    def place(self) -> tuple[int, bool, int]:
        """Where it stands among the blocks of a run: warm-up comes first in its launch."""
        return self.launch, not self.warm_up, self.block

    @property
    def row(self) -> list[Any]:
        """Its COLUMNS."""
        seconds, starts = ([of[phase] for phase in PHASES] for of in (self.seconds, self.start_s))
        codes = " ".join(self.codes)
        fixed = [self.arm, self.launch, self.block, self.position, int(self.warm_up)]
        return [*fixed, *seconds, *starts, self.verdict, codes]


def listed(found: Sequence[Block]) -> bool:
    """Whether there are few enough for a page to carry each of them."""
    return len(found) <= MAX_BLOCKS


def blocks(numbers: Mapping[str, int], records: Sequence[Record], summary: Mapping[str, Any]) -> list[Block]:
    """The blocks of the arms that `numbers` names, arm by arm, each in the order in which its blocks ran.

    Timed ones are those that the statistics use; of the others only warm-ups are here.
    """
    isolation = summary.get("isolation") or {"flagged": []}
    flags = {(row["launch"], row["block"], row["arm"]): row for row in isolation["flagged"]}
    found = []
    for label, number in numbers.items():
        times = {phase: block_times(records, label, phase) for phase in PHASES}
        for record in of_kind(latest_attempts(records), "block", label):
            key, warm_up = BlockKey(record["launch"], record["block"]), bool(record.get("warmup"))
            seconds: Seconds = {p: slowest_s(record, p) if warm_up else times[p].get(key) for p in PHASES}
            if any(value is not None for value in seconds.values()):
                flag = {} if warm_up else flags.get((key.launch, key.block, label), {})
                found.append(_block(number, record, warm_up, seconds, flag))
    return sorted(found, key=lambda block: (block.arm, *block.place))


def _block(number: int, record: Record, warm_up: bool, seconds: Seconds, flag: Mapping[str, Any]) -> Block:
    starts: Seconds = {phase: value if known(value := record.get(f"{phase}_start_s")) else None for phase in PHASES}
    verdict, codes = flag.get("verdict", ""), tuple(flag.get("codes", ()))
    place = record["launch"], record["block"], record.get("position")
    return Block(number, *place, warm_up, seconds, starts, verdict, codes)
