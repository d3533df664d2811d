"""Half-open index ranges, the atoms of every shard."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """The indices start, start + 1, ..., stop - 1. May be empty."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        """Raise ValueError for a range that runs backwards."""
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"not a span: [{self.start}, {self.stop})")

    def __len__(self) -> int:
        """Number of indices."""
        return self.stop - self.start

    def shift(self, offset: int) -> "Span":
        """The same length, `offset` further."""
        return Span(self.start + offset, self.stop + offset)

    def within(self, outer: "Span") -> "Span":
        """The same indices counted from the start of `outer`, which must contain them."""
        if not outer.start <= self.start <= self.stop <= outer.stop:
            raise ValueError(f"{self} is not within {outer}")
        return self.shift(-outer.start)


Spans = tuple[Span, ...]


def balanced(whole: Span | int, parts: int) -> Spans:
    """`parts` consecutive spans whose lengths differ by at most one, longer ones first.

    Every index falls into exactly one part; with more parts than indices the last ones are empty.
    """
    whole = Span(0, whole) if isinstance(whole, int) else whole
    short, longer = divmod(len(whole), parts)
    edges = [whole.start + k * short + min(k, longer) for k in range(parts + 1)]
    return tuple(Span(a, b) for a, b in itertools.pairwise(edges))


def merged(spans: Iterable[Span]) -> Spans:
    """The same indices in the same order, neighbours joined and empty spans dropped."""
    result: list[Span] = []
    for span in spans:
        if result and result[-1].stop == span.start:
            result[-1] = Span(result[-1].start, span.stop)
        elif len(span):
            result.append(span)
    return tuple(result)


def indices(spans: Sequence[Span]) -> list[int]:
    """All indices, in the order of the spans."""
    return [index for span in spans for index in range(span.start, span.stop)]


def total(spans: Sequence[Span]) -> int:
    """Number of indices in all spans together."""
    return sum(len(span) for span in spans)
