"""One launch of real gloo ranks for each world size, shared by all of its cases that this session collected."""

import multiprocessing
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case

from headgrid.errors import HeadgridError
from headgrid.runtime.launch import Job, run

Outcomes = list[dict[str, Any]]


class Launch:
    """The ranks of one world size, and what each left behind for each case."""

    def __init__(self, cases: list[Case], folder: Path) -> None:
        """Run the cases, in turn, on as many ranks as they need."""
        self.numbers, self.folder, self.error = {case.id: k for k, case in enumerate(cases)}, folder, None
        job = Job("worker:run", {"cases": cases, "folder": str(folder)}, cases[0].ranks, "gloo")
        try:
            run(job, log_to=folder / "logs")
        except HeadgridError as error:
            self.error = error.block()

    def outcomes(self, case: Case) -> Outcomes:
        """By rank. If the launch died, every case of it fails with the rank's error."""
        if self.error is not None:
            pytest.fail(self.error, pytrace=False)
        number = self.numbers[case.id]
        return [torch.load(self.folder / f"{number}.{rank}.pt") for rank in range(case.ranks)]


@pytest.fixture(scope="session")
def prepared() -> None:
    """A fork server that has loaded what every rank needs: torch's dispatch modes import all of its compiler."""
    multiprocessing.set_forkserver_preload(["torch.distributed", "torch._dynamo", "headgrid.runtime.engine", "worker"])
    forkserver.ensure_running()


@pytest.fixture(scope="session")
def outcomes(
    prepared: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], Outcomes]:
    """Outcomes of a case, by rank; the first case of a world size starts its launch."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    collected = [case for item in items if isinstance(case := item.callspec.params.get("case"), Case)]
    launches: dict[int, Launch] = {}

    def find(case: Case) -> Outcomes:
        if case.ranks not in launches:
            mine = list({other.id: other for other in collected if other.ranks == case.ranks}.values())
            launches[case.ranks] = Launch(mine, tmp_path_factory.mktemp(f"ranks{case.ranks}"))
        return launches[case.ranks].outcomes(case)

    return find
