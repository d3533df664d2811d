"""Reading a journal's records: which count, what an arm's blocks took, whether a run is complete."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal, NamedTuple

Record = Mapping[str, Any]
Phase = Literal["prefill", "decode"]

MIN_LAUNCHES = 5
"""Launches from which on an interval is over launches and thus speaks about another launch, too."""


class BlockKey(NamedTuple):
    """Arms that ran in the same block share this key."""

    launch: int
    block: int


Times = Mapping[BlockKey, float]


def block_times(records: Iterable[Record], arm: str, phase: Phase) -> dict[BlockKey, float]:
    """Seconds of each timed block of `arm` (`slowest_s`). Blocks without a time from every rank are left out."""
    times: dict[BlockKey, float] = {}
    for record in of_kind(latest_attempts(records), "block", arm):
        seconds = slowest_s(record, phase)
        if seconds is not None and not record.get("warmup"):
            times.setdefault(BlockKey(record["launch"], record["block"]), seconds)
    return times


def slowest_s(block: Record, phase: Phase) -> float | None:
    """A block's time of a phase: the slowest rank's, of several turns the mean of each one's slowest; None if a rank
    has none.
    """
    ranks: list[Any] = block.get(f"{phase}_s") or [None]
    if not all(seconds is not None and math.isfinite(seconds) and seconds > 0 for seconds in ranks):
        return None
    return fmean(block["turns"][f"{phase}_s"]) if block.get("turns") else max(ranks)


def turns_s(block: Record, phase: Phase) -> Sequence[float]:
    """The slowest rank's seconds of each turn of a block; of one turn in journals that do not tell turns."""
    return block["turns"][f"{phase}_s"] if block.get("turns") else [max(block[f"{phase}_s"])]


def by_launch(values: Mapping[BlockKey, float]) -> dict[int, list[float]]:
    """The values of each launch, both in ascending order of their index."""
    groups: dict[int, list[float]] = {}
    for key in sorted(values):
        groups.setdefault(key.launch, []).append(values[key])
    return groups


def latest_attempts(records: Iterable[Record]) -> list[Record]:
    """The records without blocks that were done again, by a resumed run or on the sentinels' word: a block's arms must
    come from the same processes and the same try.
    """
    kept = list(records)
    last: dict[BlockKey, tuple[int, int]] = {}
    for record in of_kind(kept, "block"):
        key = BlockKey(record["launch"], record["block"])
        last[key] = max(last.get(key, (0, 0)), _try(record))

    def stale(record: Record) -> bool:
        return record["kind"] == "block" and _try(record) < last[BlockKey(record["launch"], record["block"])]

    return [record for record in kept if not stale(record)]


def _try(block: Record) -> tuple[int, int]:
    return block.get("attempt", 0), block.get("retry", 0)


def first_tries(records: Iterable[Record]) -> list[Record]:
    """The records as if nothing had been run again on the sentinels' word."""
    return [record for record in records if record["kind"] != "block" or not record.get("retry", 0)]


def of_kind(records: Iterable[Record], kind: str, arm: str | None = None) -> Iterator[Record]:
    """The records of one kind, of one arm or of all."""
    return (record for record in records if record["kind"] == kind and (arm is None or record["arm"] == arm))


def last_of(records: Iterable[Record]) -> Record | None:
    """The newest of some records, or None."""
    return next(iter(list(records)[-1:]), None)


def is_verified(records: Sequence[Record], arm: str) -> bool:
    """Whether the arm was checked against the reference at least once and passed every time."""
    verdicts = [record["verified"] is True for record in of_kind(records, "verify", arm)]
    return bool(verdicts) and all(verdicts)


def missing_blocks(design: Mapping[str, Any], records: Sequence[Record]) -> tuple[int, int]:
    """How many timed blocks of verified arms the journal lacks, and how many the design asks for."""
    labels = [arm["label"] for arm in design["arms"] if is_verified(records, arm["label"])]
    asked = len(labels) * design["launches"] * design["blocks"]
    there = sum(
        len(block_times(records, label, "prefill").keys() & block_times(records, label, "decode").keys())
        for label in labels
    )
    return max(0, asked - there), asked


def is_complete(design: Mapping[str, Any], records: Sequence[Record]) -> bool:
    """Whether the run said that it ended, every arm was checked, and no block of a verified arm is missing."""
    end = last_of(of_kind(records, "end"))
    checked = {record["arm"] for record in of_kind(records, "verify")}
    every_arm = all(arm["label"] in checked for arm in design["arms"])
    return end is not None and end["completed"] is True and every_arm and missing_blocks(design, records)[0] == 0


def done_blocks(records: Sequence[Record], index: int) -> list[int]:
    """The timed blocks of launch `index` that ran all verified arms in the same processes.

    A block that was cut is done again: half of it in other processes would not be a pair. So is one that was cut when
    it was run again. Warm-up always is.
    """
    mine = [record for record in records if record["launch"] == index]
    verified = {record["arm"] for record in mine if record["kind"] == "verify" and record["verified"]}
    arms: dict[tuple[int, tuple[int, int]], set[str]] = {}
    for record in mine:
        if record["kind"] == "block" and not record["warmup"]:
            arms.setdefault((record["block"], _try(record)), set()).add(record["arm"])
    left = {(record["block"], (record["attempt"], 0)) for record in mine if record["kind"] == "rerun"}
    return sorted({key[0] for key, found in arms.items() if found >= verified and key not in left})


def finished_launches(records: Sequence[Record]) -> set[int]:
    """Launches that came to their end."""
    return {r["launch"] for r in records if r["kind"] == "end" and r["completed"]}
