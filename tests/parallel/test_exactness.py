"""Parallel equals serial: every layout on real ranks against the single-device reference, and against predictions."""

from collections.abc import Callable

import pytest
from case import Case
from cases import default_cases, exact_cases
from oracle import judge, prove_sensitive


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = exact_cases() if metafunc.config.getoption("--full", False) else default_cases()
    metafunc.parametrize("case", cases, ids=lambda case: case.id)


def test_ranks_compute_what_one_device_computes(case: Case, outcomes: Callable) -> None:
    found = outcomes(case)
    prove_sensitive(case, found)
    verdict = judge(case, found)
    assert not verdict.complaints, "\n".join(verdict.complaints)
