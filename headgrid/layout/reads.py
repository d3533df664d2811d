"""What a decode step has to read from memory, in bytes: the weights of a rank once, and the keys and values it attends.

A floor, not a count of what a schedule reads: a pipeline that passes several micro-batches a step reads weights once
for each, a kernel may read keys twice, and activations are left out. Over the time of a step and the bandwidth of the
device it is the share of the step that the bytes alone need.
"""

from dataclasses import dataclass

from headgrid.layout.batching import cached_positions, owned_rows, visible
from headgrid.layout.layout import Layout
from headgrid.layout.quantised import stored_bytes
from headgrid.layout.shards import head_shard, parameters, stage_layers
from headgrid.layout.span import Span
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

_LOOKED_UP = ("positions.weight", "token_types.weight")
"""Tables of which a step reads a row for each sequence: next to nothing."""


@dataclass(frozen=True, slots=True)
class Reads:
    """Bytes of one rank in one decode step: a mean over the steps of a run, so the cache's need not be whole."""

    weights_bytes: int
    cache_bytes: float

    @property
    def total_bytes(self) -> float:
        """Both."""
        return self.weights_bytes + self.cache_bytes


def weight_read_bytes(model: ModelSpec, layout: Layout, rank: int, element_bytes: int) -> int:
    """Bytes of all weights that `rank` multiplies with in a step: what it stores, without the tables from which it
    only looks rows up. A tied embedding is read by the stage that makes logits of it.
    """
    last = layout.coordinates(rank).pp == layout.pp - 1
    skipped = _LOOKED_UP if model.tied_embeddings and last else (*_LOOKED_UP, "embedding.weight")
    shards = parameters(model, layout, rank)
    return sum(stored_bytes(layout, name, shards[name], element_bytes) for name in shards if name not in skipped)


def cache_read_bytes(model: ModelSpec, layout: Layout, workload: Workload, rank: int, step: int) -> int:
    """Bytes of the keys and values that `rank` attends to in decode step `step` (0: the first after the prompt):

    sum over its layers and rows of (positions it keeps of those that are visible) x KV heads x (w_K + w_V) x e, where
    a sequence of prompt length L has L + step + 1 positions, its newest included, or those of a window. Rows, positions
    and the channels w_K and w_V of a head are those of the cache (`memory.cache_shape`).
    """
    at = layout.coordinates(rank)
    own = head_shard(model, layout, at.head_group, at.slice)
    k_width = model.head_dim if layout.exchange in ("gather", "batch", "sequence") else own.qk_width
    v_width = model.head_dim if layout.exchange in ("batch", "sequence") else len(own.v_channels)
    layers, rows = stage_layers(model, layout)[at.pp], owned_rows(layout, workload.batch, rank)
    ends = [workload.length(row) + step for row in range(rows.start, rows.stop)]
    positions = sum(
        _kept(layout, at.slice, visible(Span(end, end + 1), end + 1, window, is_causal=True)) * count
        for window, count in _counted([model.window(layer) for layer in range(layers.start, layers.stop)]).items()
        for end in ends
    )
    return positions * len(own.kv_heads) * (k_width + v_width) * workload.element_bytes


def _kept(layout: Layout, slice_index: int, seen: Span) -> int:
    """Of visible positions, those that a slice keeps."""
    return cached_positions(layout, seen.stop, slice_index) - cached_positions(layout, seen.start, slice_index)


def _counted(values: list[int]) -> dict[int, int]:
    return {value: values.count(value) for value in dict.fromkeys(values)}


def decode_reads(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> Reads:
    """Of a mean step of `workload.decode_steps`. Visible positions grow evenly without windows, so the mean is that of
    the first and last step; with windows every step is counted.
    """
    steps = range(max(1, workload.decode_steps))
    windows = any(model.window(layer) for layer in range(model.num_layers))
    counted = list(steps) if windows or layout.exchange == "sequence" else [steps[0], steps[-1]]
    cache = sum(cache_read_bytes(model, layout, workload, rank, step) for step in counted) / len(counted)
    return Reads(weight_read_bytes(model, layout, rank, workload.element_bytes), cache)


def fullest(model: ModelSpec, layout: Layout, workload: Workload) -> Reads:
    """Of the rank that has most to read: the step takes at least its time."""
    each = (decode_reads(model, layout, workload, rank) for rank in range(layout.ranks))
    return max(each, key=lambda reads: reads.total_bytes)
