"""Algebra of half-open intervals of time [start, end), in whole nanoseconds, so that every sum is exact."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

Interval = tuple[int, int]


@dataclass(frozen=True)
class Union:
    """A set of instants as its maximal intervals: disjoint, not touching, in order, none of them empty."""

    intervals: tuple[Interval, ...]

    @cached_property
    def length(self) -> int:
        """Nanoseconds in all."""
        return self._before[-1]

    @cached_property
    def _starts(self) -> list[int]:
        return [start for start, _ in self.intervals]

    @cached_property
    def _before(self) -> list[int]:
        """Length of all intervals ahead of each one, and of all of them."""
        return [0, *accumulate(end - start for start, end in self.intervals)]

    def within(self, start: int, end: int) -> int:
        """Nanoseconds of [start, end) that belong to the set. O(log n)."""
        return max(0, self._until(end) - self._until(start))

    def _until(self, instant: int) -> int:
        """Nanoseconds of the set before an instant."""
        place = bisect_right(self._starts, instant)
        if not place:
            return 0
        start, end = self.intervals[place - 1]
        return self._before[place - 1] + min(instant, end) - start

    def gaps(self, start: int, end: int) -> "Union":
        """What of [start, end) does not belong to the set."""
        found: list[Interval] = []
        free = start
        for one, other in self.intervals:
            if one >= end:
                break
            if one > free:
                found.append((free, one))
            free = max(free, other)
        if free < end:
            found.append((free, end))
        return Union(tuple(found))

    def without(self, other: "Union") -> "Union":
        """What belongs to this set and not to the other one."""
        return union(piece for start, end in self.intervals for piece in _pieces(other, start, end))


def _pieces(other: Union, start: int, end: int) -> Iterable[Interval]:
    """[start, end) without the other set, looking only at what may reach into it."""
    first = max(0, bisect_right(other._starts, start) - 1)
    free = start
    for place in range(first, len(other.intervals)):
        one, then = other.intervals[place]
        if one >= end:
            break
        if one > free:
            yield free, one
        free = max(free, then)
    if free < end:
        yield free, end


def union(intervals: Iterable[Interval]) -> Union:
    """All instants that belong to any of the intervals. Empty ones, and ones that end before they start, have none."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return Union(tuple(merged))


@dataclass(frozen=True, slots=True)
class Account:
    """What became of the time from `start` to the end of the last activity; nanoseconds.

    `compute` covers instants at which something computes, `exposed` those at which something communicates and nothing
    computes, `idle` the gaps at which nothing is active, `hidden` those at which something does either. `lead` is the
    part of `idle` before the first activity.
    """

    compute: int
    exposed: int
    idle: int
    hidden: int
    lead: int
    span: int


def account(start: int, computing: Sequence[Interval], communicating: Sequence[Interval]) -> Account:
    """The account of one device from `start`; what was active before it must not be among the activities."""
    compute, communication = union(computing), union(communicating)
    busy = union([*compute.intervals, *communication.intervals])
    end = busy.intervals[-1][1] if busy.intervals else start
    exposed, idle = communication.without(compute), busy.gaps(start, end)
    lead = busy.intervals[0][0] - start if busy.intervals else 0
    return Account(
        compute.length, exposed.length, idle.length, communication.length - exposed.length, max(0, lead), end - start
    )
