"""Real gloo ranks that stay: one launch for each number of ranks, which does one job after the other."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from headgrid.errors import HeadgridError
from headgrid.runtime.launch import Job, run

Outcomes = list[dict[str, Any]]
Ranks = Callable[..., Outcomes]
"""`(count, name, **arguments)`, as `RankPools.run`."""
ALIVE = 24
POLL_SECONDS = 0.002


class RankFailed(AssertionError):
    """A rank could not do a job. The message is its traceback."""


class _Given(Exception):
    """The ranks are no longer wanted."""


class RankPool:
    """Ranks of one launch. They end with the first job that fails, or when they are told to."""

    def __init__(self, ranks: int, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.ranks, self.folder, self.count = ranks, folder, 0
        self.error, self._given_up = "", False
        self.thread = threading.Thread(target=self._supervise, daemon=True)
        self.thread.start()

    def _supervise(self) -> None:
        job = Job("model_work:serve", {"folder": str(self.folder)}, self.ranks, "gloo")
        try:
            run(job, on_poll=self._look)
        except _Given:
            pass
        except HeadgridError as error:
            self.error = error.block()

    def _look(self) -> None:
        if self._given_up:
            raise _Given

    def run(self, name: str, arguments: dict[str, Any]) -> Outcomes:
        """What each rank returns. Raises RankFailed if one cannot."""
        number, part = self.count, self.folder / ".next.part"
        self.count += 1
        torch.save((name, arguments), part)
        part.rename(self.folder / f"{number}.job")
        files = [self.folder / f"{number}.{rank}.pt" for rank in range(self.ranks)]
        while not all(file.exists() for file in files):
            if not self.thread.is_alive():
                raise RankFailed(self._told(number))
            time.sleep(POLL_SECONDS)
        outcomes = [torch.load(file, weights_only=False) for file in files]
        for file in files:
            file.unlink()
        return outcomes

    def _told(self, number: int) -> str:
        errors = sorted(self.folder.glob(f"{number}.*.error"), key=lambda path: path.stat().st_mtime_ns)
        return errors[0].read_text() if errors else self.error or "the ranks are gone"

    def close(self) -> None:
        """End the ranks."""
        self._given_up = True
        self.thread.join(30)


class RankPools:
    """One launch for each number of ranks, started when it is first needed and again after a failure."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0
        self.pools: dict[int, RankPool] = {}

    def run(self, ranks: int, name: str, **arguments: Any) -> Outcomes:
        """What `model_work`'s function `name` returns on each of so many ranks."""
        return self._pool(ranks).run(name, arguments)

    def _pool(self, ranks: int) -> RankPool:
        """The pool used least recently ends where too many ranks are alive."""
        pool = self.pools.pop(ranks, None)
        if pool is None or not pool.thread.is_alive():
            while self.pools and sum(self.pools) + ranks > ALIVE:
                self.pools.pop(next(iter(self.pools))).close()
            self.started += 1
            pool = RankPool(ranks, self.folder / f"{self.started}-ranks{ranks}")
        self.pools[ranks] = pool
        return pool

    def close(self) -> None:
        """End all ranks."""
        while self.pools:
            self.pools.popitem()[1].close()
