"""Two hosts for each module, and folders of their own for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Cluster
from two_hosts import Host, Refused, two_hosts


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    try:
        with two_hosts(tmp_path_factory.mktemp("names")) as pair:
            yield pair
    except Refused as refused:
        pytest.skip(f"no second host can be made on this machine: {refused}")


@pytest.fixture
def cluster(hosts: tuple[Host, Host], tmp_path: Path) -> Iterator[Cluster]:
    folders = tmp_path / "first", tmp_path / "second"
    for folder in folders:
        folder.mkdir()
    yield Cluster(hosts, folders)
    for host in hosts:
        host.clear()
