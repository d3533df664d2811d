"""From windows and points to figures: medians of what has settled, and lines through the times of collectives.

Pure functions, no torch.
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from headgrid.errors import InvalidInput
from headgrid.spec.calibration import Measured

LEAST_WINDOWS = 4
SETTLED = 0.02
"""Medians of the last quarter of the windows and of the quarter before may differ by so much. A GPU that falls from its
burst to its power limit moves by 10 % and more."""


def measured(windows: Sequence[Sequence[float]], *, larger_is_better: bool = True) -> Measured:
    """A figure from each rank's consecutive windows: of the later half of each, when clocks have settled.

    Raises InvalidInput for fewer than LEAST_WINDOWS windows of a rank, or values that are not positive.
    """
    if not windows or any(len(rank) < LEAST_WINDOWS for rank in windows):
        raise InvalidInput(
            f"{min((len(rank) for rank in windows), default=0)} windows are too few for a figure",
            why=f"it needs {LEAST_WINDOWS} on every rank",
            legal=("a larger --seconds",),
        )
    late = [list(rank[len(rank) // 2 :]) for rank in windows]
    medians = tuple(median(rank) for rank in late)
    every = [value for rank in windows for value in rank]
    return Measured(
        median=median(medians),
        low=min(map(min, late)),
        high=max(map(max, late)),
        best=max(every) if larger_is_better else min(every),
        n=sum(map(len, late)),
        settled=all(map(has_settled, windows)),
        per_rank=medians,
    )


def has_settled(windows: Sequence[float]) -> bool:
    """Whether the last quarter's median is the one of the quarter before, within SETTLED."""
    quarter = max(1, len(windows) // 4)
    before, after = median(windows[-2 * quarter : -quarter]), median(windows[-quarter:])
    return abs(after / before - 1) <= SETTLED


class Line(NamedTuple):
    """time = alpha + bytes / beta with 95 % intervals and the relative errors at the points; see `calibration.Cost`."""

    alpha_s: float
    alpha_ci95: tuple[float, float] | None
    beta_bytes_per_s: float | None
    beta_ci95: tuple[float, float] | None
    rms_relative_error: float
    worst_relative_error: float


LEAST_SIZES = 4


def fit_line(sizes: Sequence[float], times: Sequence[float]) -> Line:
    """Least squares of relative errors: minimises sum((alpha + g x_i) / t_i - 1)^2 over alpha, g = 1 / beta >= 0.

    Relative, because times span orders of magnitude and each size matters to someone. Intervals: Student's t with
    n - 2 degrees of freedom on the fit's covariance s^2 (A^T A)^-1; where the line does not follow the points, s and
    with it the intervals are wide. A figure that would be negative is 0 (alpha) or None (beta), without an interval.
    Raises InvalidInput for fewer than LEAST_SIZES different sizes, or sizes and times that are not positive.
    """
    if any(not 0 < value < math.inf for value in (*sizes, *times)) or len(sizes) != len(times):
        raise InvalidInput("a size or a time is not a positive number", numbers=f"{list(sizes)}, {list(times)}"[:300])
    if len(set(sizes)) < LEAST_SIZES:
        raise InvalidInput(f"{len(set(sizes))} different sizes are too few for a line", why=f"it needs {LEAST_SIZES}")
    wide, long = max(sizes), max(times)  # scaled: squares of bytes and of microseconds differ by 10^30
    u, v = [long / t for t in times], [(x / wide) * (long / t) for x, t in zip(sizes, times, strict=True)]
    uu, uv, vv = (sum(a * b for a, b in zip(p, q, strict=True)) for p, q in ((u, u), (u, v), (v, v)))
    det = uu * vv - uv * uv
    alpha, slope = (vv * sum(u) - uv * sum(v)) / det, (uu * sum(v) - uv * sum(u)) / det
    bounded = alpha >= 0 and slope > 0
    if alpha < 0:
        alpha, slope = 0.0, sum(v) / vv
    elif slope <= 0:
        alpha, slope = sum(u) / uu, 0.0
    errors = [alpha * a + slope * b - 1 for a, b in zip(u, v, strict=True)]
    squares = sum(error * error for error in errors)
    half = _half_widths(squares / (len(u) - 2), det, (vv, uu), len(u) - 2) if bounded else (math.inf, math.inf)
    low = slope - half[1]
    beta = wide / long
    return Line(
        alpha * long,
        (max(0.0, alpha - half[0]) * long, (alpha + half[0]) * long) if bounded else None,
        beta / slope if slope else None,
        (beta / (slope + half[1]), beta / low) if bounded and low > 0 else None,
        math.sqrt(squares / len(u)),
        max(map(abs, errors)),
    )


def _half_widths(variance: float, det: float, diagonal: tuple[float, float], freedom: int) -> tuple[float, float]:
    """Of the two parameters' 95 % intervals."""
    from scipy.special import stdtrit

    quantile = float(stdtrit(freedom, 0.975))
    first, second = (quantile * math.sqrt(variance * part / det) for part in diagonal)
    return first, second
