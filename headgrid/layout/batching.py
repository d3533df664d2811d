"""Which sequences and positions a rank computes and caches, and in which calls they pass through the pipeline."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from headgrid.layout.layout import Coordinates, Layout
from headgrid.layout.span import Span, Spans, balanced, indices, total
from headgrid.spec.workload import Workload

_Some = TypeVar("_Some")
PIPELINE_FILL = 4
"""Micro-batches per stage in prefill: with pp stages the pipeline idles (pp - 1) / (4 pp + pp - 1) of the time."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of the global batch that go through the model together: one span for each owner of cache rows.

    With the exchange `batch` there are m owners, and slice j attends to span j; with `dp-attention` every rank that
    shares a layer is one; else there is one.
    """

    parts: Spans

    @property
    def size(self) -> int:
        """Number of sequences."""
        return total(self.parts)

    def rows(self) -> list[int]:
        """Global rows, in the order in which they are computed."""
        return indices(self.parts)


def attended_rows(layout: Layout, micro_batch: MicroBatch, at: Coordinates) -> list[int]:
    """Sequences of a micro-batch whose attention a rank computes: those of its owner's part."""
    return indices((micro_batch.parts[layout.row_owner(at)],))


def projected_rows(layout: Layout, micro_batch: MicroBatch, at: Coordinates) -> int:
    """Sequences of a micro-batch that a rank multiplies with its attention weights: all, or with `dp-attention` its
    own.
    """
    return micro_batch.size if layout.attention == "cut" else len(micro_batch.parts[layout.row_owner(at)])


def token_shares(layout: Layout, rows: int, queries: int) -> Spans:
    """Where the hidden states of a call are divided: the tokens that each rank that shares a layer holds, of so many
    queries of each of `rows` sequences. Balanced; with `dp-attention` by whole sequences.
    """
    if layout.attention == "cut":
        return balanced(rows * queries, layout.tp)
    return tuple(Span(span.start * queries, span.stop * queries) for span in balanced(rows, layout.tp))


def replica_rows(layout: Layout, batch: int) -> Spans:
    """Rows of the global batch for each of the dp replicas."""
    return balanced(batch, layout.dp)


def cache_rows(layout: Layout, rows: Span) -> Spans:
    """Of a replica's rows, those whose keys and values each owner keeps."""
    return balanced(rows, layout.row_owners)


def owned_rows(layout: Layout, batch: int, rank: int) -> Span:
    """The rows whose keys and values `rank` keeps."""
    at = layout.coordinates(rank)
    owners = cache_rows(layout, replica_rows(layout, batch)[at.dp])
    return owners[layout.row_owner(at)]


def _micro_batches(layout: Layout, rows: Span, count: int) -> tuple[MicroBatch, ...]:
    owners = cache_rows(layout, rows)
    fewest = min if layout.weights == "gathered" else max  # gathered: every slice has a sequence in each micro-batch
    count = max(1, min(count, fewest(len(owner) for owner in owners)))
    split = [balanced(owner, count) for owner in owners]
    return tuple(MicroBatch(tuple(parts)) for parts in zip(*split, strict=True))


@dataclass(frozen=True, slots=True)
class Call:
    """One forward call of prefill: some sequences, and the positions of each that are computed."""

    micro_batch: MicroBatch
    positions: Span

    def ending(self, workload: Workload) -> list[int]:
        """Which of the call's sequences, by their place in it, have the last token of their prompt here."""
        if not workload.prompt_lengths:
            return list(range(self.micro_batch.size)) if self.positions.stop == workload.seq else []
        first, last = self.positions.start + 1, self.positions.stop
        return [k for k, row in enumerate(self.micro_batch.rows()) if first <= workload.length(row) <= last]

    def wanted(self, workload: Workload) -> Sequence[int]:
        """Which of the call's tokens get logits, by their places: the last of each prompt, or all."""
        rows, queries = self.micro_batch.rows(), len(self.positions)
        if workload.every_token:
            return range(len(rows) * queries)
        before = self.positions.start + 1
        return [k * queries + workload.length(rows[k]) - before for k in self.ending(workload)]


def position_chunks(workload: Workload) -> Spans:
    """Positions that one call computes: all of a prompt, or at most `chunk_positions`."""
    return balanced(workload.seq, -(-workload.seq // workload.chunk_positions) if workload.chunk_positions else 1)


def _sequences_per_call(workload: Workload) -> int:
    return max(1, workload.chunk_tokens // len(position_chunks(workload)[0]))


@functools.lru_cache(maxsize=8)  # predictions ask for the same plan for every rank of a replica
def prefill_calls(layout: Layout, workload: Workload, replica: int) -> tuple[Call, ...]:
    """The calls of a prefill in order, each within `workload.chunk_tokens` where one sequence allows it.

    With gathered weights a call is larger, so that each gathered layer serves many sequences; a layer computes it in
    `pieces` of that size. Calls that take turns are of different sequences, where there are several.
    """
    rows = replica_rows(layout, workload.batch)[replica]
    per_call = _sequences_per_call(workload)
    per_call = max(per_call // layout.row_owners, 1) * layout.row_owners  # an owner without a row would sit idle
    gathered = layout.weights == "gathered"
    count = 1 if gathered else max(layout.calls_at_once, -(-len(rows) // per_call))
    if layout.pp > 1:
        count = max(count, PIPELINE_FILL * layout.pp * layout.calls_at_once)
    if gathered:  # in each micro-batch every slice has sequences that take turns
        count = min(count, len(rows) // (layout.num_dim_slices * layout.pieces_at_once))
    positions = (Span(0, workload.seq),) if gathered else position_chunks(workload)
    micro_batches = _micro_batches(layout, rows, count)
    return tuple(Call(mb, span) for mb, span in _in_turn(micro_batches, positions, layout.calls_at_once))


def _in_turn(several: Sequence[_Some], positions: Spans, at_once: int) -> Iterator[tuple[_Some, Span]]:
    """All positions of the first `at_once`, chunk by chunk, then those of the next."""
    for first in range(0, len(several), at_once):
        for span in positions:
            for some in several[first : first + at_once]:
                yield some, span


def pieces(layout: Layout, rows: int, workload: Workload) -> tuple[tuple[Span, Span], ...]:
    """With gathered weights: sequences of a slice's own, and their positions, that are computed together within
    `workload.chunk_tokens`. Pieces that take turns are of different sequences, where there are several.
    """
    if not rows:
        return ()
    several = balanced(rows, min(rows, max(layout.pieces_at_once, -(-rows // _sequences_per_call(workload)))))
    return tuple(_in_turn(several, position_chunks(workload), layout.pieces_at_once))


def decode_micro_batches(layout: Layout, workload: Workload, replica: int) -> tuple[MicroBatch, ...]:
    """One micro-batch for each pipeline stage, so that all stages work at the same time; all in one where the pipeline
    is drained after each token.
    """
    count = 1 if layout.decode == "drained" else layout.pp
    return _micro_batches(layout, replica_rows(layout, workload.batch)[replica], count)


def query_share(queries: int, num_slices: int, slice_index: int) -> Spans:
    """Of a call's queries, those that a slice attends for with the exchange `sequence`.

    The j-th and the j-th last of 2m spans: under a causal mask early queries see few keys and late ones many.
    """
    spans = balanced(queries, 2 * num_slices)
    both = spans[slice_index], spans[2 * num_slices - 1 - slice_index]
    return tuple(span for span in both if len(span))  # not merged: keys behind the first span are not for it


def cached_positions(layout: Layout, positions: int, slice_index: int) -> int:
    """Of the first so many positions, those whose keys a slice keeps: with `sequence` every m-th from its own on."""
    if layout.exchange != "sequence":
        return positions
    return len(range(slice_index, positions, layout.num_dim_slices))


_SCORE_ELEMENTS = 1 << 24


def score_blocks(rows: int, start: int, queries: int, *, is_causal: bool) -> tuple[tuple[Span, int], ...]:
    """Blocks of queries whose partial scores are held and summed at a time, with the keys they need.

    `rows` is sequences x heads, `start` the position of the first query; at most 16 Mi scores, at least one query.
    """
    keys = start + queries
    step = max(1, _SCORE_ELEMENTS // max(1, rows * keys))
    blocks = [Span(first, min(first + step, queries)) for first in range(0, queries, step)]
    return tuple((block, start + block.stop if is_causal else keys) for block in blocks)


def visible(queries: Span, keys: int, window: int, is_causal: bool) -> Span:
    """The span of keys, out of `keys`, that some of these queries see."""
    if not is_causal:
        return Span(0, keys)
    return Span(max(0, queries.start - window + 1) if window else 0, queries.stop)
