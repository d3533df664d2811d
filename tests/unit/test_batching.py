"""Micro-batches: every sequence passes through the model once, where its keys and values are kept."""

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgrid.layout import batching
from headgrid.layout.batching import (
    MicroBatch,
    cache_rows,
    cached_positions,
    decode_micro_batches,
    owned_rows,
    pieces,
    position_chunks,
    prefill_calls,
    query_share,
    replica_rows,
    score_blocks,
    visible,
)
from headgrid.layout.layout import EXCHANGES, Layout, parse_layout
from headgrid.layout.span import Span, indices, total
from headgrid.spec.workload import Workload

LAYOUTS = [
    parse_layout(text)
    for text in (
        *("tp1", "tp4", "tp2pp2", "pp4", "dp3", "tp2pp2dp2", "n2m2:gather", "n2m3pp2:gather+concat", "m2dp2:gather"),
        *("n2m2:batch", "m4:batch", "m3pp2:batch", "n2m2dp2:batch", "m2pp4dp2:batch+concat"),
        *("n2m2:sequence", "m3pp2:sequence+sharded", "n2m2dp2:scores", "tp2pp2:sharded+fp32"),
    )
]
GATHERED = [parse_layout(f"{degrees}:batch+gathered") for degrees in ("m2", "n2m3", "m2dp2", "m2pp2")]


def prefill_micro_batches(layout: Layout, work: Workload, replica: int) -> tuple[MicroBatch, ...]:
    """Each once, whatever the number of calls that it takes."""
    return tuple(dict.fromkeys(call.micro_batch for call in prefill_calls(layout, work, replica)))


PLANS: list[Callable[..., tuple[MicroBatch, ...]]] = [prefill_micro_batches, decode_micro_batches]


def workload(batch: int, seq: int = 10, chunk: int = 16_384, positions: int = 0) -> Workload:
    return Workload(batch=batch, seq=seq, decode_steps=2, chunk_tokens=chunk, chunk_positions=positions)


def assert_plan_covers(layout: Layout, work: Workload, plan: Callable[..., tuple[MicroBatch, ...]]) -> None:
    """Each row once over all replicas, and each owner's part among the rows that the owner caches."""
    rows: list[int] = []
    for replica in range(layout.dp):
        for micro_batch in plan(layout, work, replica):
            rows += micro_batch.rows()
            assert micro_batch.size == len(micro_batch.rows()) > 0
            assert len(micro_batch.parts) == (layout.num_dim_slices if layout.exchange == "batch" else 1)
    assert sorted(rows) == list(range(work.batch))
    assert_owners_attend(layout, work, plan)


def assert_owners_attend(layout: Layout, work: Workload, plan: Callable[..., tuple[MicroBatch, ...]]) -> None:
    """What a rank attends to over all micro-batches is exactly what it caches, in order."""
    for rank in range(layout.ranks):
        at = layout.coordinates(rank)
        index = at.slice if layout.exchange == "batch" else 0
        parts = [micro_batch.parts[index] for micro_batch in plan(layout, work, at.dp)]
        assert indices(parts) == indices((owned_rows(layout, work.batch, rank),))


@pytest.mark.parametrize("plan", PLANS)
def test_micro_batches_hold_every_sequence_once_and_each_where_it_is_cached(plan: Callable) -> None:
    for layout, batch, chunk in itertools.product(LAYOUTS, range(1, 14), (1, 25, 1000)):
        if batch >= layout.dp:
            assert_plan_covers(layout, workload(batch, chunk=chunk), plan)


def test_prefill_keeps_to_the_tokens_of_a_call_where_whole_sequences_allow_it() -> None:
    for layout, batch, chunk in itertools.product(LAYOUTS, range(1, 14), (1, 25, 47, 1000)):
        if batch < layout.dp:
            continue
        least = layout.num_dim_slices if layout.exchange == "batch" else 1  # a sequence for each slice
        for replica in range(layout.dp):
            plan = prefill_micro_batches(layout, workload(batch, chunk=chunk), replica)
            assert max(micro_batch.size for micro_batch in plan) <= max(chunk // 10, least)


def test_a_pipeline_is_filled_in_prefill_as_far_as_there_are_sequences() -> None:
    layout = parse_layout("tp2pp2")
    assert [len(prefill_micro_batches(layout, workload(batch), 0)) for batch in (1, 3, 8, 20)] == [1, 3, 8, 8]


def test_decode_has_one_micro_batch_for_each_stage_as_far_as_there_are_sequences() -> None:
    for batch, pp in itertools.product(range(1, 9), range(1, 6)):
        assert len(decode_micro_batches(Layout(pp=pp), workload(batch), 0)) == min(batch, pp)
    assert len(decode_micro_batches(parse_layout("m4pp2:batch"), workload(4), 0)) == 1, "each slice has a single row"


def test_without_stages_a_batch_that_fits_is_one_call() -> None:
    for text in ("tp4", "n2m2:gather", "n2m2:batch"):
        assert len(prefill_micro_batches(parse_layout(text), workload(7), 0)) == 1


def test_replicas_and_slices_share_the_batch_evenly() -> None:
    layout = parse_layout("m3dp2:batch")
    assert replica_rows(layout, 11) == (Span(0, 6), Span(6, 11))
    assert cache_rows(layout, Span(6, 11)) == (Span(6, 8), Span(8, 10), Span(10, 11))
    assert [owned_rows(layout, 11, rank) for rank in (0, 5)] == [Span(0, 2), Span(10, 11)]


def test_fewer_sequences_than_slices_leave_the_last_slices_without_any() -> None:
    plan = decode_micro_batches(parse_layout("m4:batch"), workload(2), 0)
    assert plan == (MicroBatch((Span(0, 1), Span(1, 2), Span(2, 2), Span(2, 2))),)


@settings(derandomize=True, max_examples=120, deadline=None)
@given(
    st.tuples(*[st.integers(1, 5)] * 4),
    st.sampled_from(("gather", "batch")),
    st.integers(0, 60),
    st.integers(1, 40),
    st.integers(1, 900),
)
def test_any_layout_and_workload_is_covered(
    sizes: tuple[int, ...], exchange: str, more: int, seq: int, chunk: int
) -> None:
    n, m, pp, dp = sizes
    chosen = exchange if m > 1 else "none"
    layout = Layout(num_head_groups=n, num_dim_slices=m, pp=pp, dp=dp, exchange=chosen)  # type: ignore[arg-type]
    for plan in PLANS:
        assert_plan_covers(layout, workload(dp + more, seq, chunk), plan)


@pytest.mark.parametrize("positions", [0, 1, 3, 4, 10, 99])
def test_calls_compute_every_position_of_every_sequence_once_and_in_order(positions: int) -> None:
    for layout, batch, chunk in itertools.product(LAYOUTS, (4, 7), (1, 8, 25, 1000)):
        work, computed = workload(batch, chunk=chunk, positions=positions), {row: [] for row in range(batch)}
        for replica in range(layout.dp):
            for call in prefill_calls(layout, work, replica):
                for row in call.micro_batch.rows():
                    computed[row] += indices((call.positions,))
                assert 0 < len(call.positions) <= (positions or 10)
        assert computed == {row: list(range(10)) for row in range(batch)}


def test_positions_of_a_prompt_are_cut_evenly_into_as_few_calls_as_the_bound_allows() -> None:
    assert position_chunks(workload(1)) == (Span(0, 10),)
    assert position_chunks(workload(1, positions=4)) == (Span(0, 4), Span(4, 7), Span(7, 10))
    assert position_chunks(workload(1, positions=5)) == (Span(0, 5), Span(5, 10))


def test_shorter_calls_take_more_sequences() -> None:
    """24 tokens are two sequences of 10 positions, or six of at most 4."""
    calls = prefill_calls(parse_layout("tp4"), workload(12, chunk=24), 0)
    assert {(call.micro_batch.size, len(call.positions)) for call in calls} == {(2, 10)}
    calls = prefill_calls(parse_layout("tp4"), workload(12, chunk=24, positions=4), 0)
    assert [(call.micro_batch.size, len(call.positions)) for call in calls] == [(6, 4), (6, 3), (6, 3)] * 2


@pytest.mark.parametrize("positions", [0, 1, 4, 7])
def test_every_prompt_ends_in_one_call_which_computes_its_last_token(positions: int) -> None:
    lengths = (1, 10, 4, 5, 8, 2, 7)
    for layout, chunk in itertools.product(LAYOUTS, (1, 25, 1000)):
        work = Workload(
            batch=7, seq=10, decode_steps=0, chunk_tokens=chunk, chunk_positions=positions, prompt_lengths=lengths
        )
        ends: dict[int, Span] = {}
        for replica in range(layout.dp):
            for call in prefill_calls(layout, work, replica):
                places = call.ending(work)
                assert places == sorted(places)
                found = {call.micro_batch.rows()[place]: call.positions for place in places}
                assert not found.keys() & ends.keys()
                ends |= found
        assert sorted(ends) == list(range(7))
        assert all(span.start <= lengths[row] - 1 < span.stop for row, span in ends.items())


def test_gathered_weights_pass_whole_prompts_whose_pieces_keep_to_the_call() -> None:
    for layout, batch, chunk, positions in itertools.product(GATHERED, (4, 9), (1, 8, 25, 1000), (0, 3)):
        work = workload(batch, chunk=chunk, positions=positions)
        for replica in range(layout.dp):
            for call in prefill_calls(layout, work, replica):
                assert call.positions == Span(0, 10)
                for part in call.micro_batch.parts:
                    assert_pieces(layout, len(part), work)


def assert_pieces(layout: Layout, rows: int, work: Workload) -> None:
    """Each position of each sequence once, those of a sequence in order, few enough at a time."""
    computed = [[] for _ in range(rows)]
    for some, span in pieces(layout, rows, work):
        assert len(some) * len(span) <= max(work.chunk_tokens, len(span))
        for row in indices((some,)):
            computed[row] += indices((span,))
    assert computed == [list(range(work.seq))] * rows


def test_shares_of_queries_cover_all_once_and_are_even() -> None:
    for queries, m in itertools.product(range(40), range(1, 9)):
        shares = [query_share(queries, m, j) for j in range(m)]
        assert sorted(itertools.chain(*map(indices, shares))) == list(range(queries))
        assert all(indices(share) == sorted(indices(share)) for share in shares)
        sizes = [total(share) for share in shares]
        assert max(sizes) - min(sizes) <= 2
        assert queries < 2 * m or min(sizes) > 0


def test_shares_of_queries_are_balanced_for_the_causal_mask() -> None:
    """Keys that a share's queries see: even where it divides, unlike in consecutive shares."""

    def seen(queries: list[int]) -> int:
        return sum(query + 1 for query in queries)

    for m in (2, 3, 4, 8):
        shares = [seen(indices(query_share(64 * m, m, j))) for j in range(m)]
        assert len(set(shares)) == 1
        consecutive = [seen(list(range(64 * j, 64 * j + 64))) for j in range(m)]
        assert max(consecutive) > 1.4 * sum(consecutive) / m
        uneven = [seen(indices(query_share(64 * m + m // 2 + 1, m, j))) for j in range(m)]
        assert max(uneven) < 1.03 * sum(uneven) / m


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_slices_keep_every_position_once_with_sequence_and_all_positions_else(exchange: str) -> None:
    for m, positions in itertools.product(range(2, 9), range(30)):
        layout = Layout(num_dim_slices=m, exchange=exchange)  # type: ignore[arg-type]
        kept = [cached_positions(layout, positions, j) for j in range(m)]
        if exchange == "sequence":
            assert kept == [len(range(j, positions, m)) for j in range(m)]
            assert sum(kept) == positions
        else:
            assert kept == [positions] * m


def test_blocks_of_scores_cover_the_queries_once_with_the_keys_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_SCORE_ELEMENTS", 120)
    for rows, start, queries, causal in itertools.product((0, 1, 3, 50, 500), (0, 7), (1, 2, 10, 31), (True, False)):
        blocks = score_blocks(rows, start, queries, is_causal=causal)
        assert indices([block for block, _ in blocks]) == list(range(queries))
        for block, keys in blocks:
            assert keys == (start + block.stop if causal else start + queries)
            assert len(block) == 1 or rows * len(block) * (start + queries) <= 120
    assert [len(block) for block, _ in score_blocks(3, 0, 10, is_causal=True)] == [4, 4, 2]
    assert [keys for _, keys in score_blocks(3, 0, 10, is_causal=True)] == [4, 8, 10]
    assert [keys for _, keys in score_blocks(3, 0, 10, is_causal=False)] == [10, 10, 10]


def test_visible_keys_are_those_that_some_query_sees() -> None:
    for start, count, window, causal in itertools.product(range(9), (1, 2, 5), (0, 1, 3, 20), (True, False)):
        queries, keys = Span(start, start + count), start + count + 2
        if not causal and window:
            continue
        seen = [
            key
            for key in range(keys)
            if any(not causal or (q >= key and (not window or key > q - window)) for q in indices((queries,)))
        ]
        assert indices((visible(queries, keys, window, causal),)) == seen
