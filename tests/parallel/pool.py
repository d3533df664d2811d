"""Real gloo ranks that stay: one launch for each world size, which runs case after case as a test asks for them."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from case import Case

from headgrid.errors import HeadgridError
from headgrid.runtime.launch import Job, run

Outcomes = list[dict[str, Any]]
ALIVE = 44
AHEAD = 3
POLL_SECONDS = 0.001


class RankFailed(AssertionError):
    """A rank could not run a case. The message is its traceback."""


class _Given(Exception):
    """The ranks are no longer wanted."""


class Launch:
    """Ranks of one world size. They end with the first case that fails, or when they are told to."""

    def __init__(self, ranks: int, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.ranks, self.folder, self.count = ranks, folder, 0
        self.numbers: dict[Case, int] = {}
        self.error: str | None = None
        self._abandoned = False
        self.thread = threading.Thread(target=self._supervise, daemon=True)
        self.thread.start()

    def _supervise(self) -> None:
        job = Job("worker:serve", {"folder": str(self.folder)}, self.ranks, "gloo")
        try:
            run(job, on_poll=self._look, log_to=self.folder / "logs")
        except _Given:
            pass
        except HeadgridError as error:
            self.error = error.block()

    def _look(self) -> None:
        if self._abandoned:
            raise _Given

    def submit(self, case: Case) -> None:
        """Put a case behind those that are under way, unless it is one of them."""
        if case not in self.numbers:
            self.numbers[case] = self.count
            part = self.folder / f".{self.count}.part"
            torch.save(case, part)
            part.rename(self.folder / f"{self.count}.case")
            self.count += 1

    def result(self, case: Case) -> Outcomes:
        """What each rank found, once all have. Raises RankFailed if one could not."""
        number = self.numbers.pop(case)
        files = [self.folder / f"{number}.{rank}.pt" for rank in range(self.ranks)]
        while not all(file.exists() for file in files):
            if not self.thread.is_alive():
                raise RankFailed(self._told(number))
            time.sleep(POLL_SECONDS)
        outcomes = [torch.load(file) for file in files]
        for file in files:
            file.unlink()
        return outcomes

    def _told(self, number: int) -> str:
        errors = sorted(self.folder.glob(f"{number}.*.error"), key=lambda path: path.stat().st_mtime_ns)
        return errors[0].read_text() if errors else self.error or "the ranks are gone"

    def close(self, *, kill: bool = False) -> None:
        """Let the ranks end with what they are at."""
        (self.folder / "stop").touch()
        self._abandoned = kill
        self.thread.join(30)


class Pools:
    """One launch for each world size, started when it is first needed and again after a failure.

    `ahead` are cases that will probably be asked for in this order: some are run while a result is being judged.
    """

    def __init__(self, folder: Path, ahead: Sequence[Case] = ()) -> None:
        self.folder, self.started = folder, 0
        self.launches: dict[int, Launch] = {}
        self.ahead = list(dict.fromkeys(ahead))
        self.places = {case: k for k, case in enumerate(self.ahead)}

    def run(self, case: Case) -> Outcomes:
        """What each rank finds in this case."""
        launch = self._launch(case.ranks)
        launch.submit(case)
        place = self.places.get(case)
        if place is not None:
            for other in self.ahead[place + 1 : place + 1 + AHEAD]:
                if other.ranks == case.ranks:
                    launch.submit(other)
        return launch.result(case)

    def _launch(self, ranks: int) -> Launch:
        """The launch of a world size. The one that was used least recently ends where too many ranks are alive."""
        launch = self.launches.pop(ranks, None)
        if launch is None or not launch.thread.is_alive():
            while self.launches and sum(self.launches) + ranks > ALIVE:
                self.launches.pop(next(iter(self.launches))).close(kill=True)
            self.started += 1
            launch = Launch(ranks, self.folder / f"{self.started}-ranks{ranks}")
        self.launches[ranks] = launch
        return launch

    def close(self) -> None:
        """End all ranks."""
        for launch in self.launches.values():
            launch.close(kill=True)
        self.launches.clear()
