"""Spans: what is cut is covered once, in order and evenly."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgrid.layout.span import Span, balanced, indices, merged, total

SETTINGS = settings(derandomize=True, max_examples=200, deadline=None)
spans = st.tuples(st.integers(0, 30), st.integers(0, 8)).map(lambda t: Span(t[0], t[0] + t[1]))


@pytest.mark.parametrize("start", [0, 5])
def test_balanced_parts_cover_every_index_once_and_in_order(start: int) -> None:
    for length, parts in itertools.product(range(41), range(1, 18)):
        cut = balanced(Span(start, start + length), parts)
        assert len(cut) == parts
        assert indices(cut) == list(range(start, start + length))
        assert total(cut) == length


def test_balanced_parts_differ_by_at_most_one_and_the_longer_ones_come_first() -> None:
    for length, parts in itertools.product(range(41), range(1, 18)):
        lengths = [len(part) for part in balanced(length, parts)]
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] - lengths[-1] <= 1


def test_balanced_examples() -> None:
    assert balanced(10, 4) == (Span(0, 3), Span(3, 6), Span(6, 8), Span(8, 10))
    assert balanced(2, 3) == (Span(0, 1), Span(1, 2), Span(2, 2))
    assert balanced(Span(7, 9), 1) == (Span(7, 9),)


@pytest.mark.parametrize(("start", "stop"), [(3, 2), (-1, 2), (-2, -1)])
def test_a_span_that_runs_backwards_or_starts_before_zero_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=rf"\[{start}, {stop}\)"):
        Span(start, stop)


@SETTINGS
@given(st.lists(spans, max_size=6))
def test_merging_keeps_the_indices_and_leaves_no_neighbours_apart(parts: list[Span]) -> None:
    joined = merged(parts)
    assert indices(joined) == indices(parts)
    assert all(len(part) for part in joined)
    assert all(a.stop != b.start for a, b in itertools.pairwise(joined))


@SETTINGS
@given(spans, st.integers(0, 20))
def test_shifting_and_counting_from_an_outer_span_are_inverse(span: Span, offset: int) -> None:
    outer = Span(offset, offset + span.stop + 3)
    assert len(span.shift(offset)) == len(span)
    assert span.shift(offset).within(outer) == span


@pytest.mark.parametrize("inner", [Span(1, 4), Span(4, 8), Span(8, 9), Span(0, 1)])
def test_a_span_outside_of_another_is_refused(inner: Span) -> None:
    with pytest.raises(ValueError, match="not within"):
        inner.within(Span(2, 7))
