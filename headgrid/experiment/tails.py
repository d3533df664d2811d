"""Tail percentiles of block times, where there are blocks enough to have a tail; else the reason why not.

A quantile q of n values needs n (1 - q) >= 10, or it is about the largest few. Its interval is that of two order
statistics, whose ranks the binomial distribution gives without any assumption on the times' own (W. J. Conover,
"Practical nonparametric statistics", 3.2); it takes blocks for independent, and is of one launch at a time. From
MIN_LAUNCHES launches on, the launches' quantiles have a t interval, as all figures do.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from headgrid.experiment.confidence import of_independent
from headgrid.experiment.records import MIN_LAUNCHES, Record, block_times, is_verified
from headgrid.experiment.telemetry_series import PHASES

QUANTILES = (0.9, 0.99)
LEAST_BEYOND = 10
PER_STEP = (
    "refused: decode steps are timed together, not one by one, since reading a clock between two steps would make the"
    " host wait for the device"
)


def order_statistics(values: Sequence[float], q: float) -> tuple[float, tuple[float, float]]:
    """The sample's quantile q, the smallest value with a share of q at or below it, and its 95 % interval.

    Raises ValueError where fewer than LEAST_BEYOND values are expected beyond it.
    """
    if (why := too_few(len(values), q)) is not None:
        raise ValueError(why)
    from scipy.special import bdtr

    ranked, n = sorted(values), len(values)
    below = [float(bdtr(k, n, q)) for k in range(n)]  # chance that at most k values are below the quantile
    low = max((k for k in range(n) if k == 0 or below[k - 1] <= 0.025), default=0)
    high = min((k for k in range(n) if below[k] >= 0.975), default=n - 1)
    place = min(n - 1, max(0, -int(-q * n // 1) - 1))
    return ranked[place], (ranked[low], ranked[high])


def too_few(n: int, q: float) -> str | None:
    """Why n values have no quantile q, or None if they have."""
    needed = round(LEAST_BEYOND / (1 - q))
    if n >= needed:
        return None
    return f"refused: p{100 * q:g} of {n} blocks is about the largest few; it takes {needed}"


def tails(design: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """`tails` of summary.json: `per_step`, why there is no percentile of steps, and a row for each arm, phase and
    quantile with `seconds` and `ci95` of a block's time, or with why it is `refused`.
    """
    rows = [
        {"label": arm["label"], "phase": phase, "quantile": q, **_tail(records, arm["label"], phase, q)}
        for arm in design["arms"]
        if is_verified(records, arm["label"])
        for phase in PHASES
        for q in QUANTILES
    ]
    return {"per_step": PER_STEP, "blocks": rows}


def _tail(records: Sequence[Record], arm: str, phase: Any, q: float) -> dict[str, Any]:
    launches: dict[int, list[float]] = {}
    for key, seconds in block_times(records, arm, phase).items():
        launches.setdefault(key.launch, []).append(seconds)
    fewest = min(map(len, launches.values()), default=0)
    none = {"seconds": None, "ci95": None, "blocks": fewest, "unit": None}
    if (why := too_few(fewest, q)) is not None:
        return none | {"refused": why}
    found = [order_statistics(values, q) for values in launches.values()]
    if len(found) == 1:
        return none | {"seconds": found[0][0], "ci95": list(found[0][1]), "unit": "this launch", "refused": None}
    if len(found) < MIN_LAUNCHES:
        return none | {"refused": f"refused: {len(found)} launches are more than one and fewer than {MIN_LAUNCHES}"}
    over = of_independent([value for value, _ in found])
    seconds, ci95 = fmean(value for value, _ in found), list(over.ci95) if over else None
    return none | {"seconds": seconds, "ci95": ci95, "unit": "launch", "refused": None}
