"""The wall clock of the planted arm's blocks: one untimed prefill may lie between its phases, and no more."""

from dataclasses import dataclass
from typing import Any

import pytest

from headgrid.experiment.check.clocks import block_clocks
from headgrid.experiment.check.finding import Finding

PREFILL_S, DECODE_S = 1.0, 0.2


@dataclass
class Told:
    """What the gate reads of a run."""

    design: dict[str, Any]
    records: list[dict[str, Any]]


def told(untimed_s: float, arm: str = "tp2 (+2 %)", rest_s: float = 0.0) -> Told:
    """A launch of three blocks of three arms, in which blocks of `arm` have `untimed_s` between their phases, and
    `rest_s` more before they are written."""
    roles = {"tp2": "baseline", "tp2 (A/A)": "aa", "tp2 (+2 %)": "planted"}
    design = {"device": "cuda", "arms": [{"label": label, "role": role} for label, role in roles.items()]}
    now, records = 100.0, [{"kind": "launch", "launch": 0, "time_s": 100.0, "start_s": 1.0}]
    for block in range(3):
        for label in roles:
            between = untimed_s if label == arm else 0.0
            decode = now + PREFILL_S + between
            end = decode + DECODE_S + 0.005 + (rest_s if label == arm else 0.0)
            stamps = {"prefill_start_s": now + 0.001, "decode_start_s": decode + 0.002, "time_s": end}
            times = {"prefill_s": [PREFILL_S] * 2, "decode_s": [DECODE_S] * 2}
            records.append({"kind": "block", "launch": 0, "block": block, "arm": label, **stamps, **times})
            now = end
    return Told(design, records)


def gates(run: Told) -> set[str]:
    found = list(block_clocks(run))  # pyright: ignore[reportArgumentType]
    return {each.gate for each in found if isinstance(each, Finding)}


@pytest.mark.parametrize("untimed_s", [0.0, 0.98, 1.1])
def test_the_planted_arm_may_do_an_untimed_prefill(untimed_s: float) -> None:
    assert not gates(told(untimed_s))


def test_no_more_than_that() -> None:
    assert gates(told(1.9)) == {"time.idle"}


def test_another_arm_may_not() -> None:
    assert gates(told(0.98, "tp2 (A/A)")) == {"time.idle"}


def test_what_it_idles_elsewhere_counts() -> None:
    assert gates(told(0.98, rest_s=0.3)) == {"time.idle"}
