"""Processes that a launcher has started, as supervisors: rank 0's says what is done, and the others do it.

For every launch each of those whose rank takes part starts a fresh process, which meets the others of that launch under
a name of its own in the launcher's store. So one start of torchrun serves any number of launches, each of any number of
ranks: rank 0 and those that follow, one host after the other. Supervisors hold no process group and no device; while
ranks work they sleep, and the first of each host looks every two seconds whether another one has failed; one whose rank
takes no part in a launch asks twice a second for the next order.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from headgrid.errors import HeadgridError
from headgrid.layout.placement import host_numbers
from headgrid.runtime import launch
from headgrid.runtime.meeting import Elsewhere, Meeting, PeerLost

GRACE_S = 20.0
"""How long a supervisor may take to end its rank and to hand over what its host has sampled."""
LOOK_S = {True: 2.0, False: 10.0}
"""How often the first process of a host looks for failures, and how often the others do: those the launcher ends."""
POLL_S = {True: 0.1, False: 1.0}
"""The same of how often one looks whether its rank is still there, if nothing wakes it before."""
WAIT_S = (2e-4, 0.5)
"""Between two looks for a value that another process is to set: at first, and after a while."""
END = "end"

Duty = Callable[[Any, int], Any]
"""What a supervisor does when it is told to: called with the order's value and number, returns a JSON value."""


class Crew:
    """This supervisor and what it knows of the others."""

    def __init__(self, found: launch.Met) -> None:
        """Of processes that have met."""
        self.place, self._interface = found.here, found.interface
        self._meeting = Meeting(found.store, found.here)
        self.hosts = host_numbers([each["host"] for each in found.everyone])
        """The host of each rank, numbered in the order of ranks."""
        self.leaders = tuple(self.hosts.index(host) for host in dict.fromkeys(self.hosts))
        """The first rank of each host."""
        self.put, self.find, self.forget = self._meeting.put, self._meeting.find, self._meeting.forget
        self._orders, self._next_look_s = 0, 0.0
        self._pids: dict[int, list[int]] = {}

    @property
    def host(self) -> int:
        """This process's own."""
        return self.hosts[self.place.rank]

    @property
    def leads(self) -> bool:
        """Whether it is the first of its host."""
        return self.place.rank in self.leaders

    def local(self, ranks: int) -> int:
        """How many of the first `ranks` are on this host."""
        return self.hosts[:ranks].count(self.host)

    def leaders_of(self, ranks: int) -> list[int]:
        """First ranks of the hosts, but rank 0's, that have any of the first `ranks`."""
        return [rank for rank in self.leaders[1:] if rank < ranks]

    # --- orders ---

    def order(self, kind: str, value: Any, to: Sequence[int]) -> int:
        """Tell the supervisors of these ranks to do something (rank 0); the order's number."""
        self._orders += 1
        self.put({"kind": kind, "value": value, "to": list(to)}, "order", self._orders)
        return self._orders

    def answers(self, number: int, of: Sequence[int]) -> dict[int, Any]:
        """What these ranks returned for an order. Raises what one of them has failed with instead."""
        return {rank: self.awaited("answer", number, rank)["returned"] for rank in of}

    def ask(self, kind: str, value: Any, to: Sequence[int]) -> dict[int, Any]:
        """`order`, then `answers`."""
        return self.answers(self.order(kind, value, to), to) if to else {}

    def serve(self, duties: Mapping[str, Duty]) -> None:
        """Do what rank 0 orders until it says that there is no more."""
        for number in count(1):
            order = self.awaited("order", number)
            if self.place.rank in order["to"]:
                done = None if order["kind"] == END else duties[order["kind"]](order["value"], number)
                self.put({"returned": done}, "answer", number, self.place.rank)
            if order["kind"] == END:
                return

    def end(self) -> None:
        """Say that there is no more, and wait until all have heard it: the store may be this process's."""
        self.ask(END, None, range(1, self.place.ranks))

    def awaited(self, *key: object) -> Any:
        """A value that another supervisor sets, once it has. Raises what one has failed with."""
        pause_s, longest_s = WAIT_S
        while (found := self.find(*key)) is None:
            self.look()
            time.sleep(pause_s)
            pause_s = min(1.3 * pause_s, longest_s)
        return found

    def look(self) -> None:
        """Raise what another supervisor has failed with, if it is time to look again."""
        if time.monotonic() < self._next_look_s:
            return
        self._next_look_s = time.monotonic() + LOOK_S[self.leads]
        if (failure := self._meeting.first_failure()) is not None:
            raise self._meeting.cause() or failure

    def tell(self, error: Exception) -> None:
        """Say at once that this supervisor fails, before it has cleaned up; what is no error of ours goes unsaid."""
        if isinstance(error, HeadgridError) and not isinstance(error, Elsewhere):
            self._meeting.leave(error, lost=isinstance(error, PeerLost))

    # --- ranks ---

    def run(
        self,
        job: launch.Job,
        number: int,
        *,
        on_poll: Callable[[], None] = lambda: None,
        log_to: Path | None = None,
    ) -> None:
        """Start this supervisor's rank of a job, in a fresh process, and wait for it. `number`: the order's.

        Raises as `launch.run`, and what another supervisor has failed with.
        """
        here = self.place
        name = f"headgrid/{here.attempt}/launch/{number}"
        seat = launch.Seat(here.rank, here.local_rank, here.address, here.port, name, self._interface)
        self._pids = {}

        def poll() -> None:
            self._learn_pids(number, job.ranks)
            on_poll()
            self.look()

        launch.run(job, on_poll=poll, log_to=log_to, seat=seat, poll_s=POLL_S[self.leads])

    def pids(self) -> list[int]:
        """Processes of this host that belong to the launch under way, supervisors included (its first process)."""
        return [pid for pids in self._pids.values() for pid in pids]

    def _learn_pids(self, number: int, ranks: int) -> None:
        mine = self.place.rank
        if mine not in self._pids:
            children = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
            self._pids[mine] = [os.getpid(), *children]
            self.put(self._pids[mine], "pids", number, mine)
        local = [rank for rank in range(ranks) if self.hosts[rank] == self.host] if self.leads else ()
        for rank in local:
            if rank not in self._pids and (found := self.find("pids", number, rank)) is not None:
                self._pids[rank] = found


@contextmanager
def supervising(backend: str) -> Iterator[Crew]:
    """Wait until all processes of the launcher have come; inside the block each ends where another is lost.

    `backend` is that of the ranks to come. Raises as `launch.met`.
    """
    with launch.met(backend, GRACE_S) as found:
        yield Crew(found)
