"""Parallel equals serial for combinations of layout, model and workload that nobody chose: hypothesis on real ranks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from case import Case, make_case
from cases import TINY
from draws import draw_heads, draw_layout, draw_model, draw_workload
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import SENSITIVE, judge, sensitivity
from pool import Pools
from single import token_to_stop_at

from headgrid.errors import InvalidLayout
from headgrid.layout.legal import check
from headgrid.spec.workload import Workload

DEFAULT = {2: 30, 3: 24, 4: 36, 6: 16, 8: 14}
FULL = {2: 400, 3: 400, 4: 500, 6: 400, 8: 300}
FP8, FULL_FP8 = {2: 6, 3: 5, 4: 7}, {2: 200, 3: 150, 4: 300}
LEAST_SENSITIVE = 0.7
WORKLOAD = Workload(batch=4, seq=8, decode_steps=2, dtype="float64")


@st.composite
def cases(draw: Any, ranks: int, fp8: bool = False) -> Case:
    """A legal case on so many ranks. Single-rank axes, plain workloads and fp64 come first when one is shrunk."""

    def pick(values: Any) -> Any:
        return draw(st.sampled_from(values))

    layout = draw_layout(pick, ranks)
    dtype = pick(("float64",) * 6 + ("float32", "bfloat16"))
    if fp8:  # whatever is drawn, so that a case is the same but for its linears
        layout, dtype = replace(layout, linears="fp8"), "float32" if dtype == "float64" else dtype
    model = draw_model(
        pick, layout, draw_heads(pick, layout), **({} if dtype == "float64" else {"attention_gain": 2.0})
    )
    workload = draw_workload(pick, layout, model, dtype, steps=pick((3, 1, 2, 0)))
    return make_case("drawn", layout, model, workload, draw(st.integers(0, 1000)))


@st.composite
def layouts_of_one_model(draw: Any, ranks: int) -> Case:
    """Cases that differ in their layout and seed alone, so that little is to be shrunk."""
    layout = draw_layout(lambda values: draw(st.sampled_from(values)), ranks)
    return make_case("drawn", layout, replace(TINY, num_layers=2), WORKLOAD, draw(st.integers(0, 1000)))


def with_stop(case: Case) -> Case:
    """A third of the decoding cases end some sequence early."""
    stops = case.steps and case.workload.dtype == "float64" and case.seed % 3 == 0
    return replace(case, stop_token=token_to_stop_at(case)) if stops else case


def run_cases(strategy: Any, number: int, check_each: Callable[[Case], None]) -> None:
    @settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(strategy)
    def each(case: Case) -> None:
        check_each(case)

    each()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", DEFAULT)
def test_any_legal_combination_computes_what_one_device_computes(
    ranks: int, pools: Pools, request: pytest.FixtureRequest
) -> None:
    number = (FULL if request.config.getoption("--full", False) else DEFAULT)[ranks]
    moved: list[float] = []

    def agrees(case: Case) -> None:
        case = with_stop(case)
        outcomes = pools.run(case)
        verdict = judge(case, outcomes)
        assert not verdict.complaints, "\n".join([case.id, *verdict.complaints])
        moved.append(sensitivity(case, outcomes))

    run_cases(cases(ranks), number, agrees)
    assert len(moved) >= number, "hypothesis ran fewer cases than it was asked for"
    assert sum(each > SENSITIVE for each in moved) >= LEAST_SENSITIVE * number, "most could tell right from wrong"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", FP8)
def test_any_legal_combination_with_fp8_linears_has_the_error_of_one_device_with_them(
    ranks: int, pools: Pools, request: pytest.FixtureRequest
) -> None:
    """By the floor of the model's own dtype each is wrong, else it would not be FP8 that was computed."""
    number = (FULL_FP8 if request.config.getoption("--full", False) else FP8)[ranks]
    ran: list[Case] = []

    def agrees(case: Case) -> None:
        outcomes = pools.run(case)
        verdict = judge(case, outcomes)
        assert not verdict.complaints, "\n".join([case.id, *verdict.complaints])
        unrounded = judge(replace(case, layout=replace(case.layout, linears="model")), outcomes).complaints
        assert any("logits" in complaint for complaint in unrounded), case.id
        ran.append(case)

    run_cases(cases(ranks, fp8=True), number, agrees)
    assert len(ran) >= number, "hypothesis ran fewer cases than it was asked for"


def test_hypothesis_shrinks_what_real_ranks_fail(pools: Pools) -> None:
    """The negative control: one rank's partial sum is missing, and the smallest case that shows it is the simplest.

    Most of what hypothesis tries on its way is a case that it has tried before.
    """
    known: dict[Case, bool] = {}

    def agrees(case: Case) -> None:
        if case not in known:
            known[case] = not judge(case, pools.run(replace(case, fault="partial sum dropped"))).complaints
        assert known[case], f"smallest: {case.id}"

    with pytest.raises(AssertionError, match=r"smallest: drawn-tp2-H"):
        run_cases(layouts_of_one_model(2), 12, agrees)
    assert {str(case.layout) for case in known} > {"tp2"}, "it began with another"


def test_everything_drawn_is_legal() -> None:
    """`make_case` refuses what `check` refuses, so a strategy that draws such would fail, not skip."""

    @settings(max_examples=300, derandomize=True, deadline=None, database=None)
    @given(st.data())
    def legal(data: Any) -> None:
        case = data.draw(cases(data.draw(st.sampled_from((1, 2, 3, 4, 6, 8, 12)))))
        try:
            check(case.model, case.layout, case.workload, case.ranks)
        except InvalidLayout as error:  # pragma: no cover
            raise AssertionError(case.id) from error

    legal()
