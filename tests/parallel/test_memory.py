"""Peak bytes of activations, measured on every rank, against the prediction."""

from collections.abc import Callable

import pytest
from cases import Case, measured_cases
from faults import WASTEFUL

from headgrid.layout.memory import predict

TOLERANCE = 0.05
GATHERING = [case for case in measured_cases(WASTEFUL) if case.layout.exchange == "gather"]


def ratios(case: Case, outcomes: Callable) -> list[float]:
    """Measured over predicted, by rank."""
    predicted = [predict(case.model, case.layout, case.workload, rank) for rank in range(case.ranks)]
    measured = [outcome["peak_bytes"] for outcome in outcomes(case)]
    return [m / p.activations_peak_bytes for m, p in zip(measured, predicted, strict=True)]


@pytest.mark.parametrize("case", measured_cases(), ids=lambda case: case.id)
def test_peak_memory_of_every_rank_is_as_predicted(case: Case, outcomes: Callable) -> None:
    assert ratios(case, outcomes) == pytest.approx([1.0] * case.ranks, abs=TOLERANCE)


@pytest.mark.parametrize("case", GATHERING, ids=lambda case: case.id)
def test_gathering_everything_takes_more_than_predicted(case: Case, outcomes: Callable) -> None:
    assert min(ratios(case, outcomes)) > 1 + TOLERANCE
