"""Ranks that meet through a store: who has not come, whose words are said, which interface. Ranks are threads."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from headgrid.errors import HeadgridError, InvalidInput, RankDied
from headgrid.runtime import launch, meeting
from headgrid.runtime.hosts import host_id, interface_of, is_loopback, local_address
from headgrid.runtime.meeting import Elsewhere, Meeting, PeerLost, Place

RANKS, PER_HOST = 4, 2


def place(rank: int, attempt: str = "0") -> Place:
    return Place(rank, RANKS, rank % PER_HOST, PER_HOST, "127.0.0.1", 29500, attempt)


def on_ranks(store: Any, work: Callable[[Meeting], Any], ranks: range = range(RANKS)) -> dict[int, Any]:
    """The result of each rank, or what it raised."""
    found: dict[int, Any] = {}

    def run(rank: int) -> None:
        try:
            found[rank] = work(Meeting(store, place(rank)))
        except HeadgridError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


@pytest.fixture
def store() -> Any:
    return dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]


def test_all_ranks_learn_where_each_one_is(store: Any) -> None:
    found = on_ranks(store, lambda each: each.arrive(20))
    assert all(found[rank] == found[0] for rank in range(RANKS))
    assert [each["host"] for each in found[0]] == [host_id()] * RANKS


def test_who_has_not_come_is_named(store: Any) -> None:
    found = on_ranks(store, lambda each: each.arrive(0.3), range(2))
    for error in found.values():
        assert isinstance(error, RankDied) and "2 of 4 ranks have not come" in str(error)
        assert error.numbers == "ranks 2, 3"


def test_an_earlier_attempt_of_the_launcher_is_not_mistaken_for_this_one(store: Any) -> None:
    on_ranks(store, lambda each: each.arrive(20))
    with pytest.raises(RankDied):
        Meeting(store, place(0, attempt="1")).arrive(0.2)


def test_what_one_rank_refuses_is_said_once_on_each_host(store: Any) -> None:
    refusal = InvalidInput("there is no such file", numbers="words.txt")

    def work(each: Meeting) -> HeadgridError | None:
        error: HeadgridError = refusal
        if each.place.rank != 3:
            with pytest.raises(Elsewhere) as caught:
                each.arrive(20)
            error = caught.value
        shown = each.settle(error)
        if shown is not None:
            each.told()
        return shown

    found = on_ranks(store, work)
    assert found[1] is None and found[3] is None
    assert found[0].block() == found[2].block() == refusal.block()
    assert found[0].exit_code == refusal.exit_code


def test_a_cause_is_said_instead_of_its_consequences(store: Any) -> None:
    cause = InvalidInput("ranks read different input")

    def work(each: Meeting) -> HeadgridError | None:
        shown = each.settle(cause if each.place.rank == 3 else PeerLost("has lost another rank"))
        if shown is not None:
            each.told()
        return shown

    found = on_ranks(store, work)
    assert found[0].block() == found[2].block() == f"rank 3: {cause.block()}"
    assert found[1] is None and found[3] is None


def test_a_rank_whose_first_is_gone_speaks_for_itself(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "TELLING_S", 0.2)
    lost = PeerLost("has lost another rank")
    assert Meeting(store, place(1)).settle(lost) is lost  # and its host's rank 0 says nothing


def arrivals(*addresses: str | None) -> list[dict[str, Any]]:
    """One rank on each host."""
    return [{"host": f"host{n}", "address": address} for n, address in enumerate(addresses)]


def test_the_interface_is_the_one_that_leads_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the launcher's name leads to the loopback interface on its own host, another host's address decides."""
    names = {"127.0.0.1": "lo", "127.0.1.1": "lo", "10.0.0.1": "eth1", "10.0.0.2": "eth1"}
    asked: list[str] = []

    def towards(address: str, port: int) -> str:
        asked.append(address)
        return "10.0.0.1"

    monkeypatch.setattr(launch, "interface_of", names.get)
    monkeypatch.setattr(launch, "local_address", towards)
    assert launch.interface_among(place(1), arrivals("10.0.0.1", "10.0.0.2")) == "eth1" and not asked
    assert launch.interface_among(place(0), arrivals("127.0.1.1", "10.0.0.2")) == "eth1" and asked == ["10.0.0.2"]
    assert launch.interface_among(place(0), arrivals("127.0.0.1", "127.0.0.1")) == "lo"  # two launchers of one host
    assert launch.interface_among(place(0), arrivals(None, "10.0.0.2")) is None


def test_this_host_s_own_ways() -> None:
    assert local_address("127.0.0.1", 1) == "127.0.0.1" and is_loopback("127.0.0.1") and not is_loopback("10.0.0.1")
    assert local_address("no-such-host.invalid", 1) is None
    assert interface_of("127.0.0.1") == "lo" and interface_of("203.0.113.9") is None
