"""Communication behind compute: several calls go through a stage at once, and while one waits the next one computes.

A call starts a collective, lets another call go on, and waits for the result when its turn comes again: two
micro-batches in flight, as DeepSeek-V3 does in prefill (DeepSeek-AI 2024, section 3.4.1). Each call is a coroutine of
its own (greenlet), so the functions of a stage and its exchanges read as if a call were alone. All coroutines are one
thread and are left at collectives only: what torch keeps for a thread (inference mode, streams) holds for all of them.

Whose turn it is follows from the numbers of collectives of each call. These are the same on all ranks that share a
layer, so they all start the same collectives in the same order.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from greenlet import getcurrent, greenlet
from torch import Tensor

from headgrid.runtime.collectives import Axis


@dataclass(frozen=True, slots=True)
class Job:
    """One call: `hand_on` takes what `compute` gives. It needs the keys of earlier calls of the same `sequences`."""

    sequences: Hashable
    compute: Callable[[], Tensor]
    hand_on: Callable[[Tensor], None]


class Turns:
    """Runs calls, `at_once` of them at a time, that take turns at the collectives of some axes."""

    def __init__(self, axes: Sequence[Axis], at_once: int) -> None:
        """With `at_once` 1 calls run one after the other, and the axes are left as they are."""
        self.axes, self.at_once = axes, at_once

    def run(self, jobs: Iterable[Job]) -> None:
        """Run all jobs. They begin in their order, and in this order they are handed on, without a collective on the
        axes; at most `at_once` have begun and are not handed on, no two of them of the same sequences.

        Not where gradients are wanted.
        """
        if self.at_once == 1:
            for job in jobs:
                job.hand_on(job.compute())
            return
        with self._overlapped():
            self._alternate(deque(jobs))

    @contextmanager
    def _overlapped(self) -> Iterator[None]:
        for axis in self.axes:
            axis.meanwhile = _let_others_go_on
        try:
            yield
        finally:
            for axis in self.axes:
                axis.meanwhile = None

    def _alternate(self, waiting: deque[Job]) -> None:
        under_way: deque[_UnderWay] = deque()  # the oldest first
        turns: deque[_UnderWay | None] = deque([None] * self.at_once)
        while waiting or under_way:
            call = turns.popleft()
            if call is not None:
                call.go_on()
            if call is None or call.has_ended:
                while under_way and under_way[0].has_ended:
                    under_way.popleft().hand_on()
                call = self._begun(waiting, under_way)  # at once: its turn is now
            turns.append(call)

    def _begun(self, waiting: deque[Job], under_way: deque["_UnderWay"]) -> "_UnderWay | None":
        """The next job, at its first collective, if it may begin."""
        if not waiting or len(under_way) == self.at_once:
            return None
        if any(call.job.sequences == waiting[0].sequences for call in under_way):
            return None
        call = _UnderWay(waiting.popleft())
        under_way.append(call)
        call.go_on()
        return call


class _UnderWay:
    """A call that has begun."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._steps = greenlet(job.compute)
        self._result: Tensor | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the result is there."""
        return self._steps.dead

    def go_on(self) -> None:
        """To the next collective, or to the end. Raises what the call raises."""
        if not self.has_ended:
            self._result = self._steps.switch()

    def hand_on(self) -> None:
        """Pass the result on, once."""
        result, self._result = self._result, None
        assert result is not None
        self.job.hand_on(result)


def _let_others_go_on() -> None:
    """Back to `go_on`; returns at the next one."""
    turns = getcurrent().parent
    assert turns is not None, "a collective that is no call's"
    turns.switch()
