"""Peak bytes of activations and the largest buffer of a collective, measured on every rank, against the predictions."""

from collections.abc import Callable

import pytest
from case import Case
from cases import measured_cases
from faults import WASTEFUL

from headgrid.layout.memory import Memory, predict

TOLERANCE = 0.02
"""Measured and predicted are equal to the byte, but where gloo's threads hold on to a tensor."""
SCORING = [case for case in measured_cases() if case.layout.exchange == "scores" and case.workload.decode_steps]
GATHERING = [case for case in measured_cases(WASTEFUL) if case.layout.exchange == "gather"]


def predictions(case: Case) -> list[Memory]:
    """By rank."""
    return [predict(case.model, case.layout, case.workload, rank) for rank in range(case.ranks)]


def ratios(case: Case, outcomes: Callable) -> list[float]:
    """Measured over predicted, by rank."""
    measured = [outcome["peak_bytes"] for outcome in outcomes(case)]
    return [m / p.activations_peak_bytes for m, p in zip(measured, predictions(case), strict=True)]


@pytest.mark.parametrize("case", measured_cases(), ids=lambda case: case.id)
def test_peak_memory_of_every_rank_is_as_predicted(case: Case, outcomes: Callable) -> None:
    assert ratios(case, outcomes) == pytest.approx([1.0] * case.ranks, abs=TOLERANCE)


@pytest.mark.parametrize("case", measured_cases(), ids=lambda case: case.id)
def test_largest_buffer_of_every_rank_is_as_predicted_to_the_byte(case: Case, outcomes: Callable) -> None:
    measured = [outcome["buffer_bytes"] for outcome in outcomes(case)]
    assert measured == [predicted.communication_buffer_bytes for predicted in predictions(case)]


@pytest.mark.parametrize("case", SCORING, ids=lambda case: case.id)
def test_a_decode_step_on_partial_scores_holds_no_more_than_predicted(case: Case, outcomes: Callable) -> None:
    """And not much less: the prediction counts one more copy of the scores than are there at a time."""
    measured = [outcome["decode_peak_bytes"] for outcome in outcomes(case)]
    found = [m / p.decode_peak_bytes for m, p in zip(measured, predictions(case), strict=True)]
    assert all(0.85 < ratio <= 1 for ratio in found), found


@pytest.mark.parametrize("case", GATHERING, ids=lambda case: case.id)
def test_gathering_everything_takes_more_than_predicted(case: Case, outcomes: Callable) -> None:
    assert min(ratios(case, outcomes)) > 1 + TOLERANCE


@pytest.mark.parametrize("case", [c for c in GATHERING if str(c.layout).endswith(":gather")], ids=lambda case: case.id)
def test_gathering_everything_takes_a_larger_buffer_than_predicted(case: Case, outcomes: Callable) -> None:
    """Where nothing else is gathered that is larger."""
    measured = [outcome["buffer_bytes"] for outcome in outcomes(case)]
    assert all(m > p.communication_buffer_bytes for m, p in zip(measured, predictions(case), strict=True))
