"""What starts a run's ranks and samplers: this command on its own host, or the processes of a launcher's together."""

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from headgrid.experiment import plan
from headgrid.experiment.design import Design
from headgrid.experiment.machine import environment
from headgrid.experiment.telemetry import Sampler, sampling
from headgrid.runtime import launch


class Starter(Protocol):
    """Both of them, as a run sees them."""

    def check(self, designs: Sequence[Design]) -> None:
        """Raise what a host refuses of these designs, before any rank starts."""

    def environment(self) -> dict[str, Any]:
        """The content of env.json."""
        ...

    def run(self, job: launch.Job, *, on_poll: Callable[[], None], log_to: Path) -> None:
        """Start fresh ranks and wait for them; raises as `launch.run`."""

    def sampling(self, folder: Path, hz: float, *, gpus: bool, ranks: int) -> AbstractContextManager[Sampler | None]:
        """Sample, for the length of the block, the hosts of so many ranks; the sampler of this host."""
        ...

    def pids(self) -> Iterable[int]:
        """This host's processes of the launch under way."""
        ...


class Here:
    """Ranks and a sampler of this host."""

    run = staticmethod(launch.run)
    environment = staticmethod(environment)

    def check(self, designs: Sequence[Design]) -> None:
        """By this machine."""
        for design in designs:
            plan.recheck(design)

    def sampling(self, folder: Path, hz: float, *, gpus: bool, ranks: int) -> AbstractContextManager[Sampler | None]:
        """One sampler, whatever the ranks."""
        return sampling(folder, hz, gpus=gpus)

    def pids(self) -> Iterable[int]:
        """The ranks."""
        return (child.pid for child in multiprocessing.active_children() if child.pid is not None)


HERE: Starter = Here()
