"""Reading a journal's records: which count, what an arm's blocks took, whether a run is complete."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """Seconds of each timed block of `arm`: the slowest rank's. Blocks without a time from every rank are left out."""
    times: dict[BlockKey, float] = {}
    for record in of_kind(latest_attempts(records), "block", arm):
        ranks: list[Any] = record.get(f"{phase}_s") or [None]
        usable = all(seconds is not None and math.isfinite(seconds) and seconds > 0 for seconds in ranks)
        if usable and not record.get("warmup"):
            times.setdefault(BlockKey(record["launch"], record["block"]), max(ranks))
    return times


def by_launch(values: Mapping[BlockKey, float]) -> dict[int, list[float]]:
    """The values of each launch, both in ascending order of their index."""
    groups: dict[int, list[float]] = {}
    for key in sorted(values):
        groups.setdefault(key.launch, []).append(values[key])
    return groups


def latest_attempts(records: Iterable[Record]) -> list[Record]:
    """The records without blocks that a resumed run did again: a block's arms must come from the same processes."""
    kept = list(records)
    last: dict[BlockKey, int] = {}
    for record in of_kind(kept, "block"):
        key = BlockKey(record["launch"], record["block"])
        last[key] = max(last.get(key, 0), record.get("attempt", 0))

    def stale(record: Record) -> bool:
        if record["kind"] != "block":
            return False
        return record.get("attempt", 0) < last[BlockKey(record["launch"], record["block"])]

    return [record for record in kept if not stale(record)]


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

    A block that was cut is done again: half of it in other processes would not be a pair. Warm-up always is.
    """
    mine = [record for record in records if record["launch"] == index]
    verified = {record["arm"] for record in mine if record["kind"] == "verify" and record["verified"]}
    arms: dict[tuple[int, int], set[str]] = {}
    for record in mine:
        if record["kind"] == "block" and not record["warmup"]:
            arms.setdefault((record["block"], record.get("attempt", 0)), set()).add(record["arm"])
    return sorted({block for (block, _), found in arms.items() if found >= verified})


def finished_launches(records: Sequence[Record]) -> set[int]:
    """Launches that came to their end."""
    return {r["launch"] for r in records if r["kind"] == "end" and r["completed"]}
