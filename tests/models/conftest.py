"""Real gloo ranks for the tests of this folder, which stay for the length of a module, and what was counted."""

from collections.abc import Iterator
from typing import Any

import fork_server
import pytest
import torch
from greedy_judge import Tally
from model_work import Ranks
from standing_ranks import Launches, Outcomes

ALIVE = 24
_TALLY = pytest.StashKey[Tally]()


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """`on_ranks(count, name, **arguments)`: what the function of `model_work` returns on each of so many gloo ranks."""
    fork_server.ensure_running()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads take longer for tensors as small as these
    launches = Launches("model_work:serve", tmp_path_factory.mktemp("ranks"), ALIVE)

    def call(count: int, name: str, **arguments: Any) -> Outcomes:
        launch = launches.of(count)
        return launch.result(launch.submit(name, (name, arguments)))

    yield call
    launches.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tally(request: pytest.FixtureRequest) -> Tally:
    """Printed when all is over."""
    return request.config.stash.setdefault(_TALLY, Tally())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What was compared, near ties included."""
    for line in config.stash.get(_TALLY, Tally()).lines:
        terminalreporter.write_line(line)
