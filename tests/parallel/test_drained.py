"""A pipeline that is drained after each token computes the same, with the collectives predicted for that."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from case import Case
from oracle import judge, prove_sensitive
from overlapped import case_of

TEXTS = ("pp2:drained", "n1m2pp2:batch+gathered+drained", "tp2pp2:sharded+drained")
CASES = [case_of(text, "whole", exposed=True) for text in TEXTS] + [case_of("tp2pp2:drained", "ragged", exposed=True)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_drained_pipeline_computes_what_one_device_computes(case: Case, outcomes: Callable) -> None:
    """Logits, tokens, caches and collectives. The predictions for steps in flight are another layout's: they must not
    pass.
    """
    found = outcomes(case)
    prove_sensitive(case, found)
    verdict = judge(case, found)
    assert not verdict.complaints, "\n".join(verdict.complaints)
    flying = replace(case, layout=replace(case.layout, decode="in_flight"))
    assert judge(flying, found).complaints
