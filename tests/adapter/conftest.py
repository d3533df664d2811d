"""Real gloo ranks for the tests of the transformers adapter: one launch for each number of ranks and list of jobs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
from adapter_cases import Jobs
from adapter_models import build
from adapter_scenarios import SCENARIOS, Found

from headgrid.runtime.launch import Job, run

Launch = Callable[..., list[list[dict[str, Any]]]]


def _launch(ranks: int, jobs: Jobs, folder: Path, backend: str) -> list[list[dict[str, Any]]]:
    folder.mkdir(parents=True)
    run(Job("adapter_ranks:serve", {"folder": str(folder), "jobs": jobs}, ranks, backend), log_to=folder / "logs")
    return [
        [torch.load(folder / f"{k}.{rank}.pt", map_location="cpu") for rank in range(ranks)] for k in range(len(jobs))
    ]


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """`launch(ranks, jobs, backend="gloo")`: for each job what each rank found, on the CPU."""
    fork_server.ensure_running()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("adapter")

    def start(ranks: int, jobs: Jobs, backend: str = "gloo") -> list[list[dict[str, Any]]]:
        return _launch(ranks, jobs, root / str(len(list(root.iterdir()))), backend)

    return start


@pytest.fixture(scope="session")
def expected() -> Callable[[str, str], Found]:
    """What a scenario finds with transformers alone, in this process."""
    kept: dict[tuple[str, str], Found] = {}

    def find(family: str, name: str) -> Found:
        if (family, name) not in kept:
            kept[family, name] = SCENARIOS[name](build(family))
        return kept[family, name]

    return find
