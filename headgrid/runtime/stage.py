"""One rank's part of the transformer: its stage's layers, of each layer its shard.

Shapes: a micro-batch has b sequences and s positions, T = b s tokens; D hidden size; P' = n m ranks share a layer.
The residual x [b, s, D] is whole on every rank of a stage. Each half of a layer adds a sum over ranks to it:
    x += all_reduce( attention_ij(norm(x)) W_O[(heads i, channels j), :] )
    x += all_reduce( gelu(norm(x) W_up[:, units]) W_down[units, :] )
With output `concat` the heads' outputs are all-gathered instead, W_O is owned by columns, and these are all-gathered.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from headgrid.layout.batching import MicroBatch
from headgrid.layout.layout import Layout
from headgrid.layout.shards import head_shards, parameters, stage_layers
from headgrid.layout.span import Span, Spans, balanced, indices
from headgrid.runtime import attention
from headgrid.runtime.attention import Position
from headgrid.runtime.cache import KVCache
from headgrid.runtime.exchange import EXCHANGES, Slices
from headgrid.runtime.mesh import StageAxes
from headgrid.spec.model import ModelSpec

Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """The local weights of one layer; `qkv` stacks the rows of W_Q, W_K, W_V."""

    attention_norm: tuple[Tensor, Tensor]
    qkv: tuple[Tensor, Tensor | None]
    o: tuple[Tensor, Tensor | None]
    mlp_norm: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]


def load(model: ModelSpec, layout: Layout, rank: int, get: Callable[..., Tensor]) -> Weights:
    """Every tensor of `rank`: `get(name, shard)` returns the shard; Q, K and V of a layer share one `qkv` tensor."""
    shards = parameters(model, layout, rank)
    weights: Weights = {}
    for name, shard in shards.items():
        stem, part, kind = name.rpartition(".")[0].rpartition(".")[0], *name.split(".")[-2:]
        if part not in ("q", "k", "v"):
            weights[name] = get(name, shard)
        elif part == "q":
            trio = [f"{stem}.{p}.{kind}" for p in ("q", "k", "v")]
            weights[f"{stem}.qkv.{kind}"] = _stacked([shards[n].local_shape for n in trio], trio, shards, get)
    return weights


def _stacked(shapes: list[tuple[int, ...]], names: list[str], shards: dict, get: Callable[..., Tensor]) -> Tensor:
    """The named shards below each other, each filled in as it is drawn, so that at most one is held twice."""
    heights = [shape[0] for shape in shapes]
    first = get(names[0], shards[names[0]])
    whole = first.new_empty(sum(heights), *shapes[0][1:])
    for name, rows in zip(names, whole.split(heights), strict=True):
        rows.copy_(first if name == names[0] else get(name, shards[name]))
    return whole


@dataclass(frozen=True, slots=True)
class Rotation:
    """Tables cos and sin [max_positions, 1, pairs] for consecutive channels of a head, pairs (c, c + w/2) of w."""

    cos: Tensor
    sin: Tensor


def layer_weights(weights: Weights, index: int) -> Layer:
    """The weights of layer `index` (global), by their names."""

    def linear(name: str) -> tuple[Tensor, Tensor | None]:
        return weights[f"layers.{index}.{name}.weight"], weights.get(f"layers.{index}.{name}.bias")

    def norm(name: str) -> tuple[Tensor, Tensor]:
        return weights[f"layers.{index}.{name}.norm.weight"], weights[f"layers.{index}.{name}.norm.bias"]

    return Layer(
        norm("attention"),
        linear("attention.qkv"),
        linear("attention.o"),
        norm("mlp"),
        linear("mlp.up"),
        linear("mlp.down"),
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn channel pairs (c, c + w/2) in place. x [b, s, heads, w]; cos, sin [s, 1, w/2] of the local pairs.

    RoFormer (Su et al. 2021) in the rotate-half order of Hugging Face.
    """
    a, b = x.unflatten(-1, (2, -1)).unbind(-2)
    turned = a * cos - b * sin
    b.mul_(cos).add_(a * sin)
    a.copy_(turned)


class Stage:
    """The layers of one pipeline stage on one rank, with the weights, the KV cache and the mesh they use."""

    def __init__(
        self, model: ModelSpec, layout: Layout, mesh: StageAxes, weights: Weights, cache: KVCache, owned: Span
    ) -> None:
        """`weights` as from `load`; `cache` with the shape of `layout.memory.cache_shape` for the rows `owned`."""
        self.model, self.layout, self.mesh, self.weights, self.cache = model, layout, mesh, weights, cache
        self.first, self.last = mesh.at.pp == 0, mesh.at.pp == layout.pp - 1
        owners = head_shards(model, layout)
        own = owners[layout.tp_index(mesh.at)]
        group = owners[mesh.at.head_group * layout.num_dim_slices :][: layout.num_dim_slices]
        widths = tuple(o.qk_width for o in group), tuple(len(o.v_channels) for o in group)
        self.slices = Slices(len(own.heads), len(own.kv_heads), *widths, mesh.at.slice)
        self.out_widths = [len(o.heads) * len(o.v_channels) for o in owners]
        self.owned = owned
        self.vocab = balanced(model.vocab_size, layout.tp)
        units = [len(span) for span in balanced(model.mlp_hidden_size, layout.tp)]
        self.units = units[mesh.at.head_group * layout.num_dim_slices :][: layout.num_dim_slices]
        self.scale = 1 / math.sqrt(model.head_dim)
        some = next(iter(weights.values()))
        self.dtype, self.device = some.dtype, some.device
        self._no_bias = some.new_zeros(0)
        self.rotations = [self.rotation(own.qk_channels)] if model.positions == "rotary" else []

    @functools.cached_property
    def layers(self) -> list[Layer]:
        """The weights of each layer of this stage, as they are stored."""
        layers = stage_layers(self.model, self.layout)[self.mesh.at.pp]
        return [layer_weights(self.weights, index) for index in range(layers.start, layers.stop)]

    def rotation(self, channels: Spans) -> Rotation:
        """The rotary tables of a slice that holds these channels of every head: whole pairs, first halves first."""
        half = self.model.head_dim // 2
        mine = torch.tensor([c for c in indices(channels) if c < half])
        turns = self.model.rope_theta ** (-mine.double() / half)
        angles = torch.arange(self.model.max_positions).double()[:, None, None] * turns
        return Rotation(*(f(angles).to(self.device, self.dtype) for f in (torch.cos, torch.sin)))

    def forward(self, x: Tensor, micro_batch: MicroBatch, position: Position | None) -> Tensor:
        """One micro-batch through this stage.

        `x`: token ids [b, s] on the first stage, else hidden states [b, s, D], which are overwritten. `position` is
        None in prefill (positions 0..s-1) and the one query's position in decode. Returns hidden states [b, s, D],
        or on the last stage the logits of the last position [b, vocab_size].
        """
        if self.first:
            x = self._embed(x, position)
        for index, layer in enumerate(self.layers):
            self.apply(layer, index, x, micro_batch, position)
        return self._logits(x) if self.last else x

    def apply(self, layer: Layer, index: int, x: Tensor, micro_batch: MicroBatch, position: Position | None) -> None:
        """Both halves of the stage's layer number `index`, added to the residual x [b, s, D] in place."""
        x += self._attention(layer, index, x, micro_batch, position)
        x += self._mlp(layer, x)

    def _embed(self, tokens: Tensor, position: Position | None) -> Tensor:
        """Rows of the vocabulary that this rank owns, zero elsewhere, summed over the ranks: [b, s, D]."""
        return self.embed(tokens, self.weights["embedding.weight"], self.vocab[self.mesh.tp.index], position)

    def embed(self, tokens: Tensor, table: Tensor, own: Span, position: Position | None) -> Tensor:
        """Token ids [b, s] to [b, s, D], summed over the tp axis; `table` [len(own), D] holds the ids `own`."""
        local = tokens - own.start
        outside = (local < 0) | (local >= len(own))
        x = F.embedding(local.masked_fill_(outside, 0), table)
        if self.mesh.tp.size > 1:
            x.masked_fill_(outside[..., None], 0)
        x = self.mesh.tp.all_reduce(x)
        if self.model.positions == "learned":
            x += self._at(self.weights["positions.weight"], tokens.shape[1], position)
        return x

    @staticmethod
    def _at(table: Tensor, length: int, position: Position | None) -> Tensor:
        """Rows of a table by position: 0..length-1, or the one of decode."""
        return table[:length] if position is None else table.index_select(0, position.device)

    def _norm(self, x: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        return F.layer_norm(x, (self.model.hidden_size,), *norm, self.model.norm_eps)

    def _attention(
        self, layer: Layer, index: int, x: Tensor, micro_batch: MicroBatch, position: Position | None
    ) -> Tensor:
        """The attention half of a layer before it is added: x [b, s, D] -> [b, s, D]."""
        projections = F.linear(self._norm(x, layer.attention_norm), *layer.qkv)
        self._rotate(projections, position)
        parts = micro_batch.parts
        rows = parts[self.slices.index if len(parts) > 1 else 0].within(self.owned)
        exchange = EXCHANGES[self.layout.exchange]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._attend(index, rows, q, k, v, position)

        out = exchange(self.slices, self.mesh.tp_slice, [len(p) for p in parts], projections, attend)
        del projections
        return self._output(out, layer.o)

    def _rotate(self, projections: Tensor, position: Position | None) -> None:
        """Give Q and K of this slice their rotary positions, in place; nothing for learned positions."""
        widths = [2 * rotation.cos.shape[-1] for rotation in self.rotations]
        for part in self.slices.split(projections, self.slices.index)[:2] if self.rotations else ():
            for rotation, channels in zip(self.rotations, part.split(widths, dim=-1), strict=True):
                length = projections.shape[1]
                rotate(channels, self._at(rotation.cos, length, position), self._at(rotation.sin, length, position))

    def _attend(self, index: int, rows: Span, q: Tensor, k: Tensor, v: Tensor, position: Position | None) -> Tensor:
        """Store K and V of these cache rows, then attend: in prefill to what was just computed, else to the cache."""
        if not len(rows):
            return attention.empty_result(q, v)
        caches = (self.cache.keys[index, rows.start : rows.stop], self.cache.values[index, rows.start : rows.stop])
        attention.store(k, v, *caches, position)
        if position is None:
            return attention.prefill(q, k, v, self.scale)
        return attention.decode(q, *caches, position, self.scale)

    def _output(self, out: Tensor, o: tuple[Tensor, Tensor | None]) -> Tensor:
        """W_O: out [b, s, H u] of this rank -> [b, s, D], complete on every rank."""
        tp, (weight, bias) = self.mesh.tp, o
        if self.layout.output == "reduce":
            return self._row_parallel(out, weight, bias)
        tokens = out.shape[:2]
        columns = [len(span) for span in balanced(self.model.hidden_size, tp.size)]
        mine = F.linear(self._concat(out, self.out_widths), weight, bias)
        return self._concat(mine, columns).unflatten(0, tokens)

    def _concat(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """All-gather the last dim over the tp axis: x [..., widths[index]] -> [T, sum(widths)]."""
        tokens = math.prod(x.shape[:-1])
        sizes = [tokens * width for width in widths]
        parts = self.mesh.tp.all_gather(x.reshape(-1), sizes).split(sizes)
        return torch.cat([part.view(tokens, -1) for part in parts], dim=-1)

    def _row_parallel(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [b, s, local] times weight [D, local], summed over the tp axis; the bias is added once."""
        y = self.mesh.tp.all_reduce(F.linear(x, weight))
        return y if bias is None else y.add_(bias)

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        """The MLP half of a layer before it is added: x [b, s, D] -> [b, s, D]."""
        return self._row_parallel(self._gelu_linear(self._norm(x, layer.mlp_norm), *layer.up), *layer.down)

    def _gelu_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """gelu(x weight^T + bias): x [b, s, D] -> [b, s, units].

        cuBLASLt computes the tanh form inside the matrix product, before it rounds (8 % faster on an H200 than a
        kernel of its own, and nearer to the exact value).
        """
        if x.is_cuda and self.model.activation == "gelu_tanh":
            if bias is None:
                bias = self._no_bias = self._no_bias if len(self._no_bias) == len(weight) else x.new_zeros(len(weight))
            return torch.ops.aten._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True).unflatten(
                0, x.shape[:2]
            )
        approximate = "tanh" if self.model.activation == "gelu_tanh" else "none"
        return torch.ops.aten.gelu_(F.linear(x, weight, bias), approximate=approximate)

    def _logits(self, x: Tensor) -> Tensor:
        """x [b, s, D] -> logits of the last position [b, vocab_size], whole on every rank of the stage."""
        return self.head(self.final_norm(x))

    def final_norm(self, x: Tensor) -> Tensor:
        """The last position, normalised: [b, s, D] -> [b, D]."""
        return self._norm(x[:, -1], (self.weights["final.norm.weight"], self.weights["final.norm.bias"]))

    def head(self, last: Tensor) -> Tensor:
        """Normalised hidden states [b, D] -> logits [b, vocab_size], whole on every rank of the stage."""
        tied = self.model.tied_embeddings
        local = F.linear(last, self.weights["embedding.weight" if tied else "head.weight"])
        return self._concat(local, [len(span) for span in self.vocab])
