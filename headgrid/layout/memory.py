"""Predicted memory of one rank, in bytes."""

import math
from dataclasses import dataclass

from headgrid.layout.batching import MicroBatch, owned_rows, prefill_micro_batches
from headgrid.layout.layout import Layout
from headgrid.layout.shards import HeadShard, head_shard, parameters, stage_layers
from headgrid.layout.span import balanced
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Shapes of a rank's keys [layers, rows, KV heads, positions, d] and values [..., u]."""

    keys: tuple[int, int, int, int, int]
    values: tuple[int, int, int, int, int]

    @property
    def elements(self) -> int:
        """Elements of both."""
        return math.prod(self.keys) + math.prod(self.values)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank."""

    parameters_bytes: int
    kv_cache_bytes: int
    activations_peak_bytes: int
    communication_buffer_bytes: int

    @property
    def total_bytes(self) -> int:
        """Parameters, cache and activations; communication buffers are part of the activations' peak."""
        return self.parameters_bytes + self.kv_cache_bytes + self.activations_peak_bytes


def cache_shape(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> CacheShape:
    """The KV cache of `rank`: by rows for `batch`, K whole and V by channels for `gather`, else both by channels."""
    at = layout.coordinates(rank)
    own = head_shard(model, layout, at.head_group, at.slice)
    layers = len(stage_layers(model, layout)[at.pp])
    rows = len(owned_rows(layout, workload.batch, rank))
    k_width = model.head_dim if layout.exchange in ("gather", "batch") else own.qk_width
    v_width = model.head_dim if layout.exchange == "batch" else len(own.v_channels)
    outer = (layers, rows, len(own.kv_heads), workload.cache_positions)
    return CacheShape((*outer, k_width), (*outer, v_width))


@dataclass(frozen=True, slots=True)
class _Widths:
    """Elements per token of what a layer holds."""

    hidden: int
    projections: int
    q: int
    v_heads: int
    out: int
    mlp: int


def _widths(model: ModelSpec, layout: Layout, rank: int, own: HeadShard) -> _Widths:
    heads, kv = len(own.heads), len(own.kv_heads)
    out = heads * len(own.v_channels)
    mlp = len(balanced(model.mlp_hidden_size, layout.tp)[layout.tp_index(layout.coordinates(rank))])
    return _Widths(model.hidden_size, (heads + kv) * own.qk_width + kv * len(own.v_channels), heads, kv, out, mlp)


def parameters_bytes(model: ModelSpec, layout: Layout, rank: int, element_bytes: int) -> int:
    """Bytes of all weights that `rank` stores."""
    return sum(shard.num_elements for shard in parameters(model, layout, rank).values()) * element_bytes


def predict(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> Memory:
    """Memory of `rank` in a prefill, the phase with the most activations."""
    e = workload.element_bytes
    peak, buffer = 0, 0
    return Memory(
        parameters_bytes(model, layout, rank, e), cache_shape(model, layout, workload, rank).elements * e, peak, buffer
    )
