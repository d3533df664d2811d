"""Predicted memory of one rank, in bytes."""

import math
from dataclasses import dataclass

from headgrid.layout.activations import activations_peak_bytes, communication_buffer_bytes
from headgrid.layout.batching import cached_positions, decode_micro_batches, owned_rows
from headgrid.layout.layout import Layout
from headgrid.layout.quantised import stored_bytes
from headgrid.layout.shards import head_shard, parameters, stage_layers
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Shapes of a rank's keys [layers, rows, positions, KV heads, d] and values [..., u]."""

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
    decode_peak_bytes: int

    @property
    def working_bytes(self) -> int:
        """The most that either phase holds beside parameters and cache; communication buffers are part of it."""
        return max(self.activations_peak_bytes, self.decode_peak_bytes)

    @property
    def total_bytes(self) -> int:
        """Parameters, cache and what the phases hold."""
        return self.parameters_bytes + self.kv_cache_bytes + self.working_bytes


def cache_shape(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> CacheShape:
    """The KV cache of `rank`: by rows for `batch`, by positions for `sequence`, K whole and V by channels for
    `gather`, else both by channels.
    """
    at = layout.coordinates(rank)
    own = head_shard(model, layout, at.head_group, at.slice)
    layers = len(stage_layers(model, layout)[at.pp])
    rows = len(owned_rows(layout, workload.batch, rank))
    k_width = model.head_dim if layout.exchange in ("gather", "batch", "sequence") else own.qk_width
    v_width = model.head_dim if layout.exchange in ("batch", "sequence") else len(own.v_channels)
    outer = (layers, rows, cached_positions(layout, workload.cache_positions, at.slice), len(own.kv_heads))
    return CacheShape((*outer, k_width), (*outer, v_width))


def parameters_bytes(model: ModelSpec, layout: Layout, rank: int, element_bytes: int) -> int:
    """Bytes of all weights that `rank` stores, with the scales of those in FP8."""
    shards = parameters(model, layout, rank)
    return sum(stored_bytes(layout, name, shard, element_bytes) for name, shard in shards.items())


def predict(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> Memory:
    """Memory of `rank`: activations are those of a prefill, and of a decode step where that may hold more."""
    args = (model, layout, workload, rank)
    return Memory(
        parameters_bytes(model, layout, rank, workload.element_bytes),
        cache_shape(*args).elements * workload.element_bytes,
        activations_peak_bytes(*args),
        communication_buffer_bytes(*args),
        _decode_bytes(*args),
    )


def _decode_bytes(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> int:
    """What a decode step holds over the cache: with `scores` a copy of V without what was never written, K and V in
    fp32 or wider, and three times the scores of one query for all positions; other exchanges read the cache in place.
    """
    if layout.exchange != "scores":
        return 0
    at, e = layout.coordinates(rank), workload.element_bytes
    own, wide = head_shard(model, layout, at.head_group, at.slice), max(4, e)
    rows = max(mb.size for mb in decode_micro_batches(layout, workload, at.dp)) * workload.cache_positions
    kv, u = len(own.kv_heads), len(own.v_channels)
    return rows * (kv * u * e + kv * (own.qk_width + u) * wide + 3 * len(own.heads) * wide)
