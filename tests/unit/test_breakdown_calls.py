"""What of a collective is waiting and what is transfer, which calls belong together, and what rows add up to."""

from itertools import pairwise

import pytest

from headgrid.experiment.breakdown.calls import Call, role, rows, transfers
from headgrid.layout.layout import parse_layout


def reduce(time: int | None, layer: int | None = 0, *, exposed: int | None = None, axis: str = "tp") -> Call:
    exposed = time if exposed is None else exposed
    hidden = None if time is None or exposed is None else time - exposed
    return Call("all_reduce", axis, 100, layer, False, time, exposed, hidden)


def test_the_rank_that_comes_last_tells_the_transfer() -> None:
    ranks = [[reduce(50), reduce(12)], [reduce(10), reduce(40)]]
    assert transfers(ranks, parse_layout("tp2")) == [[10, 12], [10, 12]]
    found, why = rows(ranks, parse_layout("tp2"))
    assert why is None
    (row,) = found
    assert row["role"] == "TP all-reduce"
    assert (row["ranks"], row["calls"], row["bytes"]) == (2, 4, 400)
    assert row["time_s"] == pytest.approx(56e-9)
    assert row["transfer_s"] == pytest.approx(22e-9)
    assert row["wait_s"] == pytest.approx(34e-9)
    assert row["bus_bytes_per_s"] == round(200 / 22e-9)


def test_groups_do_not_mix() -> None:
    """Ranks 0, 1 share a slice axis, and 2, 3: neither waits for the other pair."""
    ranks = [[reduce(time, axis="tp_slice")] for time in (5, 9, 70, 90)]
    assert transfers(ranks, parse_layout("n2m2:batch")) == [[5], [5], [70], [70]]
    assert transfers([[reduce(time)] for time in (5, 9, 70, 90)], parse_layout("tp4")) == [[5]] * 4


def test_messages_are_matched_by_their_two_ends() -> None:
    """Stage 1 of 3 receives from stage 0 and sends to stage 2; tokens go from the last stage to the first."""

    def message(kind: str, time: int, axis: str = "pp") -> Call:
        return Call(kind, axis, 8, None, False, time, time, 0)

    ranks = [
        [message("send", 30), message("recv", 500, "pp_back")],
        [message("recv", 4), message("send", 6)],
        [message("recv", 90), message("send", 7, "pp_back")],
    ]
    assert transfers(ranks, parse_layout("pp3")) == [[4, 7], [4, 6], [6, 7]]


def test_a_call_that_a_rank_lacks_is_told() -> None:
    assert "issued by 1 of them" in str(transfers([[reduce(5)], []], parse_layout("tp2")))
    found, why = rows([[reduce(5), reduce(6)], [reduce(5)]], parse_layout("tp2"))
    assert why is not None and found[0]["wait_s"] is None and found[0]["time_s"] is not None


def test_one_unknown_time_leaves_no_sum() -> None:
    (row,), _ = rows([[reduce(5), reduce(None, exposed=3)], [reduce(5), reduce(8)]], parse_layout("tp2"))
    assert row["time_s"] is None and row["transfer_s"] is None and row["bus_bytes_per_s"] is None
    assert row["exposed_s"] == pytest.approx((5 + 3 + 5 + 8) / 2 * 1e-9)


def test_layers_are_means_over_ranks_then_median_and_largest() -> None:
    times = ((10, 20, 90), (30, 40, 10))
    ranks = [[reduce(time, layer) for layer, time in enumerate(mine)] for mine in times]
    (row,), _ = rows(ranks, parse_layout("tp2"))
    assert row["layers"]["count"] == 3
    assert row["layers"]["time_s"]["median"] == pytest.approx(30e-9)
    assert row["layers"]["time_s"]["max"] == pytest.approx(50e-9)
    assert row["layers"]["time_s"]["max_layer"] == 2


def test_every_call_has_one_role() -> None:
    tp, grid = parse_layout("tp4"), parse_layout("n2m2:gather+concat")
    calls = [
        (reduce(1), tp, "TP all-reduce"),
        (reduce(1), grid, "inter-group reduce"),
        (reduce(1), parse_layout("n1m4:batch"), "inter-slice reduce"),
        (reduce(1, None), tp, "embedding and logits"),
        (Call("all_gather", "tp", 8, 0), grid, "inter-group concatenation"),
        (Call("all_gather", "tp", 8, 0), parse_layout("tp4:sharded"), "sequence-parallel residual"),
        (Call("all_gather", "tp_slice", 8, 0), grid, "intra-group exchange"),
        (Call("all_gather", "tp_slice", 8, 0, gathers=True), parse_layout("n2m2:batch+gathered"), "weight gather"),
        (Call("send", "pp", 8), parse_layout("tp2pp2"), "hidden states between stages"),
        (Call("recv", "pp_back", 8), parse_layout("tp2pp2"), "tokens back to the first stage"),
    ]
    found = [role(call, layout) for call, layout, _ in calls]
    assert found == [expected for *_, expected in calls]
    assert all(one != other for one, other in pairwise(found))
