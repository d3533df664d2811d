"""Times of collectives: those that overlap with computing have none, whatever equals them."""

import pytest
import torch

from headgrid.experiment.observe import CollectiveTimer
from headgrid.layout.traffic import Collective
from headgrid.runtime.collectives import Issued

OF_LAYERS = frozenset({Collective("all_gather", "tp_slice", 64)})


def _totals(*overlapped: bool) -> dict:
    timer = CollectiveTimer(torch.device("cpu"))
    for each in overlapped:
        issued = Issued("all_gather", "tp_slice", 64, each)
        timer.before(issued)
        timer.after(issued, torch.zeros(1))
    return timer.totals(OF_LAYERS)["all_gather/tp_slice/layer"]


@pytest.mark.parametrize("overlapped", [(True,), (True, False), (False, True), (False, True, False)], ids=str)
def test_an_equal_call_that_is_waited_for_gives_an_overlapped_one_no_time(overlapped: tuple[bool, ...]) -> None:
    row = _totals(*overlapped)
    assert (row["calls"], row["bytes_per_rank"], row["time_s"]) == (len(overlapped), 64 * len(overlapped), None)


def test_calls_that_are_waited_for_have_a_time() -> None:
    assert 0 < _totals(False, False)["time_s"] < 1
