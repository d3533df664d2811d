"""A run on the processes that a launcher has started, on one host or on several.

Rank 0's process directs: it has the run folder and goes through the launches as a plain command does. The others do
what it orders. The first process of each other host samples that host, with a sampler like rank 0's; its file is
brought to the run folder at the end of each launch, with what its clock was ahead of rank 0's (`telemetry_hosts`).
"""

import shutil
import tempfile
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar
from zlib import compress, decompress

from headgrid.errors import InvalidInput
from headgrid.experiment import plan, telemetry
from headgrid.experiment.design import Design, from_dict
from headgrid.experiment.machine import environment
from headgrid.experiment.telemetry import Sampler, append_line, append_lines
from headgrid.experiment.telemetry_hosts import file_of
from headgrid.runtime import launch
from headgrid.runtime.crew import Crew, supervising

T = TypeVar("T")

CLOCK_ROUNDS = 8
"""Questions for rank 0's time; each bounds how far a clock is ahead, and together they do to the quickest answer."""
PART_BYTES = 1 << 20
"""Of a file of samples, before compression, about: the launcher's store takes values of 8 MiB."""
LAST_WORDS_S = 6.0
"""How long a run that has failed waits for what other hosts have sampled: they look every two seconds."""


def directed(backend: str, work: Callable[["Across"], T]) -> T | None:
    """Do `work` on rank 0 with all processes of the launcher at its orders; None on the others, once it is done.

    Raises RankDied if processes do not come or are lost, and what any of them has refused.
    """
    with supervising(backend) as crew:
        if crew.place.rank:
            with _Duties(crew) as duties:
                crew.serve(duties.all)
            return None
        done = work(Across(crew, backend))
        crew.end()
        return done


class Across:
    """What starts ranks and samplers on all hosts: a `starting.Starter`, in rank 0's process."""

    def __init__(self, crew: Crew, backend: str) -> None:
        """`crew` has met for ranks of this backend."""
        self._crew, self._backend = crew, backend
        self._folder: Path | None = None
        self._sampled: list[int] = []
        self._brought: dict[int, int] = {}
        self._session = 0

    def check(self, designs: Sequence[Design]) -> None:
        """Raise what is refused on any host for so many of the ranks as it has, before a rank starts."""
        started = self._crew.place.ranks
        for design in designs:
            if design.backend != self._backend:
                what = f"{design.name} needs {design.backend}, these ranks have {self._backend}"
                raise InvalidInput(what, legal=(f"--device {design.device}",))
            if design.ranks > started:
                raise InvalidInput(f"{design.name} needs {design.ranks} ranks, and the launcher started {started}")
            number = self._crew.order("check", design.to_dict(), to := self._crew.leaders_of(design.ranks))
            plan.recheck(design, started=True)
            self._crew.answers(number, to)

    def environment(self) -> dict[str, Any]:
        """The content of env.json: this host's, and under `hosts` that of each other one."""
        number = self._crew.order("environment", None, others := self._crew.leaders[1:])
        mine = environment()
        found = self._crew.answers(number, others)
        rows = [{"host": self._crew.hosts[rank], **each} for rank, each in found.items()]
        return mine | ({"hosts": rows} if rows else {})

    def run(self, job: launch.Job, *, on_poll: Callable[[], None], log_to: Path) -> None:
        """Start each rank by its own supervisor, and wait for all."""
        others = range(1, job.ranks)
        self._compare_clocks()
        number = self._crew.order("launch", asdict(job) | {"log_to": str(log_to)}, others)
        self._crew.run(job, number, on_poll=on_poll, log_to=log_to)
        self._crew.answers(number, others)
        self._compare_clocks()
        self._bring("bring")

    def pids(self) -> list[int]:
        """This host's processes of the launch under way."""
        return self._crew.pids()

    @contextmanager
    def sampling(self, folder: Path, hz: float, *, gpus: bool, ranks: int) -> Iterator[Sampler | None]:
        """Sample every host that has any of the first `ranks`."""
        to = self._crew.leaders_of(ranks) if hz else []
        self._folder, self._brought = folder, dict.fromkeys(to, 0)
        self._session = self._crew.order("sample", {"hz": hz, "gpus": gpus}, to)
        self._crew.answers(self._session, to)
        self._sampled = to
        try:
            with telemetry.sampling(folder, hz, gpus=gpus) as sampler:
                yield sampler
        except BaseException as error:
            self._collect_last(error)
            raise
        self._bring("stop")
        self._sampled = []

    def _compare_clocks(self) -> None:
        for rank in self._sampled:
            number = self._crew.order("clock", None, [rank])
            for turn in range(CLOCK_ROUNDS):
                self._crew.awaited("ping", number, turn)
                self._crew.put(time.time(), "pong", number, turn)
            self._crew.answers(number, [rank])

    def _bring(self, order: str) -> None:
        """Append what other hosts have sampled since the last time to their files in the run folder."""
        for rank, parts in self._crew.ask(order, None, self._sampled).items():
            while self._brought[rank] < parts:
                self._take(rank)

    def _take(self, rank: int) -> None:
        """The next part of a host's samples."""
        assert self._folder is not None
        key = ("samples", self._session, rank, self._brought[rank])
        part = self._crew.awaited(*key)
        self._crew.forget(*key)
        self._brought[rank] += 1
        append_lines(self._folder / file_of(self._crew.hosts[rank]), decompress(b64decode(part)))

    def _collect_last(self, error: BaseException) -> None:
        """As much as comes in time of what other hosts have sampled, in a run that ends by an error."""
        with suppress(Exception):
            if isinstance(error, Exception):
                self._crew.tell(error)
            deadline = time.monotonic() + LAST_WORDS_S
            waiting = dict.fromkeys(self._sampled)
            while waiting and time.monotonic() < deadline:
                for rank in list(waiting):
                    ended = self._crew.find("sampled", self._session, rank)
                    while self._crew.find("samples", self._session, rank, self._brought[rank]) is not None:
                        self._take(rank)
                    if ended:
                        del waiting[rank]
                time.sleep(0.05)


class _Duties:
    """What the other supervisors do when they are told to."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._sampler: Sampler | None = None
        self._path = Path()
        self._session = self._sent_bytes = self._parts = 0
        self.all = {
            name: getattr(self, name) for name in ("check", "environment", "launch", "sample", "clock", "bring", "stop")
        }

    def __enter__(self) -> "_Duties":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Hand over what was sampled, should the run have ended by an error, which others are told of before."""
        if self._sampler is not None:
            with suppress(Exception):
                if isinstance(error, Exception):
                    self._crew.tell(error)
                self.stop(None, 0)

    def check(self, design: dict[str, Any], number: int) -> None:
        plan.recheck(from_dict(design), started=True)

    def environment(self, value: None, number: int) -> dict[str, Any]:
        return environment()

    def launch(self, value: dict[str, Any], number: int) -> None:
        """Run this supervisor's rank; the output of those on rank 0's host goes where its own does."""
        log_to = value.pop("log_to")
        job = launch.Job(**value)
        self._crew.run(job, number, on_poll=self._follow, log_to=None if self._crew.host else Path(log_to))

    def _follow(self) -> None:
        if self._sampler is not None:
            self._sampler.follow(self._crew.pids())

    def sample(self, options: dict[str, Any], number: int) -> None:
        """Start this host's sampler, and come back once it samples."""
        self._path = Path(tempfile.mkdtemp(prefix="headgrid-")) / telemetry.FILE
        self._session, self._sent_bytes, self._parts = number, 0, 0
        self._sampler = Sampler(self._path, options["hz"], gpus=options["gpus"])

    def clock(self, value: None, number: int) -> None:
        """Write by how much this host's clock is ahead of rank 0's, at most and at least."""
        least_s, most_s, asked_s = float("-inf"), float("inf"), 0.0
        for turn in range(CLOCK_ROUNDS):
            asked_s = time.time()
            self._crew.put(True, "ping", number, turn)
            theirs_s = self._crew.awaited("pong", number, turn)
            least_s, most_s = max(least_s, asked_s - theirs_s), min(most_s, time.time() - theirs_s)
        offset = {"offset_s": (least_s + most_s) / 2, "error_s": abs(most_s - least_s) / 2}
        append_line(self._path, {"kind": "clock", "time_s": asked_s, **offset})

    def bring(self, value: None, number: int) -> int:
        """Send the whole lines that are new; how many parts there are by now."""
        with open(self._path, "rb") as file:
            file.seek(self._sent_bytes)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        for part in _parts(data):
            text = b64encode(compress(part)).decode()
            self._crew.put(text, "samples", self._session, self._crew.place.rank, self._parts)
            self._parts += 1
        self._sent_bytes += len(data)
        return self._parts

    def stop(self, value: None, number: int) -> int:
        """End the sampler and send the rest."""
        assert self._sampler is not None
        self._sampler.stop()
        self._sampler = None
        try:
            parts = self.bring(None, number)
            self._crew.put(True, "sampled", self._session, self._crew.place.rank)
        finally:
            shutil.rmtree(self._path.parent, ignore_errors=True)
        return parts


def _parts(data: bytes) -> Iterator[bytes]:
    """Whole lines, about PART_BYTES of them at a time."""
    while data:
        end = data.find(b"\n", PART_BYTES) + 1 or len(data)
        yield data[:end]
        data = data[end:]
