"""The local weights of a rank, and of these the weights of one layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headgrid.layout.layout import Layout
from headgrid.layout.shards import Shard, parameters, stacks
from headgrid.runtime.collectives import Axis
from headgrid.runtime.quantised import Weight, as_kept, quantised_if
from headgrid.spec.model import ModelSpec

Weights = dict[str, Tensor]
Norm = tuple[Tensor, Tensor | None]
Linear = tuple[Weight, Tensor | None]


@dataclass(frozen=True, slots=True)
class Layer:
    """The local weights of one layer; `qkv` stacks the rows of W_Q, W_K, W_V, and `up` those of a gate, if any."""

    attention_norm: Norm
    qkv: Linear
    o: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    attention_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None


def allocate(
    model: ModelSpec, layout: Layout, rank: int, dtype: torch.dtype, device: torch.device
) -> tuple[Weights, dict[str, Tensor]]:
    """Empty local weights of `rank` as they are stored, and views of them under the names of `parameters`."""
    shards = parameters(model, layout, rank)
    weights: Weights = {}
    for stored, names in stacks(shards).items():
        _, *rest = shards[names[0]].local_shape
        height = sum(shards[name].local_shape[0] for name in names)
        weights[stored] = torch.empty(height, *rest, dtype=dtype, device=device)
    return weights, by_name(shards, weights)


def by_name(shards: dict[str, Shard], weights: Weights) -> dict[str, Tensor]:
    """Views of weights as they are stored, by the names of `shards`, which are those of `parameters`."""
    views: dict[str, Tensor] = {}
    for stored, names in stacks(shards).items():
        start = 0
        for name in names:  # not by split, whose parts may not be written in place where gradients are wanted
            stop = start + shards[name].local_shape[0]
            views[name], start = weights[stored][start:stop], stop
    return views


def load(model: ModelSpec, layout: Layout, rank: int, get: Callable[..., Tensor], tp: Axis | None = None) -> Weights:
    """Every tensor of `rank`, from `get(name, shard)`, which returns the shard, as it is stored.

    With FP8 linears `tp` are the ranks that share a layer, all of which call this; at most one matrix at a time is
    there in the dtype in which it is got.
    """
    shards, weights = parameters(model, layout, rank), Weights()
    for stored, names in stacks(shards).items():
        weights |= as_kept(layout, stored, _stacked([shards[name] for name in names], names, get), tp)
    return weights


def _stacked(shards: Sequence[Shard], names: Sequence[str], get: Callable[..., Tensor]) -> Tensor:
    """Tensors one below the other; at most one is held twice."""
    part, done = get(names[0], shards[0]), shards[0].local_shape[0]
    whole = part.new_empty(sum(shard.local_shape[0] for shard in shards), *part.shape[1:])
    whole[:done].copy_(part)
    for name, shard in zip(names[1:], shards[1:], strict=True):
        del part
        part = get(name, shard)
        whole[done : done + len(part)].copy_(part)
        done += len(part)
    return whole


def layer_weights(weights: Weights, index: int) -> Layer:
    """The weights of layer `index` (global), by their names."""

    def pair(name: str) -> tuple[Tensor, Tensor | None]:
        return weights[f"layers.{index}.{name}.weight"], weights.get(f"layers.{index}.{name}.bias")

    def if_any(name: str) -> Norm | None:
        return pair(name) if f"layers.{index}.{name}.weight" in weights else None

    def linear(name: str) -> Linear:
        stem = f"layers.{index}.{name}"
        return quantised_if(weights, f"{stem}.weight"), weights.get(f"{stem}.bias")

    q_norm, k_norm = (weights.get(f"layers.{index}.attention.{name}_norm.weight") for name in "qk")
    return Layer(
        pair("attention.norm"),
        linear("attention.qkv"),
        linear("attention.o"),
        pair("mlp.norm"),
        linear("mlp.gate_up" if f"layers.{index}.mlp.gate_up.weight" in weights else "mlp.up"),
        linear("mlp.down"),
        q_norm,
        k_norm,
        if_any("attention.post_norm"),
        if_any("mlp.post_norm"),
    )
