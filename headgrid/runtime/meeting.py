"""How ranks that a launcher has started, on one host or on several, find each other and end together.

They speak through the launcher's own store (torchrun's agent on the first host keeps it) before there are process
groups, and after one has failed: what one rank refuses, every rank learns, and each host says it once.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headgrid.errors import HeadgridError, RankDied
from headgrid.runtime.hosts import host_id, local_address

MEETING_S = 300.0
"""Until all ranks must have come: they import torch and open checkpoints meanwhile."""
TELLING_S = 12.0
"""How long a failed rank waits for its host's first rank to say so, before it says it itself: that one may still fetch
the last samples of other hosts."""
CAUSE_S = 1.0
"""How long a host's first rank that has lost another waits for that one's own words."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a launcher has put this process. `attempt` counts its restarts of the ranks."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    address: str
    port: int
    attempt: str

    @property
    def first_of_host(self) -> int:
        """The lowest rank of this host: ranks are numbered host by host."""
        return self.rank - self.local_rank


class Elsewhere(HeadgridError):
    """An error that another rank has already put into words."""

    def __init__(self, rank: int, block: str, exit_code: int) -> None:
        """`rank` said `block`, the whole message."""
        super().__init__(block)
        self.rank, self._block, self.exit_code = rank, block, exit_code

    def block(self) -> str:
        """The other rank's words."""
        return self._block


class PeerLost(RankDied):
    """A collective failed because another rank is gone; that one may have said why."""


class Meeting:
    """What the ranks of a launch tell each other through their store."""

    def __init__(self, store: Any, place: Place) -> None:
        """`store` is torch.distributed's. Nothing is told yet."""
        self._store, self.place = store, place

    def _key(self, *parts: object) -> str:
        return "/".join(map(str, ("headgrid", self.place.attempt, *parts)))

    def put(self, value: Any, *key: object) -> None:
        """Set a value that all ranks can see; JSON, at most some MiB of it."""
        self._store.set(self._key(*key), json.dumps(value))

    def find(self, *key: object) -> Any:
        """A value that another rank has set, None if it has not."""
        name = self._key(*key)
        return json.loads(self._store.get(name)) if self._store.check([name]) else None

    def arrive(self, timeout_s: float = MEETING_S) -> list[dict[str, Any]]:
        """Wait until all ranks have come; each one's `host` and `address`, in the order of ranks.

        Raises Elsewhere if a rank has failed instead, RankDied that names those who have not come in time.
        """
        address = local_address(self.place.address, self.place.port)
        self.put({"host": host_id(), "address": address}, "arrived", self.place.rank)
        there: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + timeout_s
        while len(there) < self.place.ranks:
            self._raise_failure()
            missing = [rank for rank in range(self.place.ranks) if rank not in there]
            there |= {rank: found for rank in missing if (found := self.find("arrived", rank)) is not None}
            if len(there) < self.place.ranks and time.monotonic() > deadline:
                missing = [rank for rank in missing if rank not in there]
                raise RankDied(
                    f"{len(missing)} of {self.place.ranks} ranks have not come within {timeout_s:.0f} s",
                    numbers=f"ranks {', '.join(map(str, missing[:16]))}",
                    why="their host was not started, is stuck, or does not reach this one",
                )
            time.sleep(0.02)
        return [there[rank] for rank in sorted(there)]

    def _failures(self) -> list[dict[str, Any]]:
        """What ranks have told of their ends, causes before consequences."""
        if not self._store.check([self._key("failures")]):
            return []
        found = [self.find("failed", rank) for rank in range(self.place.ranks)]
        return sorted(filter(None, found), key=lambda each: (each["lost"], each["rank"]))

    def _raise_failure(self) -> None:
        for first in self._failures()[:1]:
            raise Elsewhere(first["rank"], first["block"], first["code"])

    def leave(self, error: HeadgridError, *, lost: bool) -> None:
        """Tell all ranks that this one ends before its work is done. `lost`: it may be for what another one did."""
        failure = {"rank": self.place.rank, "block": error.block(), "code": error.exit_code, "lost": lost}
        self.put(failure, "failed", self.place.rank)
        self._store.add(self._key("failures"), 1)

    def first_failure(self) -> Elsewhere | None:
        """Why some other rank has ended, causes before consequences; None while all run."""
        others = (each for each in self._failures() if each["rank"] != self.place.rank)
        first = next(others, None)
        return Elsewhere(first["rank"], f"rank {first['rank']}: {first['block']}", first["code"]) if first else None

    def settle(self, error: HeadgridError) -> HeadgridError | None:
        """Tell all ranks of this rank's failure; what this rank has to show of it, None where another one does."""
        lost, place = isinstance(error, PeerLost), self.place
        if not isinstance(error, Elsewhere):
            self.leave(error, lost=lost)
        if place.local_rank == 0:
            if lost:
                error = self.cause() or error
            return error
        _until(lambda: self.find("told", place.first_of_host) is not None, TELLING_S)
        return None if self.find("told", place.first_of_host) else error

    def told(self) -> None:
        """Say that this host's first rank has shown the failure."""
        self.put(True, "told", self.place.rank)

    def cause(self) -> Elsewhere | None:
        """What another rank said before it was lost, with its number; None if it said nothing."""
        _until(lambda: any(not each["lost"] for each in self._failures()), CAUSE_S)
        return self.first_failure() if any(not each["lost"] for each in self._failures()) else None

    def forget(self, *key: object) -> None:
        """Take a value away that every rank which needs it has seen."""
        self._store.delete_key(self._key(*key))

    def beat(self, count: int) -> None:
        """Say that this host is still there, for the `count`-th time."""
        self.put(count, "beat", self.place.first_of_host)

    def beat_of(self, first_of_host: int) -> int:
        """How often another host has said so."""
        return self.find("beat", first_of_host) or 0


def _until(happened: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.02)
