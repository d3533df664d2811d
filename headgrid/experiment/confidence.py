"""How sure measurements make one of their mean, also where each resembles the one before it.

Independent values (means of launches) give Student's t. Blocks of one launch need not be independent, and a handful of
them cannot say whether they are, so the plain t interval is too narrow by an unknown factor. They are taken for a
stationary Gaussian AR(1) series of unknown autocorrelation r, every r from 0 to MOST_DEPENDENT being as likely
beforehand. For a known r, generalised least squares give the mean a t distribution; over r these are mixed with the
weights that the data give each r (the marginal posterior with Jeffreys' prior for mean and scale: Zellner, "An
Introduction to Bayesian Inference in Econometrics", 1971, chapter 4.1). Independence is thus never assumed, and
is found where there are blocks enough to show it. `benchmarks/coverage.py` measures how often the intervals hold;
docs/protocol.md has its table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from headgrid.experiment.records import MIN_LAUNCHES, BlockKey, by_launch

MOST_DEPENDENT = 0.99
"""Autocorrelation of one block with the next. Beyond it a launch is a single observation, and only launches help."""
_GRID = np.linspace(0.0, MOST_DEPENDENT, 34)
_HALVINGS = 45
_TINY, _HUGE = 1e-300, 1e300

Array = np.ndarray[Any, Any]
Series = Sequence[tuple[int, float]]
"""Place and value of the blocks of one launch, in the order in which they ran; places may be missing."""


@dataclass(frozen=True, slots=True, eq=False)
class Confidence:
    """A mixture of t distributions of the mean: their places, scales and weights, one of each for every r."""

    places: Array
    scales: Array
    weights: Array
    freedom: int

    def below(self, x: float) -> float:
        """The confidence that the mean is below `x`, from 0 to 1."""
        return float(self._below(np.array([x]))[0])

    def _below(self, x: Array) -> Array:
        from scipy.special import stdtr  # scipy.stats would take a second to import

        away = x[:, None] - self.places
        t = away / np.maximum(self.scales, _TINY) if self.scales.any() else np.sign(away) * _HUGE
        return stdtr(self.freedom, t) @ self.weights

    @property
    def ci95(self) -> tuple[float, float]:
        """The central 95 %. A mixture's quantiles are between those of its parts, where they are sought by halving."""
        from scipy.special import stdtrit

        levels = np.array([0.025, 0.975])
        edges = self.places + self.scales * stdtrit(self.freedom, levels)[:, None]
        low, high = edges.min(1), edges.max(1)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            beyond = self._below(middle) < levels
            low, high = np.where(beyond, middle, low), np.where(beyond, high, middle)
        return float(low[0] + high[0]) / 2, float(low[1] + high[1]) / 2


def of_independent(values: Sequence[float]) -> Confidence | None:
    """Student's t of independent values; None of fewer than two."""
    if len(values) < 2:
        return None
    scale = stdev(values) / len(values) ** 0.5
    return Confidence(np.array([fmean(values)]), np.array([scale]), np.ones(1), len(values) - 1)


def of_series(launches: Sequence[Series]) -> Confidence | None:
    """Of blocks: AR(1) within a launch, nothing in common between launches but the mean. None of fewer than two.

    It knows only these launches: what another launch would change for all of its blocks is not in it.
    """
    flat = [value for series in launches for _, value in series]
    if len(flat) < 2:
        return None
    if min(flat) == max(flat):
        return Confidence(np.array(flat[:1]), np.zeros(1), np.ones(1), len(flat) - 1)
    parts = [_Whitened(series) for series in launches if series]
    precision = np.sum([part.precision for part in parts], 0)
    places = np.sum([part.weighted for part in parts], 0) / precision
    squares = np.sum([part.squares(places) for part in parts], 0)
    log_weights = np.sum([part.half_log_determinant for part in parts], 0) - np.log(precision) / 2
    log_weights -= (len(flat) - 1) / 2 * np.log(squares)
    weights = np.exp(log_weights - log_weights.max())
    scales = np.sqrt(squares / (len(flat) - 1) / precision)
    return Confidence(places, scales, weights / weights.sum(), len(flat) - 1)


def confidence_of(values: Mapping[BlockKey, float]) -> Confidence | None:
    """Over launch means from MIN_LAUNCHES launches on, else over blocks, which may depend on one another."""
    launches = by_launch(values)
    if len(launches) >= MIN_LAUNCHES:
        return of_independent([fmean(group) for group in launches.values()])
    keys = sorted(values)
    return of_series([[(key.block, values[key]) for key in keys if key.launch == launch] for launch in launches])


class _Whitened:
    """One launch's values with the dependence of each r taken out: arrays of (blocks, values of r)."""

    def __init__(self, series: Series) -> None:
        places, values = np.array([place for place, _ in series]), np.array([value for _, value in series])
        kept = _GRID[None, :] ** np.diff(places)[:, None]  # what is left of the block before
        spread = np.sqrt(1 - kept**2)
        first = np.ones((1, len(_GRID)))
        moved = (values[1:, None] - kept * values[:-1, None]) / spread
        self._values: Array = np.concatenate([first * values[0], moved])
        self._ones = np.concatenate([first, (1 - kept) / spread])
        self.half_log_determinant = -np.log(spread).sum(0)
        self.precision = (self._ones**2).sum(0)
        self.weighted = (self._ones * self._values).sum(0)

    def squares(self, mean: Array) -> Array:
        """Sum of the squares about a mean for each r."""
        return ((self._values - self._ones * mean) ** 2).sum(0)
