"""Calls that take turns: in what order they begin, start and await collectives, and are handed on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headgrid.runtime.collectives import Axis, Issued
from headgrid.runtime.turns import Job, Turns

CALL = Issued("all_reduce", "tp", 8, overlapped=True)


@dataclass
class Log:
    """What calls do on one rank, in order: ("begin" | "start" | "wait" | "end" | "hand on", call)."""

    axis: Axis = field(default_factory=lambda: Axis("tp", (0, 1), 0, None))
    events: list[tuple[str, int]] = field(default_factory=list)

    def collective(self, call: int) -> None:
        """As the axis runs one, without the others."""

        class Work:
            @staticmethod
            def wait() -> None:
                self.events.append(("wait", call))

        def start(*, async_op: bool = False) -> Work | None:
            self.events.append(("start", call))
            return Work() if async_op else Work.wait()  # type: ignore[func-returns-value]

        self.axis._complete(CALL, start)  # type: ignore[arg-type]

    def job(self, call: int, collectives: int, sequences: object) -> Job:
        def compute() -> Tensor:
            self.events.append(("begin", call))
            for _ in range(collectives):
                self.collective(call)
            self.events.append(("end", call))
            return torch.tensor(call)

        return Job(sequences, compute, self.hand_on)

    def hand_on(self, result: Tensor) -> None:
        self.events.append(("hand on", int(result)))

    def run(self, collectives: Sequence[int], at_once: int, sequences: Sequence[object] = ()) -> list[tuple[str, int]]:
        keys = sequences or range(len(collectives))
        Turns((self.axis,), at_once).run([self.job(k, n, keys[k]) for k, n in enumerate(collectives)])
        assert self.axis.meanwhile is None
        return self.events


def under_way(events: list[tuple[str, int]], first: str = "start", last: str = "wait") -> int:
    """The most that had begun and not ended at a time."""
    now, most = 0, 0
    for what, _ in events:
        now += (what == first) - (what == last)
        most = max(most, now)
    return most


def test_one_call_computes_while_the_other_waits() -> None:
    events = Log().run([2, 2, 1], 2)
    assert events == [
        *[("begin", 0), ("start", 0), ("begin", 1), ("start", 1)],
        *[("wait", 0), ("start", 0), ("wait", 1), ("start", 1)],
        *[("wait", 0), ("end", 0), ("hand on", 0), ("begin", 2), ("start", 2)],
        *[("wait", 1), ("end", 1), ("hand on", 1), ("wait", 2), ("end", 2), ("hand on", 2)],
    ]


def test_one_at_once_is_one_after_the_other() -> None:
    events = Log().run([2, 0, 1], 1)
    assert under_way(events) == 1
    assert [call for _, call in events] == sorted(call for _, call in events)


numbers = st.lists(st.integers(0, 6), max_size=7)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(numbers, st.integers(1, 3), st.data())
def test_any_numbers_of_collectives(collectives: list[int], at_once: int, data: st.DataObject) -> None:
    sequences = [data.draw(st.integers(0, 3)) for _ in collectives]
    events = Log().run(collectives, at_once, sequences)
    calls = list(range(len(collectives)))
    assert [call for what, call in events if what == "begin"] == calls
    assert [call for what, call in events if what == "hand on"] == calls
    assert under_way(events, "begin", "hand on") <= at_once
    assert [sum(event == ("wait", k) for event in events) for k in calls] == collectives
    for k, key in enumerate(sequences):
        for earlier in (j for j in calls[:k] if sequences[j] == key):
            assert events.index(("hand on", earlier)) < events.index(("begin", k)), "keys that are not there yet"


def test_the_oldest_is_handed_on_first_though_it_takes_longer() -> None:
    events = Log().run([5, 1, 1], 2)
    assert events.index(("end", 1)) < events.index(("end", 0)) < events.index(("begin", 2))


class Boom(Exception):
    pass


@pytest.mark.parametrize("at_once", [1, 2])
def test_what_a_call_raises_is_raised_and_the_axes_are_as_before(at_once: int) -> None:
    log = Log()

    def fails() -> Tensor:
        log.collective(1)
        raise Boom

    jobs = [log.job(0, 3, 0), Job(1, fails, log.hand_on)]
    with pytest.raises(Boom):
        Turns((log.axis,), at_once).run(jobs)
    assert log.axis.meanwhile is None


def test_what_torch_keeps_for_a_thread_holds_for_every_call() -> None:
    log = Log()
    seen: list[bool] = []

    def looks(call: int) -> Callable[[], Tensor]:
        def compute() -> Tensor:
            log.collective(call)
            seen.append(torch.is_inference_mode_enabled())
            return torch.tensor(call)

        return compute

    jobs = [Job(k, looks(k), log.hand_on) for k in range(3)]
    with torch.inference_mode():
        Turns((log.axis,), 2).run(jobs)
    Turns((log.axis,), 2).run(jobs)
    assert seen == [True] * 3 + [False] * 3


@pytest.mark.parametrize(("at_once", "takes"), [(1, 24), (2, 13)])
def test_collectives_are_hidden_behind_compute(at_once: int, takes: int) -> None:
    """Four calls compute three times for a tick, and after each a collective takes a tick: of these one is left, the
    last, that has nothing beside it.
    """
    axis, now = Axis("tp", (0, 1), 0, None), 0

    class Work:
        def __init__(self) -> None:
            self.done = now + 1

        def wait(self) -> None:
            nonlocal now
            now = max(now, self.done)

    def collective(*, async_op: bool = False) -> Work | None:
        work = Work()
        return work if async_op else work.wait()  # type: ignore[func-returns-value]

    def compute() -> Tensor:
        nonlocal now
        for _ in range(3):
            now += 1
            axis._complete(CALL, collective)  # type: ignore[arg-type]
        return torch.empty(0)

    Turns((axis,), at_once).run([Job(k, compute, lambda _: None) for k in range(4)])
    assert now == takes
