"""Two calls in flight: the same results and collectives, communication that is really under way together, memory."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from case import Case
from faults import CROWDED, HASTY
from oracle import judge, prove_sensitive
from overlapped import BOUNDED, REACHED, case_of, overlapped_cases, overlapped_memory_cases

from headgrid.layout.memory import predict

TOLERANCE = 0.02
LOOSEST = 0.55


@pytest.mark.parametrize("case", overlapped_cases(), ids=lambda case: case.id)
def test_calls_that_take_turns_compute_what_one_device_computes(case: Case, outcomes: Callable) -> None:
    """Logits, tokens, caches, and every collective and operation that is predicted, no more and no less.

    While two collectives are under way, one call has computed up to its own before the other has waited for its own.
    """
    found = outcomes(case)
    prove_sensitive(case, found)
    verdict = judge(case, found)
    assert not verdict.complaints, "\n".join(verdict.complaints)
    assert {outcome["under_way"] for outcome in found} == {2}


EXPOSED = [case_of(text, "whole", exposed=True, chunk_tokens=8) for text in ("tp2", "n1m2:sequence", "n2m2:batch")]


@pytest.mark.parametrize("case", EXPOSED, ids=lambda case: case.id)
def test_exposed_collectives_are_waited_for_one_by_one(case: Case, outcomes: Callable) -> None:
    assert {outcome["under_way"] for outcome in outcomes(case)} == {1}


# Three micro-batches of one sequence: the last one's chunks have nothing but each other beside them.
CHUNKED = case_of("n1m2:sequence", "chunks", batch=3)


@pytest.mark.parametrize("case", [CHUNKED], ids=lambda case: case.id)
def test_chunks_of_one_sequence_follow_each_other(case: Case, outcomes: Callable) -> None:
    assert judge(case, outcomes(case)).complaints == []


@pytest.mark.parametrize("case", [replace(CHUNKED, id="hasty", fault=HASTY)], ids=lambda case: case.id)
def test_a_chunk_that_does_not_wait_for_the_one_before_is_rejected(case: Case, outcomes: Callable) -> None:
    complaints = judge(replace(case, fault=""), outcomes(case)).complaints
    assert any(complaint.startswith("prefill logits") for complaint in complaints)


def ratios(case: Case, outcomes: Callable) -> list[float]:
    """Measured peak over predicted one, by rank."""
    predicted = [predict(case.model, case.layout, case.workload, rank) for rank in range(case.ranks)]
    found = outcomes(case)
    assert [each["buffer_bytes"] for each in found] == [each.communication_buffer_bytes for each in predicted]
    return [f["peak_bytes"] / p.activations_peak_bytes for f, p in zip(found, predicted, strict=True)]


@pytest.mark.parametrize("case", overlapped_memory_cases(REACHED), ids=lambda case: case.id)
def test_calls_that_take_turns_hold_the_sum_of_their_peaks(case: Case, outcomes: Callable) -> None:
    assert ratios(case, outcomes) == pytest.approx([1.0] * case.ranks, abs=TOLERANCE)


@pytest.mark.parametrize("case", overlapped_memory_cases(BOUNDED), ids=lambda case: case.id)
def test_calls_that_take_turns_hold_no_more_than_that(case: Case, outcomes: Callable) -> None:
    """And not much less: where most is held between two collectives, only one call holds it."""
    found = ratios(case, outcomes)
    assert min(found) > LOOSEST, found
    assert max(found) < 1 + TOLERANCE, found


@pytest.mark.parametrize("case", overlapped_memory_cases(REACHED, CROWDED), ids=lambda case: case.id)
def test_one_call_more_at_once_holds_more_than_predicted(case: Case, outcomes: Callable) -> None:
    assert min(ratios(case, outcomes)) > 1 + TOLERANCE
