"""Are tokens and logits those of transformers? Pure functions of what both found.

The tie rule: a token may differ from transformers' only where the two largest logits are closer than twice the bound
of their errors. Behind such a place transformers follows the tokens that are judged, so every one of them is.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

BOUND = 1e-5
"""Relative L2 error of a sequence's logits."""


@dataclass(frozen=True)
class Greedy:
    """Greedy tokens of one sequence, [steps], and the logits [steps, vocabulary] that transformers gives there."""

    tokens: Sequence[int]
    logits: Tensor

    @property
    def near_ties(self) -> list[bool]:
        """At which steps the two largest logits are too close to tell. An element's error is at most its row's norm."""
        best = self.logits.double().topk(2).values
        return (best[:, 0] - best[:, 1] <= 2 * BOUND * self.logits.double().norm(dim=-1)).tolist()

    @property
    def differing(self) -> list[int]:
        """Steps where another token is the largest."""
        largest = self.logits.argmax(-1).tolist()
        return [step for step, token in enumerate(self.tokens) if token != largest[step]]

    @property
    def wrong(self) -> list[int]:
        """Of these, the steps that no near tie excuses."""
        ties = self.near_ties
        return [step for step in self.differing if not ties[step]]

    def parts_from(self, other: Sequence[int]) -> int | None:
        """The first step at which a continuation that was found apart has another token."""
        assert len(other) == len(self.tokens)
        pairs = zip(self.tokens, other, strict=True)
        return next((step for step, (mine, theirs) in enumerate(pairs) if mine != theirs), None)

    def parts_wrongly(self, other: Sequence[int]) -> bool:
        """Whether the two part where there is no near tie."""
        step = self.parts_from(other)
        return step is not None and not self.near_ties[step]

    def counts(self, other: Sequence[int]) -> Counter[str]:
        """What is printed."""
        return Counter(
            {
                "compared": len(self.tokens),
                "near ties": sum(self.near_ties),
                "other tokens at near ties": len(self.differing) - len(self.wrong),
                "continuations that part from transformers' own there": int(self.parts_from(other) is not None),
            }
        )


def relative(found: Tensor, truth: Tensor) -> float:
    """Relative L2 distance."""
    assert found.shape == truth.shape, (found.shape, truth.shape)
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


@dataclass
class Tally:
    """What was compared: counts, and the largest errors."""

    counts: Counter[str] = field(default_factory=Counter)
    errors: dict[str, float] = field(default_factory=dict)

    def error(self, what: str, error: float) -> float:
        """The error itself, noted."""
        self.errors[what] = max(error, self.errors.get(what, 0.0))
        return error

    @property
    def lines(self) -> list[str]:
        """For people."""
        counts = ", ".join(f"{number} {what}" for what, number in self.counts.items())
        errors = ", ".join(f"{what} {error:.1e}" for what, error in self.errors.items())
        return [f"greedy tokens: {counts}"] * bool(counts) + [f"largest relative errors: {errors}"] * bool(errors)
