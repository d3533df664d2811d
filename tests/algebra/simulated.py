"""Ranks as threads of one process, so that the runtime's own collectives meet without a network.

`collectives.Axis` is what runs, its autograd and its accounting included; only torch's raw operations underneath are
replaced while a world runs. Ranks take turns: one runs until it meets others in a collective, then the next one does.
So runs are deterministic, no rank is slowed down by sixteen others, and a collective that can never be complete is an
error at once, not a hang.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from headgrid.layout.layout import Layout
from headgrid.runtime import collectives
from headgrid.runtime.collectives import Axis
from headgrid.runtime.mesh import StageAxes


class Aborted(RuntimeError):
    """Raised in a rank that waits when another one has failed."""


class Mismatch(RuntimeError):
    """Ranks called different collectives, or wait for one that can never be complete."""


@dataclass
class Meeting:
    """One collective: what each rank brings to it, and what each takes away once all are there."""

    brought: list[Any]
    missing: int
    taken: list[Tensor] | None = None


@dataclass
class Place:
    """Where the ranks of one group meet, time after time."""

    size: int
    meeting: Meeting = field(init=False)

    def __post_init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self.meeting = Meeting([None] * self.size, self.size)


class Ranks:
    """Threads that are reused from world to world. One of them runs at any time; the caller waits."""

    def __init__(self) -> None:
        self._turns: list[threading.Semaphore] = []
        self._finished = threading.Semaphore(0)
        self._jobs: list[Callable[[], Any] | None] = []
        self._waiting: list[Meeting | None] = []
        self._results: list[Any] = []
        self.failure: BaseException | None = None

    def run(self, jobs: Sequence[Callable[[], Any]]) -> list[Any]:
        """What each rank's job returns. The first exception of a rank is raised, after all ranks have ended."""
        while len(self._turns) < len(jobs):
            self._turns.append(threading.Semaphore(0))
            threading.Thread(target=self._serve, args=(len(self._turns) - 1,), daemon=True).start()
        self._jobs, self._waiting = list(jobs), [None] * len(jobs)
        self._results, self.failure = [None] * len(jobs), None
        with patch.multiple(collectives, dist=_RAW, _all_gather=_all_gather, _reduce_scatter=_reduce_scatter):
            self._turns[0].release()
            self._finished.acquire()
        if self.failure is not None:
            raise self.failure
        return self._results

    def _serve(self, rank: int) -> None:
        while True:
            self._turns[rank].acquire()
            job = self._jobs[rank]
            assert job is not None
            try:
                if self.failure is None:
                    self._results[rank] = job()
            except BaseException as error:  # a KeyboardInterrupt too belongs to the caller
                self.failure = self.failure or error
            self._jobs[rank] = None
            del job
            self._hand_over(rank)

    def _hand_over(self, rank: int) -> None:
        """Give the turn to the next rank that can go on; with none left, to the caller."""
        following = [*range(rank + 1, len(self._jobs)), *range(rank + 1)]
        alive = [r for r in following if self._jobs[r] is not None]
        ready = [r for r in alive if self.failure or (m := self._waiting[r]) is None or not m.missing]
        if alive and not ready:
            self.failure = Mismatch(f"ranks {sorted(alive)} wait for collectives that others never call")
            ready = alive
        (self._turns[ready[0]] if ready else self._finished).release()

    def meet(
        self, rank: int, place: Place, index: int, brought: Any, share: Callable[[list[Any]], list[Tensor]]
    ) -> Tensor:
        """Bring something to the group's next collective; return this rank's part of what `share` makes of it all."""
        meeting = place.meeting
        meeting.brought[index] = brought
        meeting.missing -= 1
        if not meeting.missing:
            place.renew()
            meeting.taken = share(meeting.brought)
        else:
            self._waiting[rank] = meeting
            self._hand_over(rank)
            self._turns[rank].acquire()
            self._waiting[rank] = None
            if self.failure is not None:
                raise Aborted from self.failure
        assert meeting.taken is not None
        return meeting.taken[index]


@dataclass(frozen=True)
class Part:
    """What one rank brings to a collective. Sizes are what it sends to, and expects from, each rank."""

    kind: str
    x: Tensor
    send: Sequence[int] = ()
    receive: Sequence[int] = ()


@dataclass
class Group:
    """A process group, seen from one of its ranks."""

    ranks: Ranks
    rank: int
    place: Place
    index: int

    def meet(self, part: Part, share: Callable[[list[Part]], list[Tensor]]) -> Tensor:
        """This rank's result; no rank goes on before all results are computed."""

        def checked(parts: list[Part]) -> list[Tensor]:
            _check(parts)
            with torch.no_grad():
                return share(parts)

        return self.ranks.meet(self.rank, self.place, self.index, part, checked)


def _check(parts: list[Part]) -> None:
    """Ranks agree on what they do, in which dtype, and how much each sends to each."""
    if len({(part.kind, part.x.dtype) for part in parts}) > 1:
        raise Mismatch(f"ranks call {[(part.kind, part.x.dtype) for part in parts]} at the same time")
    if parts[0].kind != "all_to_all" and len({part.x.shape for part in parts}) > 1:
        raise Mismatch(f"{parts[0].kind} of {[tuple(part.x.shape) for part in parts]}")
    if parts[0].kind == "all_to_all":
        sent = [list(column) for column in zip(*(part.send for part in parts), strict=True)]
        if sent != [list(part.receive) for part in parts]:
            raise Mismatch(f"sent {sent} to each rank, which expect {[part.receive for part in parts]}")


def _sum(parts: list[Part]) -> Tensor:
    """In rank order, rounded to the dtype after each rank, as a reduction that hops from rank to rank would."""
    result = parts[0].x.clone()
    for part in parts[1:]:
        result += part.x
    return result


class _Done:
    def wait(self) -> None:
        """Nothing: the operation was complete when it returned."""


def _all_reduce(x: Tensor, group: Group) -> None:
    assert x.is_contiguous()
    x.copy_(group.meet(Part("all_reduce", x), lambda parts: [_sum(parts)] * len(parts)))


def _all_gather(out: Tensor, x: Tensor, group: Group, async_op: bool = False) -> _Done:
    assert x.is_contiguous() and out.numel() == x.numel() * group.place.size
    out.copy_(group.meet(Part("all_gather", x), lambda parts: [torch.cat([part.x for part in parts])] * len(parts)))
    return _Done()


def _reduce_scatter(out: Tensor, x: Tensor, group: Group) -> None:
    assert x.is_contiguous() and x.numel() == out.numel() * group.place.size
    out.copy_(group.meet(Part("reduce_scatter", x), lambda parts: list(_sum(parts).view(len(parts), -1))))


def _all_to_all(
    out: Tensor, x: Tensor, receive: Sequence[int], send: Sequence[int], group: Group, async_op: bool = False
) -> _Done:
    assert x.is_contiguous() and sum(send) == x.numel() and sum(receive) == out.numel()

    def share(parts: list[Part]) -> list[Tensor]:
        pieces = [part.x.split(list(part.send)) for part in parts]
        return [torch.cat(column) for column in zip(*pieces, strict=True)]

    out.copy_(group.meet(Part("all_to_all", x, send, receive), share))
    return _Done()


_RAW = SimpleNamespace(all_reduce=_all_reduce, all_to_all_single=_all_to_all)


class SimulatedAxis(Axis):
    """An axis of the runtime whose group is simulated."""

    def __init__(self, name: str, members: Sequence[int], rank: int, group: Group | None) -> None:
        super().__init__(name, members, rank, group)  # type: ignore[arg-type]


def axes(layout: Layout, ranks: Ranks) -> list[StageAxes]:
    """What a stage of each rank of the layout needs (dp = pp = 1): its place, `tp` and `tp_slice`."""
    found: list[dict[str, Axis]] = [{} for _ in range(layout.ranks)]
    for name in ("tp", "tp_slice"):
        for members in layout.axis_ranks(name):
            place = Place(len(members))
            for index, rank in enumerate(members):
                found[rank][name] = SimulatedAxis(name, members, rank, Group(ranks, rank, place, index))
    return [StageAxes(layout.coordinates(rank), **mine) for rank, mine in enumerate(found)]
