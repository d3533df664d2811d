"""Where the hidden states between the halves of a layer live, and how products with cut weights meet them.

T tokens of a call, P ranks that share a layer. `Replicated`: every rank holds all tokens, and sums are all-reduced.
`Sharded` (sequence parallelism; Korthikanti et al. 2022): rank r holds a share T_r of the tokens; they are gathered
before a product with owned columns, and its result's sum is scattered. Shares may be uneven, or empty.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from headgrid.layout.span import Span, balanced
from headgrid.runtime.collectives import Axis, differentiated


class Residual(Protocol):
    """How hidden states are held, among the ranks `tp`. Widths of rows may be any."""

    tp: Axis

    def own(self, tokens: int) -> Span:
        """The tokens that this rank holds."""
        ...

    def enter(self, x: Tensor, tokens: int) -> Tensor:
        """x [T_r, D] -> [T, D] on every rank, each of which uses it for a part of the work."""
        ...

    def leave(self, y: Tensor) -> Tensor:
        """The sum over ranks of their parts y [T, D], of the tokens that this rank holds: [T_r, D]."""
        ...

    def pick(self, x: Tensor, tokens: int, wanted: Sequence[int]) -> Tensor:
        """Rows of x, of the call's tokens `wanted` (ascending): [T_r, D] -> [len(wanted), D] on every rank."""
        ...


class Replicated:
    """Every rank holds the hidden states of all tokens."""

    def __init__(self, tp: Axis) -> None:
        """`tp` are the ranks that share a layer."""
        self.tp = tp

    def own(self, tokens: int) -> Span:
        """All tokens."""
        return Span(0, tokens)

    def enter(self, x: Tensor, tokens: int) -> Tensor:
        """x itself."""
        return self.tp.fan_out(x)

    def leave(self, y: Tensor) -> Tensor:
        """All-reduce, in place."""
        return self.tp.all_reduce(y)

    def pick(self, x: Tensor, tokens: int, wanted: Sequence[int]) -> Tensor:
        """Those rows."""
        return _rows(x, wanted)


class Sharded:
    """Every rank holds the hidden states of a share of the tokens: of whole runs of `unit` consecutive ones."""

    def __init__(self, tp: Axis, unit: int = 1) -> None:
        """`tp` are the ranks that share a layer; `unit` divides the tokens of every call."""
        self.tp, self.unit = tp, unit

    def own(self, tokens: int) -> Span:
        """This rank's share: consecutive tokens."""
        units = balanced(tokens // self.unit, self.tp.size)[self.tp.index]
        return Span(units.start * self.unit, units.stop * self.unit)

    def _sizes(self, tokens: int, width: int) -> list[int]:
        return [len(span) * self.unit * width for span in balanced(tokens // self.unit, self.tp.size)]

    def enter(self, x: Tensor, tokens: int) -> Tensor:
        """All-gather."""
        return self.tp.all_gather(x.reshape(-1), self._sizes(tokens, x.shape[1])).view(tokens, -1)

    def leave(self, y: Tensor) -> Tensor:
        """Reduce-scatter."""
        return self.tp.reduce_scatter(y.reshape(-1), self._sizes(len(y), y.shape[1])).view(-1, y.shape[1])

    def pick(self, x: Tensor, tokens: int, wanted: Sequence[int]) -> Tensor:
        """The rows that this rank holds, and zeros for the others, summed. With gradients: all tokens, gathered."""
        own = self.own(tokens)
        if differentiated(x):
            whole = self.tp.all_gather(x.reshape(-1), self._sizes(tokens, x.shape[1]), alike=True).view(tokens, -1)
            return _rows(whole, wanted)
        mine = [token - own.start for token in wanted if own.start <= token < own.stop]
        rows = x.new_zeros(len(wanted), x.shape[1])
        if mine:
            before = sum(token < own.start for token in wanted)
            rows[before : before + len(mine)] = _rows(x, mine)
        return self.tp.all_reduce(rows) if wanted else rows


def _rows(x: Tensor, wanted: Sequence[int]) -> Tensor:
    """Rows of x; a view where they are evenly spaced, as they are unless prompts differ in length: a list of places
    would make the host wait for the device, and could not be recorded in a CUDA graph.
    """
    if not wanted:
        return x[:0]
    step = wanted[1] - wanted[0] if len(wanted) > 1 else 1
    even = range(wanted[0], wanted[-1] + 1, step)
    if list(wanted) == list(even):
        return x[even.start : even.stop : step]
    return x[torch.tensor(wanted, device=x.device)]
