"""Real gloo ranks for the tests of this folder, shared by all of them."""

from collections.abc import Callable, Iterator

import fork_server
import pytest
import torch
from case import Case
from pool import Pools
from standing_ranks import Outcomes


@pytest.fixture(scope="session")
def prepared() -> None:
    """A fork server that has loaded what every rank needs."""
    fork_server.ensure_running()


@pytest.fixture(scope="session")
def pools(prepared: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    ahead = [case for item in items if isinstance(case := item.callspec.params.get("case"), Case)]
    torch.set_num_threads(1)  # two threads take longer for tensors as small as these
    found = Pools(tmp_path_factory.mktemp("pools"), ahead)
    yield found
    found.close()


@pytest.fixture(scope="session")
def outcomes(pools: Pools) -> Callable[[Case], Outcomes]:
    """Outcomes of a case, by rank."""
    kept: dict[Case, Outcomes] = {}

    def find(case: Case) -> Outcomes:
        if case not in kept:
            if len(kept) > 3:
                kept.pop(next(iter(kept)))
            kept[case] = pools.run(case)
        return kept[case]

    return find
