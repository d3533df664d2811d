"""A rank's step on its GPU: what its events make of compute, exposed and hidden communication, idle and each call."""

import pytest
from device_fixture import ALL_GATHER, ALL_REDUCE, Device

from headgrid.experiment.breakdown.gpu import DeviceStep, device_step
from headgrid.experiment.breakdown.watch import Seen
from headgrid.runtime.collectives import Issued

ISSUED = [
    Seen(Issued("all_gather", "tp_slice", 800, overlapped=True), 1, True),
    Seen(Issued("all_reduce", "tp", 80), 0, False),
]


def step(gather_at: float = 60, gap: float = 0, calls: list[Seen] | None = None) -> DeviceStep | str:
    """Begun at 46; a product 50 to 90, a sum to 100, a product to 150 (after a gap); weights travel for 20."""
    device = Device()
    device.run(ALL_GATHER, gather_at, 20, stream=20, launched=44)
    device.run("gemm", 50, 40, stream=7)
    device.run(ALL_REDUCE, 90, 10, stream=7)
    device.run("gemm", 100 + gap, 50, stream=7)
    return device_step(device.events, ISSUED if calls is None else calls, alone=False)


def parts(found: DeviceStep | str) -> tuple[int, ...]:
    assert isinstance(found, DeviceStep)
    whole = found.account
    return tuple(ns // 1000 for ns in (whole.compute, whole.exposed, whole.idle, whole.hidden, whole.lead, whole.span))


def test_each_part_and_each_call() -> None:
    found = step()
    assert parts(found) == (90, 10, 4, 20, 4, 104)
    assert isinstance(found, DeviceStep) and found.unmatched is None
    gather, reduce = found.calls
    assert (gather.gathers, gather.layer, gather.time, gather.exposed, gather.hidden) == (True, 1, 20_000, 0, 20_000)
    assert (reduce.layer, reduce.time, reduce.exposed, reduce.hidden) == (0, 10_000, 10_000, 0)


def test_a_hidden_gather_that_comes_later_is_exposed() -> None:
    """Behind all compute: by its length, and nothing else changes but the span."""
    found = step(gather_at=150)
    assert parts(found) == (90, 30, 4, 0, 4, 124)
    assert isinstance(found, DeviceStep)
    assert (found.calls[0].exposed, found.calls[0].hidden) == (20_000, 0)
    assert parts(step(gather_at=140)) == (90, 20, 4, 10, 4, 114)


def test_a_planted_gap_is_idle_and_nowhere_else() -> None:
    assert parts(step(gap=13)) == (90, 10, 4 + 13, 20, 4, 104 + 13)
    found = step(gap=13)
    assert isinstance(found, DeviceStep)
    idle = [(bar.start // 1000, bar.end // 1000) for bar in found.bars if bar.category == "idle"]
    assert idle == [(3, 7), (57, 70)]


def test_bars_name_what_the_kernels_were() -> None:
    found = step()
    assert isinstance(found, DeviceStep)
    named = {(bar.track, bar.name, bar.category) for bar in found.bars}
    assert named == {
        ("stream 7", "gemm", "compute"),
        ("stream 7", "all_reduce tp, layer 0", "communication"),
        ("stream 20", "weights, layer 1", "communication"),
        ("idle", "idle", "idle"),
        ("step", "step", "phase"),
    }


@pytest.mark.parametrize("issued", [ISSUED[:1], [*ISSUED, ISSUED[1]], ISSUED[::-1]], ids=("fewer", "more", "swapped"))
def test_what_does_not_match_leaves_the_parts_but_no_times(issued: list[Seen]) -> None:
    found = step(calls=issued)
    assert parts(found) == (90, 10, 4, 20, 4, 104)
    assert isinstance(found, DeviceStep) and found.unmatched
    assert all(call.time is None and call.exposed is None for call in found.calls)


def test_no_events_give_a_reason() -> None:
    assert "recorded nothing" in str(device_step([], ISSUED, alone=False))
