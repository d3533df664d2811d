"""What is measured of calls that take turns: no time for what is awaited later, no second counted twice."""

from typing import Any

import pytest
import torch

from headgrid.experiment.observe import CollectiveTimer
from headgrid.report.format import percent
from headgrid.report.plots import timeline
from headgrid.runtime.collectives import Issued


@pytest.mark.parametrize("order", [(True, False), (False, True), (True, True)])
def test_a_row_with_an_overlapped_collective_has_no_time(order: tuple[bool, bool]) -> None:
    assert _row(order) == {"calls": 2, "bytes_per_rank": 16, "time_s": None}


def test_a_row_without_one_has() -> None:
    assert _row((False, False))["time_s"] >= 0


def _row(overlapped: tuple[bool, bool]) -> dict[str, Any]:
    timer = CollectiveTimer(torch.device("cpu"))
    for each in overlapped:
        issued = Issued("all_reduce", "tp", 8, each)
        timer.before(issued)
        timer.after(issued, torch.zeros(2))
    (row,) = timer.totals(()).values()
    return row


@pytest.mark.parametrize(
    ("spans", "share"),
    [
        ([(0.0, 1.0), (1.0, 2.0)], 0.0),
        ([(0.0, 2.0), (0.5, 3.0), (3.0, 4.0)], 0.0),
        ([(0.0, 2.0), (0.5, 1.0), (3.0, 4.0)], 0.25),
        ([(0.0, 1.0), (3.0, 4.0)], 0.5),
    ],
)
def test_a_stage_is_idle_where_no_micro_batch_is_in_it(spans: list[tuple[float, float]], share: float) -> None:
    keys = {"stage": 0, "step": 0, "phase": "prefill"}
    events = [keys | {"micro_batch": k, "start_s": a, "end_s": b} for k, (a, b) in enumerate(spans)]
    drawn = timeline("turns", events, 1)
    assert drawn is not None
    assert f"idle for {percent(share)} of the time" in drawn[1]
