"""Whatever `check` accepts runs, and is right; what it refuses, it refuses with a way out."""

from collections.abc import Callable

import pytest
from case import Case
from grids import AWKWARD, MOST_RANKS, WORKLOADS, accepted, accepted_cases, cut_cases, cuts, every_layout
from oracle import judge

from headgrid.errors import InvalidLayout
from headgrid.layout.layout import EXCHANGES, Layout, parse_layout
from headgrid.layout.legal import check, is_legal

SAMPLE = {1: 1, 2: 7, 3: 7, 4: 13, 6: 53, 8: 79}  # one out of so many


def _cuts(full: bool) -> list[Case]:
    return [case for k, case in enumerate(cut_cases()) if full or (case.ranks < 9 and k % 3 == 0)]


def _accepted(full: bool) -> list[Case]:
    if full:
        return [c for p in range(1, MOST_RANKS + 1) for c in accepted_cases(p, all_workloads=p <= 4)]
    return [c for p, step in SAMPLE.items() for c in accepted_cases(p, all_workloads=False)[p % step :: step]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full", False)
        cases = (_cuts if "cut" in metafunc.function.__name__ else _accepted)(full)
        metafunc.parametrize("case", cases, ids=[case.id for case in cases])


def assert_right(case: Case, outcomes: Callable) -> None:
    verdict = judge(case, outcomes(case))
    assert not verdict.complaints, "\n".join([case.id, *verdict.complaints])


def test_every_cut_of_a_layer_is_exact(case: Case, outcomes: Callable) -> None:
    assert_right(case, outcomes)


def test_every_accepted_layout_runs_and_is_exact(case: Case, outcomes: Callable) -> None:
    assert_right(case, outcomes)


def test_the_cuts_are_all_there_are() -> None:
    assert len(cuts()) == sum(16 // n for n in range(1, 17)) == 50
    have = {(c.layout.num_head_groups, c.layout.num_dim_slices, c.layout.exchange) for c in cut_cases()}
    want = {(n, m, exchange) for n, m in cuts() for exchange in (EXCHANGES if m > 1 else ("none",))}
    assert have == want


def test_the_enumeration_leaves_nothing_out() -> None:
    """Each value of each choice is accepted somewhere, with all degrees that the model's sizes allow."""
    layouts = [layout for p in range(1, MOST_RANKS + 1) for layout in every_layout(p)]
    assert len(layouts) == len(set(layouts)) > 2000
    fine = [layout for layout in layouts if any(accepted(layout, workload) for workload in WORKLOADS)]
    assert {layout.num_head_groups for layout in fine if layout.attention == "cut"} == {1, 2, 3, 6, 12}
    assert {layout.tp for layout in fine if layout.attention == "dp-attention"} == set(range(2, 17))
    assert {layout.num_dim_slices for layout in fine} == set(range(1, 17))
    assert {layout.pp for layout in fine} == {1, 2, 3}
    assert {layout.dp for layout in fine} == set(range(1, 17))
    fields = "exchange", "output", "weights", "residual", "residual_dtype", "communication", "decode", "attention"
    for field in fields:
        every = {getattr(layout, field) for layout in layouts}
        assert {getattr(layout, field) for layout in fine} == every


@pytest.mark.parametrize("ranks", [2, 4, 5, 7, 8, 12, 16])
def test_a_refusal_lists_layouts_that_are_accepted(ranks: int) -> None:
    refused = [layout for layout in every_layout(ranks) if not _fits(layout)]
    for layout in refused[:: max(1, len(refused) // 12)]:
        with pytest.raises(InvalidLayout) as caught:
            check(AWKWARD, layout, None, ranks)
        assert caught.value.numbers
        assert caught.value.why
        assert caught.value.legal
        for text in caught.value.legal:
            other = parse_layout(text)
            check(AWKWARD, other, None, ranks)
    assert refused or ranks < 4


def _fits(layout: Layout) -> bool:
    try:
        check(AWKWARD, layout, None, layout.ranks)
    except InvalidLayout:
        return False
    return True


def test_no_layout_is_left_out_that_check_would_accept() -> None:
    """What `accepted` passes over unseen: of the layouts of 6 ranks, `check` refuses each."""
    unseen = [layout for layout in every_layout(6) if not is_legal(AWKWARD, layout)]
    assert unseen and not any(map(_fits, unseen))


def test_a_workload_that_does_not_fit_is_refused_with_one_that_does() -> None:
    refused = [
        (layout, workload)
        for layout in every_layout(8)
        for workload in WORKLOADS
        if _fits(layout) and not accepted(layout, workload)
    ]
    assert refused
    for layout, workload in refused[::7]:
        with pytest.raises(InvalidLayout) as caught:
            check(AWKWARD, layout, workload, 8)
        option, *_ = caught.value.legal
        _, _, batch = option.partition("--batch ")
        assert int(batch) > workload.batch
