"""Predicted memory of one rank, in bytes."""

import math
from dataclasses import dataclass

from headgrid.layout.activations import activations_peak_bytes, communication_buffer_bytes
from headgrid.layout.batching import cached_positions, owned_rows
from headgrid.layout.layout import Layout
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

    @property
    def total_bytes(self) -> int:
        """Parameters, cache and activations; communication buffers are part of the activations' peak."""
        return self.parameters_bytes + self.kv_cache_bytes + self.activations_peak_bytes


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
    """Bytes of all weights that `rank` stores."""
    return sum(shard.num_elements for shard in parameters(model, layout, rank).values()) * element_bytes


def predict(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> Memory:
    """Memory of `rank` in a prefill, the phase with the most activations."""
    args = (model, layout, workload, rank)
    return Memory(
        parameters_bytes(model, layout, rank, workload.element_bytes),
        cache_shape(*args).elements * workload.element_bytes,
        activations_peak_bytes(*args),
        communication_buffer_bytes(*args),
    )
