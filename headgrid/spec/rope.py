"""Rotary positions (Su et al. 2021) and the ways in which models stretch them to longer contexts. Pure numbers."""

import math
from dataclasses import dataclass
from typing import Literal

from headgrid.errors import InvalidInput

ROPE_SCALINGS = ("linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How the frequencies of a model trained on `original_positions` are stretched by `factor`.

    linear: all of them (Chen et al. 2023). llama3: those whose waves are longer than original_positions / low_factor,
    none shorter than original_positions / high_factor, and between these a mixture (Llama 3.1). yarn: those that turn
    less than `beta_slow` times in `original_positions`, none that turn more than `beta_fast` times (Peng et al. 2023),
    with cosines and sines times `attention_factor`.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_positions: int = 0
    low_factor: float = 1.0
    high_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    """Whether yarn rounds the first and last stretched channel to whole numbers, as it was published."""

    def __post_init__(self) -> None:
        """Raise InvalidInput for what no model does."""
        if self.kind not in ROPE_SCALINGS:
            raise InvalidInput(f"rotary positions are not scaled by {self.kind!r}", legal=ROPE_SCALINGS)
        for field in ("factor", "low_factor", "high_factor", "beta_fast", "beta_slow", "attention_factor"):
            if not 0 < getattr(self, field) < math.inf:
                raise InvalidInput(f"rope scaling: {field} = {getattr(self, field)} is not a positive number")
        if self.kind != "linear" and self.original_positions < 1:
            raise InvalidInput(f"rope scaling {self.kind} needs the positions that the model was trained on")
        if self.kind == "llama3" and self.low_factor >= self.high_factor:
            raise InvalidInput(f"rope scaling: low_factor {self.low_factor} >= high_factor {self.high_factor}")


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotary positions of a layer: channel c of the first half of `dim` turns with c + dim/2, by the position
    times its frequency, `theta`^(-2c/dim) before scaling.
    """

    theta: float
    dim: int
    scaling: RopeScaling | None = None

    @property
    def amplitude(self) -> float:
        """Factor of cosines and sines."""
        return self.scaling.attention_factor if self.scaling is not None else 1.0

    def frequencies(self) -> list[float]:
        """Radians per position of each pair, [dim / 2]."""
        plain = [self.theta ** (-2 * c / self.dim) for c in range(self.dim // 2)]
        if self.scaling is None:
            return plain
        if self.scaling.kind == "yarn":
            return self._yarn(plain, self.scaling)
        stretched = _llama3 if self.scaling.kind == "llama3" else _linear
        return [stretched(frequency, self.scaling) for frequency in plain]

    def _yarn(self, plain: list[float], scaling: RopeScaling) -> list[float]:
        def channel(turns: float) -> float:
            """The pair that turns so many times in the positions that the model was trained on."""
            return self.dim * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        width = (high - low) or 0.001  # the published code's guard
        stretch = [min(1.0, max(0.0, (c - low) / width)) for c in range(len(plain))]
        return [f / scaling.factor * s + f * (1 - s) for f, s in zip(plain, stretch, strict=True)]


def _linear(frequency: float, scaling: RopeScaling) -> float:
    return frequency / scaling.factor


def _llama3(frequency: float, scaling: RopeScaling) -> float:
    waves = scaling.original_positions * frequency / (2 * math.pi)  # in the positions that the model was trained on
    kept = (waves - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
    kept = min(1.0, max(0.0, kept))
    return kept * frequency + (1 - kept) * frequency / scaling.factor
