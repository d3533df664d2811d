"""Micro-batches: every sequence passes through the model once, where its keys and values are kept."""

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgrid.layout.batching import (
    MicroBatch,
    cache_rows,
    decode_micro_batches,
    owned_rows,
    prefill_micro_batches,
    replica_rows,
)
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.span import Span, indices
from headgrid.spec.workload import Workload

LAYOUTS = [
    parse_layout(text)
    for text in (
        *("tp1", "tp4", "tp2pp2", "pp4", "dp3", "tp2pp2dp2", "n2m2:gather", "n2m3pp2:gather+concat", "m2dp2:gather"),
        *("n2m2:batch", "m4:batch", "m3pp2:batch", "n2m2dp2:batch", "m2pp4dp2:batch+concat"),
    )
]
PLANS: list[Callable[..., tuple[MicroBatch, ...]]] = [prefill_micro_batches, decode_micro_batches]


def workload(batch: int, seq: int = 10, chunk: int = 16_384) -> Workload:
    return Workload(batch=batch, seq=seq, decode_steps=2, chunk_tokens=chunk)


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
