"""Which sequences a rank computes and caches, and in which micro-batches they pass through the pipeline."""

import functools
from dataclasses import dataclass

from headgrid.layout.layout import Layout
from headgrid.layout.span import Span, Spans, balanced, indices, total
from headgrid.spec.workload import Workload

PIPELINE_FILL = 4
"""Micro-batches per stage in prefill: with pp stages the pipeline idles (pp - 1) / (4 pp + pp - 1) of the time."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of the global batch that go through the model together: one span for each owner of cache rows.

    With the exchange `batch` there are m owners, and owner j attends to span j; else there is one.
    """

    parts: Spans

    @property
    def size(self) -> int:
        """Number of sequences."""
        return total(self.parts)

    def rows(self) -> list[int]:
        """Global rows, in the order in which they are computed."""
        return indices(self.parts)


def attended_rows(layout: Layout, micro_batch: MicroBatch, slice_index: int) -> int:
    """Sequences of a micro-batch whose attention a slice computes: its own part with `batch`, else all."""
    return len(micro_batch.parts[slice_index]) if layout.exchange == "batch" else micro_batch.size


def replica_rows(layout: Layout, batch: int) -> Spans:
    """Rows of the global batch for each of the dp replicas."""
    return balanced(batch, layout.dp)


def cache_rows(layout: Layout, rows: Span) -> Spans:
    """Of a replica's rows, those whose keys and values each owner keeps."""
    return balanced(rows, layout.num_dim_slices) if layout.exchange == "batch" else (rows,)


def owned_rows(layout: Layout, batch: int, rank: int) -> Span:
    """The rows whose keys and values `rank` keeps."""
    at = layout.coordinates(rank)
    owners = cache_rows(layout, replica_rows(layout, batch)[at.dp])
    return owners[at.slice if len(owners) > 1 else 0]


def _micro_batches(layout: Layout, rows: Span, count: int) -> tuple[MicroBatch, ...]:
    owners = cache_rows(layout, rows)
    fewest = min if layout.weights == "gathered" else max  # gathered: every slice has a sequence in each micro-batch
    count = max(1, min(count, fewest(len(owner) for owner in owners)))
    split = [balanced(owner, count) for owner in owners]
    return tuple(MicroBatch(tuple(parts)) for parts in zip(*split, strict=True))


@functools.lru_cache(maxsize=8)  # predictions ask for the same plan for every rank of a replica
def prefill_micro_batches(layout: Layout, workload: Workload, replica: int) -> tuple[MicroBatch, ...]:
    """Micro-batches of whole sequences, in order, within `workload.chunk_tokens` where one sequence allows it.

    With gathered weights a micro-batch is larger, so that each gathered layer serves many sequences; it is computed
    in `chunks` of that size.
    """
    rows = replica_rows(layout, workload.batch)[replica]
    per_call = max(1, workload.chunk_tokens // workload.seq)
    if layout.exchange == "batch":  # every slice needs a row in each call, or it would sit idle
        per_call = max(per_call // layout.num_dim_slices, 1) * layout.num_dim_slices
    count = 1 if layout.weights == "gathered" else -(-len(rows) // per_call)
    if layout.pp > 1:
        count = max(count, PIPELINE_FILL * layout.pp)
    return _micro_batches(layout, rows, count)


def chunks(rows: int, workload: Workload) -> Spans:
    """Pieces of a slice's own sequences that are computed together, within `workload.chunk_tokens`."""
    per_call = max(1, workload.chunk_tokens // workload.seq)
    return balanced(rows, -(-rows // per_call)) if rows else ()


def decode_micro_batches(layout: Layout, workload: Workload, replica: int) -> tuple[MicroBatch, ...]:
    """One micro-batch for each pipeline stage, so that all stages work at the same time."""
    return _micro_batches(layout, replica_rows(layout, workload.batch)[replica], layout.pp)
