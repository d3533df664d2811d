"""Algebra of intervals against a grid of single nanoseconds, and what a shift or a gap changes in an account."""

from hypothesis import given, settings
from hypothesis import strategies as st

from headgrid.experiment.breakdown.intervals import Account, Interval, account, union

END = 60
interval = st.tuples(st.integers(0, END), st.integers(0, END))
some = st.lists(interval, max_size=8)


def grid(intervals: list[Interval]) -> set[int]:
    """Every nanosecond that is in one of them, one by one."""
    return {instant for start, end in intervals for instant in range(start, end)}


@given(some)
@settings(max_examples=300, deadline=None)
def test_union_has_the_same_instants_in_disjoint_order(intervals: list[Interval]) -> None:
    found = union(intervals)
    assert grid(list(found.intervals)) == grid(intervals)
    assert found.length == len(grid(intervals))
    assert all(start < end for start, end in found.intervals)
    pairs = zip(found.intervals, found.intervals[1:], strict=False)
    assert all(one[1] < other[0] for one, other in pairs), "what touches is one"


@given(some, some, interval)
@settings(max_examples=300, deadline=None)
def test_parts_and_differences_and_gaps(one: list[Interval], other: list[Interval], span: Interval) -> None:
    a, b, window = union(one), union(other), set(range(*span))
    assert grid(list(a.without(b).intervals)) == grid(one) - grid(other)
    assert a.within(*span) == len(grid(one) & window)
    assert grid(list(a.gaps(*span).intervals)) == window - grid(one)


@given(some, some)
@settings(max_examples=300, deadline=None)
def test_an_account_counts_each_instant_once(computing: list[Interval], talking: list[Interval]) -> None:
    found = account(0, computing, talking)
    busy = grid(computing) | grid(talking)
    end = max(busy) + 1 if busy else 0
    assert found == Account(
        compute=len(grid(computing)),
        exposed=len(grid(talking) - grid(computing)),
        idle=end - len(busy),
        hidden=len(grid(computing) & grid(talking)),
        lead=min(busy, default=0),
        span=end,
    )
    assert found.compute + found.exposed + found.idle == found.span


COMPUTE = [(10, 30), (30, 50), (50, 100)]
HIDDEN = (60, 80)


def test_a_hidden_collective_that_comes_later_is_exposed() -> None:
    before = account(0, COMPUTE, [HIDDEN])
    assert (before.exposed, before.hidden) == (0, 20)
    after = account(0, COMPUTE, [(100, 120)])
    assert (after.exposed, after.hidden) == (20, 0)
    assert (after.compute, after.idle) == (before.compute, before.idle)
    half = account(0, COMPUTE, [(90, 110)])
    assert (half.exposed, half.hidden) == (10, 10)


def test_a_planted_gap_is_idle_and_nothing_else() -> None:
    before = account(0, COMPUTE, [HIDDEN])
    late = [(10, 30), (37, 57), (57, 107)]
    after = account(0, late, [(67, 87)])
    assert after.idle == before.idle + 7
    assert (after.compute, after.exposed, after.hidden, after.lead) == (80 + 10, 0, 20, 10)
    assert (before.compute, before.exposed, before.hidden, before.lead) == (80 + 10, 0, 20, 10)
