"""Noise on the result of any one collective changes the logits: each of them carries something that is needed."""

from collections import Counter
from collections.abc import Callable

import pytest
from case import Case
from cases import corrupted_cases
from corruption import corrupted_steps

from headgrid.layout.traffic import Collective, decode_collectives, prefill_collectives

CLEAR = 1e-6
CASES = corrupted_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_noise_on_any_one_collective_changes_the_logits(case: Case, outcomes: Callable) -> None:
    """What is corrupted, one after the other, is all that the layout issues."""
    found = outcomes(case)
    assert case.corrupted_rank is not None
    issued = found[case.corrupted_rank]["issued"]
    moved = [max(errors) for errors in zip(*(outcome["moved"] for outcome in found), strict=True)]
    assert len(moved) == len(issued) == found[case.corrupted_rank]["announced"] > 0
    assert max(outcome["noise_floor"] for outcome in found) == 0.0, "two clean runs agree to the last bit"
    unseen = [call for call in zip(range(len(issued)), issued, moved, strict=True) if not call[-1] > CLEAR]
    assert not unseen, "corrupting these changed no logits"
    args = (case.model, case.layout, case.workload, case.corrupted_rank)
    predicted = prefill_collectives(*args)
    for _ in range(corrupted_steps(case)):
        predicted.update(decode_collectives(*args))
    assert Counter(Collective(*call) for call in issued) == predicted


def test_every_kind_of_collective_is_corrupted_somewhere() -> None:
    kinds = set()
    for case in CASES:
        assert case.corrupted_rank is not None
        args = (case.model, case.layout, case.workload, case.corrupted_rank)
        kinds |= {(call.kind, call.axis) for call in (*decode_collectives(*args), *prefill_collectives(*args))}
    within = {("all_reduce", "tp"), ("all_gather", "tp"), ("reduce_scatter", "tp")}
    within |= {(kind, "tp_slice") for kind in ("all_reduce", "all_gather", "all_to_all")}
    within |= {(kind, "tp_head") for kind in ("all_reduce", "all_gather", "reduce_scatter")}
    assert kinds == within | {(kind, axis) for kind in ("send", "recv") for axis in ("pp", "pp_back")}
