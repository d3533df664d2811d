"""Runs the stage of a sharded transformers model: what a call of `forward` becomes on every rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headgrid.errors import InvalidInput
from headgrid.layout.batching import MicroBatch, cache_rows, prefill_calls
from headgrid.layout.layout import Layout
from headgrid.layout.span import Span
from headgrid.models.padding import Turn
from headgrid.runtime.attention import Queries
from headgrid.runtime.cache import KVCache
from headgrid.runtime.layer import Weights
from headgrid.runtime.mesh import Mesh
from headgrid.runtime.stage import Stage, StageCall
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

_LEAST_POSITIONS = 1024
"""Of rotary tables at first; they grow as texts do."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a turn that pass the model together: their new tokens from `start` on, or where `decoding` one each."""

    micro_batch: MicroBatch
    start: int
    count: int
    decoding: bool = False


def pieces(turn: Turn, layout: Layout) -> list[Piece]:
    """What the stage computes for a turn.

    Rows that stand at the same position go together, and so do all rows with one new token each. Else rows go alone:
    several new tokens behind texts of different lengths are rare (a second prompt to a batch, a prompt in chunks).
    """
    rows, count = len(turn.counts), turn.longest
    together = MicroBatch(cache_rows(layout, Span(0, rows)))
    if not count:
        return []
    if any(turn.starts) and set(turn.counts) == {1}:
        return [Piece(together, 0, 1, decoding=True)]
    if len(set(turn.starts)) == 1:
        calls = prefill_calls(layout, Workload(batch=rows, seq=count, decode_steps=0), 0)
        return [Piece(call.micro_batch, turn.starts[0], count) for call in calls]
    alone = [(row, start, own) for row, (start, own) in enumerate(zip(turn.starts, turn.counts, strict=True)) if own]
    return [Piece(_only(row, together.parts), start, own) for row, start, own in alone]


def _only(row: int, owners: Sequence[Span]) -> MicroBatch:
    """One row, in the part of its owner; the other parts are empty."""
    return MicroBatch(
        tuple(Span(row, row + 1) if own.start <= row < own.stop else Span(own.start, own.start) for own in owners)
    )


def places(turn: Turn, piece: Piece, kept: Sequence[int]) -> list[tuple[int, int, int]]:
    """The tokens of a piece that are wanted, of the call's columns `kept` (ascending): their place in the piece, row,
    and which of `kept` it is.
    """
    found: list[tuple[int, int, int]] = []
    for k, row in enumerate(piece.micro_batch.rows()):
        first, count = turn.firsts[row], turn.counts[row]
        found += [
            (k * piece.count + column - first, row, which)
            for which, column in enumerate(kept)
            if first <= column < first + count
        ]
    return found


class Driver:
    """A model's shards on this rank, and the ranks that hold the others. All of them make the same calls in turn."""

    def __init__(self, model: ModelSpec, layout: Layout, mesh: Mesh, weights: Weights) -> None:
        """`weights` as from `layer.load`."""
        self.model, self.layout, self.mesh, self.weights = model, layout, mesh, weights
        self._positions = 0
        self._make_room(min(_LEAST_POSITIONS, model.max_positions))

    def _make_room(self, positions: int) -> None:
        """Rotary tables for at least so many positions; at most doubled, so that they seldom grow."""
        if positions > self._positions:
            self._positions = max(positions, 2 * self._positions)
            parts = self.model, self.layout, self.mesh.stage, self.weights
            self.stage = Stage(*parts, None, Span(0, 0), positions=self._positions)

    @property
    def device(self) -> torch.device:
        """Where the shards are."""
        return self.stage.device

    def run(self, ids: Tensor, turn: Turn, kept: Sequence[int], cache: tuple[KVCache, Span] | None) -> Tensor:
        """The logits [rows, len(kept), vocab_size] of the call's columns `kept`, whole on every rank, zeros for
        padding; of a model without a head its hidden states.

        `ids` [rows, columns], the same on every rank. `cache` holds the past and the rows of it that this rank keeps,
        with room for the turn's tokens; None where there is no past and none is wanted.
        """
        model, aligned = self.model, turn.aligned(ids)
        self._make_room(turn.past.longest + turn.longest)
        self.stage.cache, self.stage.owned = cache or (None, Span(0, len(ids)))
        width = model.vocab_size if model.head == "vocabulary" else model.hidden_size
        out = torch.zeros(len(ids), len(kept), width, dtype=self.stage.dtype, device=self.device)
        for piece in pieces(turn, self.layout):
            wanted = places(turn, piece, kept)
            x = aligned[piece.micro_batch.rows(), : piece.count]
            found = self.stage.forward(x, self._call(turn, piece, [place for place, _, _ in wanted]))
            if wanted:
                _, rows, which = zip(*wanted, strict=True)
                out[list(rows), list(which)] = found
        self.stage.cache = None  # the caller may let go of it
        return out

    def _call(self, turn: Turn, piece: Piece, wanted: list[int]) -> StageCall:
        rows = piece.micro_batch.rows()
        starts = tuple(turn.starts[row] for row in rows) if piece.decoding else (piece.start,) * len(rows)
        lengths = None if self.model.is_causal else tuple(max(1, turn.counts[row]) for row in rows)
        at = torch.tensor(starts, dtype=torch.int64, device=self.device)
        return StageCall(piece.micro_batch, Queries(piece.count, starts, at, piece.decoding, lengths), wanted)

    def first_rank_s(self, x: Tensor) -> Tensor:
        """The first rank's `x` (integers or bool, of the same shape on every rank) on every rank."""
        tp = self.mesh.tp
        if tp.size == 1:
            return x
        mine = x.to(self.device, torch.int64)
        return tp.all_reduce(mine if tp.index == 0 else torch.zeros_like(mine), alike=False).to(x.device, x.dtype)

    def check_alike(self, *inputs: Tensor | None) -> None:
        """Raise InvalidInput, on every rank, unless all ranks have the same integers here.

        The sum over ranks of a hash h and of h^2 tells: P sum h^2 = (sum h)^2 only where all are equal.
        """
        tp = self.mesh.tp
        if tp.size == 1:
            return
        own = _hash(inputs, self.device)
        total, squares = tp.all_reduce(torch.stack([own, own * own]), alike=False).tolist()
        if tp.size * squares != total * total:
            raise InvalidInput(
                "the ranks were given different tokens, masks or positions",
                why="all ranks of a layout compute one batch together",
                legal=("the same prompts on every rank", "the same arguments of generate on every rank"),
            )

    def share_random_state(self) -> None:
        """Set torch's random numbers on every rank to those of the first rank, so that all sample the same tokens."""
        if self.mesh.tp.size == 1:
            return
        torch.set_rng_state(self.first_rank_s(torch.get_rng_state()))
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.first_rank_s(torch.cuda.get_rng_state(self.device)), self.device)


def _hash(inputs: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """20 bits of the inputs' integers and shapes, as an int64 scalar."""
    parts: list[Tensor] = []
    for x in inputs:
        shape = [-1] if x is None else [*x.shape]
        parts.append(torch.tensor(shape, dtype=torch.int64, device=device))
        if x is not None:
            parts.append(x.detach().reshape(-1).to(device, torch.int64))
    whole = torch.cat(parts)
    odd = torch.arange(len(whole), device=device) * 2654435761 + 40503  # Knuth's multiplicative hash, by place
    mixed = ((whole + 1) * odd).sum()
    mixed = mixed ^ (mixed >> 29)
    return (mixed * -7046029254386353131 >> 40) & 0xFFFFF
