"""Which axes stay inside a host, and what crosses, against counts made link by link."""

import random
from collections import Counter, defaultdict

import pytest

from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.placement import across_bytes, crossings, host_numbers, slices_apart, spans_hosts
from headgrid.layout.traffic import Collective, decode_collectives, prefill_collectives
from headgrid.spec.model import find_model
from headgrid.spec.workload import Workload

MODEL = find_model("seed-small")
WORKLOAD = Workload(batch=8, seq=32, decode_steps=2, dtype="float32")
LAYOUTS = ("tp4", "n2m2:batch", "n1m4:batch", "n1m4:sequence", "n2m2:batch+gathered", "tp2pp2", "n1m2pp2:gather", "dp4")
PAIRS = (0, 0, 1, 1)


def by_links(layout: Layout, hosts: tuple[int, ...], rank: int, call: Collective) -> float:
    """Bytes over links to other hosts, link by link: a ring's one link, or a message to each."""
    axis = "pp" if call.axis == "pp_back" else call.axis
    ring = next(group for group in layout.axis_ranks(axis) if rank in group)  # type: ignore[arg-type]
    if call.kind == "recv":
        return 0
    targets = [ring[(ring.index(rank) + 1) % len(ring)]]
    if call.kind == "all_to_all":
        targets = [other for other in ring if other != rank]
    return sum(call.bytes / len(targets) for target in targets if hosts[target] != hosts[rank])


@pytest.mark.parametrize("text", LAYOUTS)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("hosts", [PAIRS, (0, 1, 1, 1), (0, 1, 2, 3), (0, 0, 0, 0)])
def test_crossings_are_what_goes_over_links_between_hosts(text: str, phase: str, hosts: tuple[int, ...]) -> None:
    layout = parse_layout(text)
    predicted = prefill_collectives if phase == "prefill" else decode_collectives
    across, sent = defaultdict[str, float](float), Counter[str]()
    for rank in range(4):
        for call, count in predicted(MODEL, layout, WORKLOAD, rank).items():
            across[call.axis] += count * by_links(layout, hosts, rank, call)
            sent[call.axis] += count * call.bytes * (call.kind != "recv")
    found = crossings(MODEL, layout, WORKLOAD, hosts, phase)
    assert {row.axis for row in found} == {axis for axis in sent if sent[axis]}
    for row in found:
        assert row.across_bytes == pytest.approx(across[row.axis], rel=1e-3, abs=8)
        assert row.inside_bytes + row.across_bytes == sent[row.axis]
    if len(set(hosts)) == 1:
        assert not any(row.across_bytes for row in found)


def test_the_slice_axis_stays_inside_where_slices_divide_the_ranks_of_a_host() -> None:
    """For random layouts: exactly where m divides the ranks of a host, since the slice varies fastest."""
    draw = random.Random(0)
    for _ in range(200):
        n, m, pp, dp, per_host = (draw.choice((1, 2, 3, 4)) for _ in range(5))
        layout = Layout(num_head_groups=n, num_dim_slices=m, pp=pp, dp=dp, exchange="batch" if m > 1 else "none")
        hosts = tuple(rank // per_host for rank in range(layout.ranks))
        inside = m == 1 or per_host % m == 0 or layout.ranks <= per_host
        assert spans_hosts(layout, "tp_slice", hosts) == (not inside), (layout, per_host)
        sentence = slices_apart(layout, hosts)
        assert (sentence is None) == inside
        if sentence is not None:
            assert str(layout) in sentence and f"{m} slices" in sentence and str(per_host) in sentence


def test_head_groups_cross_where_slices_do_not() -> None:
    assert spans_hosts(parse_layout("n2m2:batch"), "tp_head", PAIRS)
    assert not spans_hosts(parse_layout("n2m2:batch"), "tp_slice", PAIRS)
    assert spans_hosts(parse_layout("n2m2:batch"), "tp_slice", (0, 1, 0, 1))  # ranks that were numbered in turns
    assert across_bytes(parse_layout("tp2pp2"), PAIRS, 0, Collective("send", "pp", 7)) == 7
    assert across_bytes(parse_layout("tp2pp2"), PAIRS, 2, Collective("recv", "pp", 7)) == 0


def test_hosts_are_numbered_by_first_appearance() -> None:
    assert host_numbers(["b", "b", "a", "b"]) == (0, 0, 1, 0)
