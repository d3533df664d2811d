"""Negative controls: what is done wrong on purpose must not pass the comparison that right layouts pass."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from case import Case, prompts
from cases import FAULTY_LAYOUTS, faulty_cases
from faults import FAULTS, WASTEFUL
from oracle import FP64_BOUND, Verdict, judge, prove_sensitive
from single import PerSlice, reference

from headgrid.reference import relative_error

CLEAR = 1e-3  # a fault must show as one, not as rounding
CASES = faulty_cases()
FAULTY = [case for case in CASES if case.fault]
SOUND = [case for case in CASES if not case.fault]


@pytest.mark.parametrize("case", SOUND, ids=lambda case: case.id)
def test_without_a_fault_the_comparison_accepts(case: Case, outcomes: Callable) -> None:
    found = outcomes(case)
    prove_sensitive(case, found)
    assert judge(case, found).complaints == []


@pytest.mark.parametrize("case", FAULTY, ids=lambda case: case.id)
def test_the_comparison_rejects_a_fault(case: Case, outcomes: Callable) -> None:
    verdict, fault = judge(replace(case, fault=""), outcomes(case)), FAULTS[case.fault]
    assert verdict.complaints
    if fault.same_counts:
        assert not any("issued" in complaint or "FLOPs" in complaint for complaint in verdict.complaints)
    if fault.shows == "tokens":
        assert any("greedy tokens" in complaint for complaint in verdict.complaints)
        return
    assert any("logits" in complaint for complaint in verdict.complaints)
    assert _error(verdict, "decode logits") > CLEAR
    early = _error(verdict, "prefill logits")
    assert early > CLEAR if fault.shows == "prefill" else early < FP64_BOUND
    in_halves = not ("chunk_positions" in fault.workload and case.layout.weights == "gathered")  # run without chunks
    if fault.in_attention and in_halves:
        assert max(_error(verdict, f"attention {phase}") for phase in ("prefill", "decode")) > CLEAR


def _error(verdict: Verdict, what: str) -> float:
    return verdict.errors[what][0]


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_meets_every_layout_to_which_it_applies(name: str) -> None:
    met = [str(case.layout) for case in FAULTY if case.fault == name]
    assert met == [text for text in FAULTY_LAYOUTS if FAULTS[name].applies(SOUND[FAULTY_LAYOUTS.index(text)].layout)]
    assert met


def independent() -> Case:
    case = faulty_cases(())[0]
    return replace(case, id="n2m2:independent", layout=replace(case.layout, exchange="independent"))


@pytest.mark.parametrize("case", [independent()], ids=lambda case: case.id)
def test_a_softmax_per_slice_is_another_function_and_is_rejected(case: Case, outcomes: Callable) -> None:
    found = outcomes(case)
    expected = reference(case, PerSlice).logits(prompts(case), 1)[:, 0]
    assert relative_error(found[0]["prefill"], expected) < FP64_BOUND, "the ranks compute the control itself, exactly"
    verdict = judge(case, found)
    assert _error(verdict, "prefill logits") > 0.1
    assert _error(verdict, "decode logits") > 0.1


WASTING = [replace(case, fault=WASTEFUL, id=f"{case.layout}-{WASTEFUL}") for case in SOUND]


@pytest.mark.parametrize(
    "case", [case for case in WASTING if case.layout.exchange == "gather"], ids=lambda case: case.id
)
def test_gathering_everything_is_exact_and_rejected_by_what_it_issues(case: Case, outcomes: Callable) -> None:
    verdict = judge(replace(case, fault=""), outcomes(case))
    assert _error(verdict, "decode logits") < FP64_BOUND
    assert {"prefill", "decode"} <= {complaint.partition(" of ")[0] for complaint in verdict.complaints}
