"""Predicted traffic and FLOPs against the closed formulas of DESIGN.md, where everything divides.

That the runtime issues exactly what is predicted is what tests/parallel shows, also where nothing divides.
"""

from collections import Counter
from dataclasses import replace

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


@pytest.mark.parametrize(("n", "m"), [(4, 4), (2, 8), (8, 2), (4, 2)])
def test_traffic_of_sequence_in_prefill_is_that_of_the_table(n: int, m: int) -> None:
    """Q to its share of positions and the output back, K and V gathered."""
    calls = prefill_collectives(SPEC, parse_layout(f"n{n}m{m}:sequence"), WORK, 1)
    once = SPEC.num_layers * (m - 1) * BATCH * SEQ * D_HEAD * E
    assert sent(calls, "tp_slice") * m * n * m == once * (2 * H + 2 * K * m)
    assert sent(calls, "tp_slice", "all_to_all") * m * n * m == once * 2 * H
    assert sent(calls, "tp_slice", "all_gather") * m * n == once * 2 * K


@pytest.mark.parametrize(("n", "m"), [(4, 4), (2, 8), (8, 2), (1, 16)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_traffic_of_sequence_in_decode_is_that_of_new_rows_and_of_parts_and_does_not_depend_on_the_length(
    dtype, n: int, m: int
) -> None:
    work, layout = replace(WORK, dtype=dtype), parse_layout(f"n{n}m{m}:sequence")
    calls, wide = decode_collectives(SPEC, layout, work, 1), max(4, work.element_bytes)
    gathered = (m - 1) * BATCH * (H + 2 * K) * D_HEAD // (n * m) * work.element_bytes
    parts = (m - 1) * BATCH * H // n * (D_HEAD // m + 1) * wide  # each with a log-sum-exp, in fp32 or wider
    assert sent(calls, "tp_slice") == SPEC.num_layers * (gathered + parts)
    assert calls == decode_collectives(SPEC, layout, replace(work, seq=SEQ // 2), 1)
    scores = parse_layout(f"n{n}m{m}:scores")
    assert decode_collectives(SPEC, scores, work, 1) != decode_collectives(SPEC, scores, replace(work, seq=SEQ // 2), 1)


@pytest.mark.parametrize(("n", "m"), [(4, 4), (2, 8), (8, 2), (1, 16)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_traffic_of_scores_is_that_of_the_table_in_fp32_or_wider(dtype, n: int, m: int) -> None:
    """Of all keys that are there in prefill, of all that the cache has room for in decode."""
    work, layout = replace(WORK, dtype=dtype), parse_layout(f"n{n}m{m}:scores")
    once, wide = SPEC.num_layers * 2 * (m - 1) * BATCH * H, max(4, work.element_bytes)
    prefill, decode = (phase(SPEC, layout, work, 1) for phase in (prefill_collectives, decode_collectives))
    assert sent(prefill, "tp_slice") * m * n == once * SEQ * SEQ * wide
    assert sent(decode, "tp_slice") * m * n == once * (SEQ + 4) * wide


def test_chunked_prefill_exchanges_later_positions_as_decode_does() -> None:
    layout = parse_layout("n2m2:sequence")
    whole, chunked = (
        prefill_collectives(SPEC, layout, replace(WORK, chunk_positions=positions), 1) for positions in (0, SEQ // 2)
    )
    half = replace(WORK, seq=SEQ // 2)
    first = sent(prefill_collectives(SPEC, layout, half, 1), "tp_slice")
    later = sent(decode_collectives(SPEC, layout, half, 1), "tp_slice") * SEQ // 2
    assert sent(chunked, "tp_slice") == first + later != sent(whole, "tp_slice") == 2 * first
    for text in ("n2m2:batch", "n2m2:gather", "tp4", "tp4:concat"):  # these exchange each position by itself
        calls = [
            prefill_collectives(SPEC, parse_layout(text), replace(WORK, chunk_positions=p), 1) for p in (0, SEQ // 2)
        ]
        for axis in ("tp", "tp_slice"):
            assert sent(calls[0], axis) == sent(calls[1], axis)


@pytest.mark.parametrize("text", ["tp4", "n2m2:batch", "n2m2:sequence", "n4m2:scores", "tp4pp2"])
def test_a_sharded_residual_moves_in_two_halves_what_an_all_reduce_moves(text: str) -> None:
    """All-gather and reduce-scatter for each half of a layer; last positions are summed in the end."""
    plain, sharded = (parse_layout(text + more) for more in ("", "+sharded" if ":" in text else ":sharded"))
    calls, tp, layers = prefill_collectives(SPEC, sharded, WORK, 0), plain.tp, SPEC.num_layers // plain.pp
    hidden = BATCH * SEQ * HIDDEN * E * (tp - 1) // tp
    assert sent(calls, "tp", "reduce_scatter") == (2 * layers + 1) * hidden
    last = BATCH * HIDDEN * E
    everywhere = sent(calls, "tp", "all_gather")
    logits = BATCH * 256 // tp * E * (tp - 1) if plain.pp == 1 else 0
    assert everywhere == 2 * layers * hidden + logits
    assert sent(calls, "tp", "all_reduce") == (2 * (tp - 1) * last // tp if plain.pp == 1 else 0)
    assert (
        sent(calls, "pp") * tp
        == (BATCH * SEQ * HIDDEN * E if plain.pp > 1 else 0)
        == sent(prefill_collectives(SPEC, plain, WORK, 0), "pp")
    )
    assert sent(calls, "tp_slice") == sent(prefill_collectives(SPEC, plain, WORK, 0), "tp_slice")


@pytest.mark.parametrize("text", ["tp2pp2", "tp2pp2:sharded", "n2m2pp2:sequence"])
def test_an_fp32_residual_is_sent_as_it_is_kept_and_summed_in_the_models_dtype(text: str) -> None:
    half, layout = replace(WORK, dtype="float16"), parse_layout(text)
    wide = replace(layout, residual_dtype="fp32")
    narrow_calls, wide_calls = (prefill_collectives(SPEC, each, half, 0) for each in (layout, wide))
    assert sent(wide_calls, "pp") == 2 * sent(narrow_calls, "pp") > 0
    for axis in ("tp", "tp_slice"):
        assert sent(wide_calls, axis) == sent(narrow_calls, axis)
    assert prefill_collectives(SPEC, wide, WORK, 0) == prefill_collectives(SPEC, layout, WORK, 0), "fp32 is no wider"


def test_norms_of_sliced_heads_reduce_a_sum_of_squares_for_each_head() -> None:
    normed = replace(SPEC, qk_norm=True)
    for dtype, wide in (("float16", 4), ("float64", 8)):
        work = replace(WORK, dtype=dtype)
        for text, m in (("n2m2:batch", 2), ("n1m4:sequence", 4), ("n1m4:scores", 4)):
            layout = parse_layout(text)
            more = prefill_collectives(normed, layout, work, 1) - prefill_collectives(SPEC, layout, work, 1)
            size = BATCH * SEQ * (H + K) // layout.num_head_groups * wide
            assert more == {Collective("all_reduce", "tp_slice", 2 * (m - 1) * size // m): SPEC.num_layers}
        assert prefill_collectives(normed, parse_layout("tp4"), work, 1) == prefill_collectives(
            SPEC, parse_layout("tp4"), work, 1
        )


def test_only_ending_prompts_want_logits() -> None:
    """In chunked prefill a call in which no prompt ends issues nothing for them, and short prompts end early."""
    lengths = (3, 16, 16, 8, 16, 16, 2, 9)
    work = replace(WORK, prompt_lengths=lengths, chunk_positions=4)
    calls = prefill_collectives(SPEC, parse_layout("tp4"), work, 1)
    rows = Counter(
        call.bytes // (3 * 64 * E) for call, n in calls.items() for _ in range(n) if call.kind == "all_gather"
    )
    assert rows == {2: 1, 1: 2, 4: 1}


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


EVEN = [
    *("tp4", "n2m2:batch", "n1m4:batch", "tp4:concat", "n2m2:batch+concat", "dp4", "tp2dp2", "n2m2dp2:batch"),
    *("n2m2:scores", "n1m4:scores", "tp4:sharded", "n2m2:batch+sharded+fp32"),
]


@pytest.mark.parametrize("text", EVEN)
def test_layouts_that_copy_no_work_share_it_evenly(text: str) -> None:
    layout = parse_layout(text)
    for count in (prefill_flops, lambda *a: decode_flops(*a, step=3)):
        shares = [count(SPEC, layout, WORK, rank) for rank in range(layout.ranks)]
        assert len(set(shares)) == 1
        assert sum(shares) == count(SPEC, Layout(), WORK, 0)


def test_stages_share_the_work_but_for_the_head() -> None:
    for count in (prefill_flops, lambda *a: decode_flops(*a, step=3)):
        assert sum(count(SPEC, parse_layout("tp2pp4"), WORK, r) for r in range(8)) == count(SPEC, Layout(), WORK, 0)


@pytest.mark.parametrize("m", [2, 4, 8])
def test_sequence_shares_the_work_and_saves_part_of_the_masked_half(m: int) -> None:
    """Spans of 1/(2 m) of the queries meet the keys up to their end, the j-th and the j-th last on slice j: 2 m + 1
    small squares on each.
    """
    layout = parse_layout(f"n1m{m}:sequence")
    shares = [prefill_flops(SPEC, layout, WORK, rank) for rank in range(m)]
    square = 4 * SPEC.num_layers * BATCH * H * SEQ * SEQ * D_HEAD
    small = square // (4 * m * m)
    assert len(set(shares)) == 1
    assert sum(shares) == prefill_flops(SPEC, Layout(), WORK, 0) - square + m * (2 * m + 1) * small
    last = [decode_flops(SPEC, layout, replace(WORK, decode_steps=16), rank, step=15) for rank in range(m)]
    assert len(set(last)) == 1
    assert sum(last) == decode_flops(SPEC, Layout(), replace(WORK, decode_steps=16), 0, step=15)
    bidirectional = replace(SPEC, is_causal=False)
    whole = [prefill_flops(bidirectional, layout, WORK, rank) for rank in range(m)]
    assert sum(whole) == prefill_flops(bidirectional, Layout(), WORK, 0)


def test_windows_and_chunks_save_the_keys_that_no_query_of_a_call_sees() -> None:
    spec, pair = replace(SPEC, num_layers=2, max_positions=99), 2 * 2 * H * D_HEAD * BATCH
    windowed = replace(spec, sliding_window=5, full_attention_layers=(1,))  # the first layer of two
    full = decode_flops(spec, Layout(), WORK, 0, step=3)
    assert full - decode_flops(windowed, Layout(), WORK, 0, step=3) == pair * (20 - 5)
    quarters = replace(WORK, chunk_positions=4)
    saved = prefill_flops(spec, Layout(), WORK, 0) - prefill_flops(spec, Layout(), quarters, 0)
    assert saved == 2 * pair * (16 * 16 - 4 * (4 + 8 + 12 + 16))
    more = prefill_flops(spec, Layout(), quarters, 0) - prefill_flops(windowed, Layout(), quarters, 0)
    assert more == pair * 4 * (0 + 0 + 4 + 8), "a call of 4 queries sees 8 keys at most"


def test_ragged_prompts_are_padded_in_prefill_and_as_long_as_they_are_in_decode() -> None:
    ragged = replace(WORK, prompt_lengths=(1, 16, 3, 16, 16, 8, 2, 16))
    assert prefill_flops(SPEC, Layout(), ragged, 0) == prefill_flops(SPEC, Layout(), WORK, 0)
    saved = decode_flops(SPEC, Layout(), WORK, 0, step=2) - decode_flops(SPEC, Layout(), ragged, 0, step=2)
    assert saved == 4 * SPEC.num_layers * H * D_HEAD * (15 + 13 + 8 + 14)


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
    assert decode_flops(spec, Layout(), work, 0, step=0) == 2 * weights * 3 + 2 * 3 * 2 * 6 * (4 + 4) + head
    assert model_flops(spec, work) == 2 * weights * 15 + attention // 2 + head
