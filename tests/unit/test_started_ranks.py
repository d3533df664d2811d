"""What is planned for processes that a launcher has started: their memory, their launches, their sizes."""

import pytest

from headgrid.errors import NotAvailable
from headgrid.experiment import machine, plan, scale
from headgrid.runtime import launch

SMALL = {"model": "tiny", "batch": 4, "seq": 16, "decode_steps": 2, "device": "cpu"}


@pytest.mark.parametrize(
    ("started", "ranks", "here"),
    [(None, 16, 16), ((0, 0), 16, 4), ((5, 1), 16, 4), ((5, 1), 6, 2), ((5, 1), 2, 1), ((0, 0), 2, 2)],
)
def test_free_memory_is_shared_by_the_ranks_of_the_host(
    started: tuple[int, int] | None, ranks: int, here: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in zip(names, (*started, 16, 4), strict=True) if started is not None else ():
        monkeypatch.setenv(name, str(value))
    assert launch.ranks_here(ranks) == here
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 48 << 30}))
    assert machine.look(ranks, "cpu").free_bytes == (48 << 30) // here


def test_one_start_of_a_launcher_serves_any_number_of_launches() -> None:
    design, _ = plan.make(plan.Wishes(**SMALL, arms=("tp2",), launches=5, started_ranks=2))
    assert design.protocol.launches == 5 and design.ranks == 2


def test_sizes_of_a_study_are_of_the_ranks_that_were_started() -> None:
    def sizes(counts: tuple[int, ...] | None, started: int | None) -> list[int]:
        study, _, _ = scale.make(plan.Wishes(**SMALL, started_ranks=started), counts, ("tp",), ("strong",))
        return [point.ranks for point in study.points]

    assert sizes(None, 8) == [1, 2, 4, 8] and sizes(None, 2) == [1, 2] and sizes(None, None) == [1, 2, 4]
    assert sizes((1, 4), 6) == [1, 4]
    with pytest.raises(NotAvailable, match="4 ranks, but the launcher started 3"):
        sizes((1, 4), 3)
    with pytest.raises(NotAvailable, match="1 started ranks are nothing to scale over"):
        sizes(None, 1)
