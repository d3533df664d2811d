"""The planted slow-down is in the time that a rank tells, whatever the rank was doing."""

import time

import pytest
import torch

from headgrid.experiment import stopwatch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "barrier", lambda device: None)
    monkeypatch.setattr(stopwatch.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(stopwatch.dist, "all_gather", lambda out, mine: out[0].copy_(mine))


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_a_rank_tells_its_own_time_and_the_planted_share(share: float) -> None:
    own_s = 0.0

    def work() -> None:
        nonlocal own_s
        start = time.perf_counter()
        time.sleep(0.03)
        own_s = time.perf_counter() - start

    excesses = []
    for _ in range(5):
        _, (told,) = stopwatch.timed(CPU, work, share)
        excesses.append(told / own_s - 1)
    assert all(excess >= share for excess in excesses)
    assert min(excesses) < share + 0.01


def test_nothing_is_added_to_other_arms() -> None:
    _, (told,) = stopwatch.timed(CPU, lambda: None)
    assert told < 0.01
