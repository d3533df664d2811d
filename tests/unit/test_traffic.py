"""Predicted traffic and FLOPs against the closed formulas of DESIGN.md, where everything divides.

That the runtime issues exactly what is predicted is what tests/parallel shows, also where nothing divides.
"""

from collections import Counter

import pytest
from grid import model

from headgrid.layout.flops import decode_flops, model_flops, prefill_flops
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.traffic import Collective, decode_collectives, prefill_collectives
from headgrid.spec.workload import Workload

SPEC = model(16, 8, 32, num_layers=4, hidden_size=64, mlp_hidden_size=128, vocab_size=256, max_positions=64)
WORK = Workload(batch=8, seq=16, decode_steps=4, dtype="float32")
H, K, D_HEAD, HIDDEN, BATCH, SEQ, E = 16, 8, 32, 64, 8, 16, 4


def sent(calls: Counter[Collective], axis: str, kind: str = "") -> int:
    return sum(call.bytes * n for call, n in calls.items() if call.axis == axis and kind in ("", call.kind))


@pytest.mark.parametrize(("n", "m"), [(4, 4), (2, 8), (8, 2), (1, 16)])
@pytest.mark.parametrize(("phase", "queries"), [(prefill_collectives, SEQ), (decode_collectives, 1)])
def test_traffic_of_the_exchanges_is_that_of_the_table(phase, queries: int, n: int, m: int) -> None:
    tokens = BATCH * queries
    gather = phase(SPEC, parse_layout(f"n{n}m{m}:gather"), WORK, 1)
    assert sent(gather, "tp_slice") * m * n == SPEC.num_layers * (m - 1) * tokens * D_HEAD * (H + K) * E
    if BATCH % m == 0:
        batch = phase(SPEC, parse_layout(f"n{n}m{m}:batch"), WORK, 1)
        assert sent(batch, "tp_slice") * m * n * m == SPEC.num_layers * (m - 1) * tokens * D_HEAD * (2 * H + 2 * K) * E


@pytest.mark.parametrize("text", ["tp4", "n2m2:batch", "n2m2:gather+concat", "tp4pp2", "n2m2dp2:batch"])
@pytest.mark.parametrize(("phase", "queries"), [(prefill_collectives, SEQ), (decode_collectives, 1)])
def test_traffic_of_the_layers_halves(phase, queries: int, text: str) -> None:
    layout = parse_layout(text)
    calls, layers = phase(SPEC, layout, WORK, 0), SPEC.num_layers // layout.pp
    hidden = BATCH // layout.dp * queries * HIDDEN * E
    halves = layers * (2 if layout.output == "reduce" else 1) + 1  # the embedding is summed as well
    assert sent(calls, "tp", "all_reduce") == halves * 2 * (layout.tp - 1) * hidden // layout.tp
    assert sent(calls, "pp") == (hidden if layout.pp > 1 else 0)


@pytest.mark.parametrize("text", ["tp1", "dp8"])
def test_ranks_that_share_nothing_issue_nothing(text: str) -> None:
    for phase in (prefill_collectives, decode_collectives):
        assert phase(SPEC, parse_layout(text), WORK, 0) == Counter()


def test_every_send_is_received() -> None:
    for phase in (prefill_collectives, decode_collectives):
        first, last = (phase(SPEC, parse_layout("tp4pp2"), WORK, rank) for rank in (1, 5))
        for axis, source, sink in (("pp", first, last), ("pp_back", last, first)):
            assert sent(source, axis, "send") == sent(sink, axis, "recv") > 0
            assert sent(source, axis, "recv") == sent(sink, axis, "send") == 0


EVEN = ["tp4", "n2m2:batch", "n1m4:batch", "tp4:concat", "n2m2:batch+concat", "dp4", "tp2dp2", "n2m2dp2:batch"]


@pytest.mark.parametrize("text", EVEN)
def test_layouts_that_copy_no_work_share_it_evenly(text: str) -> None:
    layout = parse_layout(text)
    for count in (prefill_flops, lambda *a: decode_flops(*a, keys=20)):
        shares = [count(SPEC, layout, WORK, rank) for rank in range(layout.ranks)]
        assert len(set(shares)) == 1
        assert sum(shares) == count(SPEC, Layout(), WORK, 0)


def test_stages_share_the_work_but_for_the_head() -> None:
    for count in (prefill_flops, lambda *a: decode_flops(*a, keys=20)):
        assert sum(count(SPEC, parse_layout("tp2pp4"), WORK, r) for r in range(8)) == count(SPEC, Layout(), WORK, 0)


@pytest.mark.parametrize("m", [2, 4, 8])
def test_gather_does_m_plus_one_halves_of_the_attention(m: int) -> None:
    """Scores over whole heads on every slice, the product with V over a slice: (m + 1) / 2 of a rank's even share."""
    wide = Workload(batch=8, seq=32, decode_steps=1)
    gather, batch = (prefill_flops(SPEC, parse_layout(f"n1m{m}:{name}"), wide, 0) for name in ("gather", "batch"))
    attention = 4 * SPEC.num_layers * BATCH * H * 32 * 32 * D_HEAD // m
    assert gather - batch == attention * (m + 1) // 2 - attention


def test_flops_by_hand() -> None:
    """One layer of two heads: projections, attention, W_O and the MLP for all tokens, the head for the last ones."""
    spec = model(2, 1, 4, num_layers=1, hidden_size=6, mlp_hidden_size=5, vocab_size=7)
    work = Workload(batch=3, seq=5, decode_steps=1)
    weights = 6 * (2 + 1 + 1) * 4 + 2 * 4 * 6 + 2 * 6 * 5
    attention, head = 2 * 3 * 2 * 5 * 5 * (4 + 4), 2 * 3 * 6 * 7
    assert prefill_flops(spec, Layout(), work, 0) == 2 * weights * 15 + attention + head
    assert decode_flops(spec, Layout(), work, 0, keys=6) == 2 * weights * 3 + 2 * 3 * 2 * 6 * (4 + 4) + head
    assert model_flops(spec, work) == 2 * weights * 15 + attention // 2 + head
