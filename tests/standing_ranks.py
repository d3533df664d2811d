"""Real gloo ranks that stay: one launch for each world size, which does task after task as a test asks for them.

`Launch` and `Launches` are the side of the tests, `serve` is what every rank runs. A task travels as a file.
"""

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from headgrid.errors import HeadgridError
from headgrid.runtime.launch import Job, run

Outcomes = list[dict[str, Any]]
"""What each rank found, by rank."""
POLL_S = (0.001, 0.01)
"""Between two looks: at first, and where nothing has come for long. Ranks of many launches may stand idle."""


class RankFailed(AssertionError):
    """A rank could not do a task. The message is its traceback."""


class _Given(Exception):
    """The ranks are no longer wanted."""


class Launch:
    """Ranks of one world size that run `target`. They end with the first task that fails, or when they are told to."""

    def __init__(self, target: str, ranks: int, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.ranks, self.folder, self.count = ranks, folder, 0
        self.error: str | None = None
        self._abandoned = False
        job = Job(target, {"folder": str(folder)}, ranks, "gloo")
        self.thread = threading.Thread(target=self._supervise, args=(job,), daemon=True)
        self.thread.start()

    def _supervise(self, job: Job) -> None:
        try:
            run(job, on_poll=self._look, log_to=self.folder / "logs")
        except _Given:
            pass
        except HeadgridError as error:
            self.error = error.block()

    def _look(self) -> None:
        if self._abandoned:
            raise _Given

    def submit(self, name: str, task: Any) -> int:
        """Put a task behind those that are under way; its number. A failure is told under this name."""
        number, part = self.count, self.folder / ".next.part"
        self.count += 1
        torch.save((name, task), part)
        part.rename(self.folder / f"{number}.task")
        return number

    def result(self, number: int) -> Outcomes:
        """What each rank found, once all have. Raises RankFailed if one could not."""
        files = [self.folder / f"{number}.{rank}.pt" for rank in range(self.ranks)]
        pauses = _pauses_s()
        while not all(file.exists() for file in files):
            if not self.thread.is_alive():
                raise RankFailed(self._told(number))
            time.sleep(next(pauses))
        outcomes = [torch.load(file, weights_only=False) for file in files]
        for file in files:
            file.unlink()
        return outcomes

    def _told(self, number: int) -> str:
        errors = sorted(self.folder.glob(f"{number}.*.error"), key=lambda path: path.stat().st_mtime_ns)
        return errors[0].read_text() if errors else self.error or "the ranks are gone"

    def close(self, *, kill: bool = False) -> None:
        """Let the ranks end with what they are at, or at once."""
        (self.folder / "stop").touch()
        self._abandoned = kill
        self.thread.join(30)


class Launches:
    """One launch for each world size, started when it is first needed and again after a failure."""

    def __init__(self, target: str, folder: Path, alive: int) -> None:
        """At most `alive` ranks stay, however many world sizes there are."""
        self.target, self.folder, self.alive, self.started = target, folder, alive, 0
        self.launches: dict[int, Launch] = {}

    def of(self, ranks: int) -> Launch:
        """The launch of a world size. The one that was used least recently ends where too many ranks are alive."""
        launch = self.launches.pop(ranks, None)
        if launch is None or not launch.thread.is_alive():
            while self.launches and sum(self.launches) + ranks > self.alive:
                self.launches.pop(next(iter(self.launches))).close(kill=True)
            self.started += 1
            launch = Launch(self.target, ranks, self.folder / f"{self.started}-ranks{ranks}")
        self.launches[ranks] = launch
        return launch

    def close(self) -> None:
        """End all ranks."""
        while self.launches:
            self.launches.popitem()[1].close(kill=True)


def serve(rank: int, folder: Path, do: Callable[[Any], dict[str, Any]]) -> None:
    """Do `<folder>/<k>.task` for k = 0, 1, ... as they appear, until there is a file `stop`.

    What rank r finds in task k is `<folder>/<k>.<r>.pt`; a rank that fails leaves `<k>.<r>.error` and ends.
    """
    number = 0
    while _comes(folder, number, rank):
        name, task = torch.load(folder / f"{number}.task", weights_only=False)
        try:
            found = do(task)
        except Exception as error:
            traceback.print_exc()
            (folder / f"{number}.{rank}.error").write_text(f"rank {rank} in {name}:\n{traceback.format_exc()}")
            raise RuntimeError(f"in {name}: {error!r}") from error
        part = folder / f".{number}.{rank}"
        torch.save(found, part)
        part.rename(folder / f"{number}.{rank}.pt")
        number += 1


def _pauses_s() -> Iterator[float]:
    """Seconds to sleep between one look and the next, each 5 % longer than the last."""
    shortest, longest = POLL_S
    while True:
        yield shortest
        shortest = min(longest, 1.05 * shortest)


def _comes(folder: Path, number: int, rank: int) -> bool:
    """Whether there is one more task. Rank 0 looks, the others wait for it without using a processor."""
    found = torch.zeros(1, dtype=torch.int64)
    if rank == 0:
        task, stop = folder / f"{number}.task", folder / "stop"
        pauses = _pauses_s()
        while not (task.exists() or stop.exists()):
            time.sleep(next(pauses))
        found += task.exists()
    dist.broadcast(found, 0)
    return bool(found)
