"""Several comparisons at once: the more are made, the more are won by chance.

Declared beforehand are every arm against the baseline in both phases (`primary`); their verdicts are held jointly, by
Holm's procedure (S. Holm, "A simple sequentially rejective multiple test procedure", 1979), so that the chance of even
one false claim among them stays at 5 %. All others are `exploratory`: they show where to look next, and claim nothing.
The A/A pair (`null`) is a question about the machine and not one of the family.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from headgrid.experiment.confidence import Confidence

LEVEL = 0.05


def family(pair: tuple[str, str], arms: Sequence[Mapping[str, str]]) -> str:
    """Which of the three a comparison belongs to."""
    roles = {arm["label"]: arm["role"] for arm in arms}
    if "aa" in (roles[pair[0]], roles[pair[1]]):
        return "null"
    return "primary" if roles[pair[1]] == "baseline" else "exploratory"


def p_claim(confidence: Confidence, margin: float) -> float:
    """The two-sided p-value of the claim that comes nearest: faster, slower or equivalent by the margin.

    At most 0.05 exactly where the 95 % interval of the log ratio gives that verdict. Two-sided, because a claim may err
    on either side.
    """
    edge = math.log1p(margin)
    below, above = confidence.below(-edge), 1 - confidence.below(edge)
    faster, slower, equivalent = 1 - above, 1 - below, max(below, above)
    return min(1.0, 2 * min(faster, slower, equivalent))


def holm(values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given: the k-th smallest of n times n - k + 1, never below one before it."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


def judged_jointly(rows: Sequence[dict[str, Any]], claims: Sequence[float | None]) -> list[dict[str, Any]]:
    """The comparisons with `p_holm` and `verdict_holm`, None where they are not primary or have no interval."""
    chosen = [n for n, row in enumerate(rows) if row["family"] == "primary" and claims[n] is not None]
    adjusted = dict(zip(chosen, holm([p for n in chosen if (p := claims[n]) is not None]), strict=True))
    told = []
    for n, row in enumerate(rows):
        p = adjusted.get(n)
        verdict = "inconclusive" if p is None or p > LEVEL else row["verdict"]
        told.append(row | {"p_holm": p, "verdict_holm": verdict if row["family"] == "primary" else None})
    return told


def claimed(row: Mapping[str, Any]) -> str:
    """The verdict that a comparison may be quoted with."""
    return row.get("verdict_holm") or row["verdict"]
