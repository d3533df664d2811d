"""Negative controls: what is done wrong on purpose must not pass the comparison that right layouts pass."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from cases import FAULTY_LAYOUTS, Case, faulty_cases
from faults import FAULTS, WASTEFUL
from oracle import FP64_BOUND, PerSlice, judge, prove_sensitive, reference
from worker import prompts

from headgrid.reference import relative_error

CLEAR = 1e-3  # a fault must show as one, not as rounding
NOT_IN_ATTENTION = ("sequences swapped", "vocabulary shards swapped")
ONLY_IN_DECODE = ("prefill not cached", "decode not cached")
CASES = faulty_cases([name for name in FAULTS if name != WASTEFUL])


@pytest.mark.parametrize("case", [case for case in CASES if not case.fault], ids=lambda case: case.id)
def test_without_a_fault_the_comparison_accepts(case: Case, outcomes: Callable) -> None:
    prove_sensitive(case)
    assert judge(case, outcomes(case)).complaints == []


@pytest.mark.parametrize("case", [case for case in CASES if case.fault], ids=lambda case: case.id)
def test_the_comparison_rejects_a_fault(case: Case, outcomes: Callable) -> None:
    verdict = judge(replace(case, fault=""), outcomes(case))
    late = case.fault.startswith(ONLY_IN_DECODE)
    assert verdict.errors["prefill logits"][0] < FP64_BOUND if late else verdict.errors["prefill logits"][0] > CLEAR
    assert verdict.errors["decode logits"][0] > CLEAR
    assert any("logits" in complaint for complaint in verdict.complaints)
    if case.fault not in NOT_IN_ATTENTION:
        assert max(verdict.errors[f"attention {phase}"][0] for phase in ("prefill", "decode")) > CLEAR
    assert not any("issued" in complaint or "FLOPs" in complaint for complaint in verdict.complaints)


def test_every_fault_meets_every_exchange() -> None:
    assert len(CASES) == len(FAULTY_LAYOUTS) * len(FAULTS)


def independent() -> Case:
    case = faulty_cases(())[0]
    return replace(case, id="n2m2:independent", layout=replace(case.layout, exchange="independent"))


@pytest.mark.parametrize("case", [independent()], ids=lambda case: case.id)
def test_a_softmax_per_slice_is_another_function_and_is_rejected(case: Case, outcomes: Callable) -> None:
    found = outcomes(case)
    control = reference(case, PerSlice)
    control.num_slices = case.layout.num_dim_slices
    expected = control.logits(prompts(case), 1)[:, 0]
    assert relative_error(found[0]["prefill"], expected) < FP64_BOUND, "the ranks compute the control itself, exactly"
    verdict = judge(case, found)
    assert verdict.errors["prefill logits"][0] > 0.1
    assert verdict.errors["decode logits"][0] > 0.1


GATHERING = [case for case in faulty_cases([WASTEFUL]) if case.fault and case.layout.exchange == "gather"]


@pytest.mark.parametrize("case", GATHERING, ids=lambda case: case.id)
def test_gathering_everything_is_exact_and_rejected_by_what_it_issues(case: Case, outcomes: Callable) -> None:
    verdict = judge(replace(case, fault=""), outcomes(case))
    assert verdict.errors["decode logits"][0] < FP64_BOUND
    assert {"prefill", "decode"} <= {complaint.partition(" of ")[0] for complaint in verdict.complaints}
