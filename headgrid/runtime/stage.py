"""One rank's part of the transformer: its stage's layers, of each layer its shard.

Shapes: a call has b sequences and s positions of each, T = b s tokens; D hidden size; P' = n m ranks share a layer, and
rank r holds the hidden states x [T_r, D] of T_r tokens: all T, or with a sharded residual its share of them.
Each half of a layer adds a sum over ranks to them:
    x += leave( attention_ij(enter(norm(x))) W_O[(heads i, channels j), :] )
    x += leave( gelu(enter(norm(x)) W_up[:, units]) W_down[units, :] )
where enter and leave are nothing and an all-reduce, or an all-gather and a reduce-scatter (`residual`).
With output `concat` the heads' outputs are all-gathered instead, W_O is owned by columns, and these are all-gathered.
With attention `dp-attention` a rank's tokens are those of its own sequences, which its attention half works on alone.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from headgrid.layout.batching import Call, MicroBatch
from headgrid.layout.layout import Layout
from headgrid.layout.shards import head_shards, stage_layers
from headgrid.layout.span import Span, Spans, balanced
from headgrid.runtime.attention import Queries, Rule
from headgrid.runtime.cache import KVCache
from headgrid.runtime.collectives import Axis
from headgrid.runtime.exchange import EXCHANGES, Core, Slices
from headgrid.runtime.hidden import Hidden, added
from headgrid.runtime.kernels import fused
from headgrid.runtime.layer import Layer, Linear, Norm, Weights, layer_weights
from headgrid.runtime.mesh import StageAxes
from headgrid.runtime.mlp import Units
from headgrid.runtime.quantised import Input, Rounded, Weight, linear
from headgrid.runtime.residual import Replicated, Residual, Sharded
from headgrid.runtime.rotary import Rotation, rotate, rotated, rotation
from headgrid.spec.model import ModelSpec
from headgrid.spec.rope import Rope
from headgrid.spec.workload import Workload


@dataclass(frozen=True, slots=True)
class StageCall:
    """What goes through a stage at once: sequences, their queries, and which of these want logits.

    `ending` are places of tokens, sequence by sequence, in ascending order. `alone`: no other rank works on them.
    """

    micro_batch: MicroBatch
    queries: Queries
    ending: Sequence[int]
    alone: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the call, T."""
        return self.micro_batch.size * self.queries.count

    def of(self, owner: int) -> "StageCall":
        """The sequences of one owner of cache rows, alone."""
        parts = self.micro_batch.parts
        start = sum(len(part) for part in parts[:owner])
        queries = self.queries.rows(Span(start, start + len(parts[owner])))
        return StageCall(MicroBatch((parts[owner],)), queries, (), alone=True)


def prefill_call(model: ModelSpec, workload: Workload, call: Call, device: torch.device) -> StageCall:
    """A call of prefill: its queries, and the places of its tokens that get logits."""
    rows, positions, lengths = call.micro_batch.rows(), call.positions, workload.lengths
    starts = torch.full((len(rows),), positions.start, device=device)
    own = None if model.is_causal else tuple(lengths[row] for row in rows)
    queries = Queries(len(positions), (positions.start,) * len(rows), starts, lengths=own)
    return StageCall(call.micro_batch, queries, call.wanted(workload))


LayerWatch = Callable[[int, StageCall, Tensor], None]
"""Told the number of a layer of the stage, the call, and the hidden states [T_r, D] that this rank has after it."""


class Stage:
    """The layers of one pipeline stage on one rank, with the weights, the KV cache and the mesh they use."""

    def __init__(
        self,
        model: ModelSpec,
        layout: Layout,
        mesh: StageAxes,
        weights: Weights,
        cache: KVCache | None,
        owned: Span,
        positions: int | None = None,
    ) -> None:
        """`weights` as from `layer.load`; `cache` as `layout.memory.cache_shape` says for the rows `owned`, or None
        where nothing is decoded. There are calls for at most `positions` positions, the model's by default.
        """
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
        some = next(iter(weights.values()))
        self.dtype, self.device = some.dtype, some.device
        fp32 = layout.residual_dtype == "fp32"
        self.residual_dtype = torch.promote_types(self.dtype, torch.float32) if fp32 else self.dtype
        self.residual: Residual = Sharded(mesh.tp) if layout.residual == "sharded" else Replicated(mesh.tp)
        rank = mesh.tp.ranks[mesh.tp.index]
        self._alone = Replicated(Axis("none", (rank,), rank, None))
        self.activated = Units(model)
        self.positions = model.max_positions if positions is None else positions
        self.embedding_scale = torch.tensor(model.embedding_scale, dtype=self.dtype).item()
        self.rotations = self.tables([own.qk_channels])
        self.watch: LayerWatch | None = None
        plain = model.norm_placement == "pre" and self.residual_dtype == self.dtype
        self._adds_products = plain and self.device.type == "cuda"

    @functools.cached_property
    def layers(self) -> list[Layer]:
        """The weights of each layer of this stage, as they are stored."""
        layers = stage_layers(self.model, self.layout)[self.mesh.at.pp]
        return [layer_weights(self.weights, index) for index in range(layers.start, layers.stop)]

    @functools.cached_property
    def rules(self) -> list[Rule]:
        """What attention is in each layer of this stage."""
        model, layers = self.model, stage_layers(self.model, self.layout)[self.mesh.at.pp]
        return [
            Rule(model.scale, model.is_causal, model.window(index), model.attn_logit_softcapping)
            for index in range(layers.start, layers.stop)
        ]

    @functools.cached_property
    def ropes(self) -> list[Rope]:
        """The rotary positions of each layer of this stage; empty where positions are learned."""
        layers = stage_layers(self.model, self.layout)[self.mesh.at.pp]
        rotary = self.model.positions == "rotary"
        return [self.model.rope(index) for index in range(layers.start, layers.stop)] if rotary else []

    def tables(self, channels: Sequence[Spans]) -> dict[Rope, list[Rotation]]:
        """For each kind of layer, the rotary tables of slices that hold these channels, one after the other."""
        return {rope: [self.rotation(rope, each) for each in channels] for rope in dict.fromkeys(self.ropes)}

    def rotation(self, rope: Rope, channels: Spans) -> Rotation:
        """The rotary tables of a slice that holds these channels of every head."""
        return rotation(rope, channels, self.positions, self.dtype, self.device)

    def residual_of(self, queries: int) -> Residual:
        """How hidden states are held in a call with so many queries of each sequence."""
        return self.residual if self.layout.attention == "cut" else Sharded(self.mesh.tp, queries)

    def _residual(self, call: StageCall) -> Residual:
        return self._alone if call.alone else self.residual_of(call.queries.count)

    def forward(self, x: Tensor, call: StageCall) -> Tensor:
        """One call through this stage.

        `x`: token ids [b, s] on the first stage, else hidden states [T_r, D], which are overwritten. Returns hidden
        states [T_r, D], or on the last stage the logits of the ending tokens [len(ending), vocab_size] (without a head
        their hidden states [len(ending), D]).
        """
        if self.first:
            x = self.embed(x, self.weights["embedding.weight"], self.vocab[self.mesh.tp.index], call.queries)
        hidden = Hidden(x)
        del x
        for index, layer in enumerate(self.layers):
            self.apply(layer, index, hidden, call)
        x = self.settled(hidden)
        return self.head(self.final_norm(x, call)) if self.last else x

    def apply(self, layer: Layer, index: int, hidden: Hidden, call: StageCall) -> None:
        """Both halves of the stage's layer number `index`."""
        self._add(hidden, self.attention_half(layer, index, hidden, call), layer.attention_norm)
        self._add(hidden, self._behind(self._mlp(layer, hidden, call), layer.mlp_post_norm), layer.mlp_norm)
        if self.watch is not None:
            self.watch(index, call, self.settled(hidden))

    def settled(self, hidden: Hidden) -> Tensor:
        """The hidden states [T_r, D] with all that was to be added: in place, unless gradients need it."""
        if hidden.more is not None:
            hidden.x, hidden.more = added(hidden.x, hidden.more), None
        return hidden.x

    def attention_half(self, layer: Layer, index: int, hidden: Hidden, call: StageCall) -> Tensor | None:
        """What the attention half of a layer has still to add to the hidden states: [T_r, D], or nothing."""
        return self._behind(self._attention(layer, index, hidden, call), layer.attention_post_norm)

    def _behind(self, y: Tensor | None, post_norm: Norm | None) -> Tensor | None:
        return y if post_norm is None or y is None else self._norm(y, post_norm)

    def _add(self, hidden: Hidden, y: Tensor | None, norm: Norm) -> None:
        """Leave y [T_r, D] to be added; where norms follow the sums, add it and norm."""
        hidden.more = y
        del y
        if self.model.norm_placement == "post":
            total = self._norm(self.settled(hidden), norm)
            hidden.x = total if torch.is_grad_enabled() else hidden.x.copy_(total)

    def _before(self, hidden: Hidden, norm: Norm, call: StageCall) -> Input:
        """What a half of a layer gets: all tokens [T, D] in the model's dtype, normed unless norms follow the sums; for
        FP8 linears already rounded where a GPU can do that on the way.
        """
        residual = self._residual(call)
        if self.model.norm_placement == "post":
            return residual.enter(hidden.x.to(self.dtype), call.tokens)
        if fused.fits(hidden.x):
            more, hidden.more = hidden.more, None
            if self.layout.linears == "fp8" and isinstance(residual, Replicated):
                return Rounded(*fused.add_norm_fp8(hidden.x, more, norm, self.model), self.dtype)
            normed = fused.add_norm(hidden.x, more, norm, self.model, self.dtype)
            del more
        else:
            normed = self._norm(self.settled(hidden), norm).to(self.dtype)
        return residual.enter(normed, call.tokens)

    def embed(self, tokens: Tensor, table: Tensor, own: Span, queries: Queries) -> Tensor:
        """Token ids [b, s] to this rank's [T_r, D]; `table` [len(own), D] holds the ids `own`, others give zeros, and
        the ranks' results are summed.
        """
        local = tokens - own.start
        outside = (local < 0) | (local >= len(own))
        x = F.embedding(local.masked_fill_(outside, 0).flatten(), table)
        if self.mesh.tp.size > 1:
            x.masked_fill_(outside.view(-1, 1), 0)
        residual = self.residual_of(queries.count)
        x = residual.leave(x).to(self.residual_dtype)
        if self.model.embedding_scale != 1:
            x = x * self.embedding_scale if torch.is_grad_enabled() else x.mul_(self.embedding_scale)
        if self.model.positions == "learned":
            mine = residual.own(tokens.numel())
            rows = queries.of(self.weights["positions.weight"]).expand(*tokens.shape, -1)
            x = added(x, rows.flatten(0, 1)[mine.start : mine.stop])
        if self.model.token_types:
            x = added(x, self.weights["token_types.weight"][0])
        if self.model.embedding_norm:
            x = self._norm(x, (self.weights["embedding.norm.weight"], self.weights.get("embedding.norm.bias")))
        return x

    def _norm(self, x: Tensor, norm: Norm) -> Tensor:
        """Over the last dim of x [T, D], in its dtype."""
        if fused.fits(x):
            return fused.add_norm(x, None, norm, self.model, x.dtype)
        weight, bias = norm
        shape, eps = (self.model.hidden_size,), self.model.norm_eps
        if self.model.norm == "layer":
            return F.layer_norm(x, shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)
        if not self.model.norm_unit_offset:
            return F.rms_norm(x, shape, weight.to(x.dtype), eps)
        wide = torch.promote_types(x.dtype, torch.float32)  # 1 + weight loses bits in 16
        return F.rms_norm(x.to(wide), shape, 1 + weight.to(wide), eps).to(x.dtype)

    def _attention(self, layer: Layer, index: int, hidden: Hidden, call: StageCall) -> Tensor | None:
        """The attention half of a layer before it is added: [T_r, D], or None where its product has added it."""
        if self.layout.attention == "dp-attention":
            call = call.of(self.mesh.tp.index)
        return self._output(self._attended(layer, index, hidden, call), layer.o, hidden, call)

    def _attended(self, layer: Layer, index: int, hidden: Hidden, call: StageCall) -> Tensor:
        """Attention before W_O, exact by the layout's exchange: [T, H u]."""
        entered = self._before(hidden, layer.attention_norm, call)
        projections = linear(entered, *layer.qkv).unflatten(0, (call.micro_batch.size, call.queries.count))
        del entered
        projections = self._positioned(projections, layer, index, call)
        exchange = EXCHANGES[self.layout.exchange]
        rows = [len(part) for part in call.micro_batch.parts]
        out = exchange(self.slices, self.mesh.tp_slice, rows, projections, self._core(index, call))
        return out.flatten(0, 1)

    def _positioned(self, projections: Tensor, layer: Layer, index: int, call: StageCall) -> Tensor:
        """Projections [b, s, ...] of this slice with what is done to heads before they are exchanged."""
        projections = self._head_norms(projections, layer)
        if self.ropes:
            projections = self._rotate(projections, self.rotations[self.ropes[index]], call.queries)
        return projections

    def _core(self, index: int, call: StageCall) -> Core:
        """Attention of layer `index` for the sequences of the call that this rank attends to, with their cache rows."""
        mine, cache = call.of(self.slices.index if len(call.micro_batch.parts) > 1 else 0), None
        if self.cache is not None:
            rows = mine.micro_batch.parts[0].within(self.owned)
            k, v = (part[index, rows.start : rows.stop] for part in (self.cache.keys, self.cache.values))
            cache = k, v
        return Core(self.rules[index], mine.queries, cache)

    def _head_norms(self, projections: Tensor, layer: Layer) -> Tensor:
        """RMS norms of whole Q and K heads (`qk_norm`): squares are summed over the slices, in fp32 or wider."""
        if layer.q_norm is None or layer.k_norm is None:
            return projections
        q, k, v = self.slices.split(projections, self.slices.index)
        wide = torch.promote_types(self.dtype, torch.float32)
        squares = torch.cat([x.to(wide).square().sum(-1) for x in (q, k)], dim=-1)
        means = self.mesh.tp_slice.all_reduce(squares, alike=False) / self.model.head_dim
        sizes = torch.rsqrt(means + self.model.norm_eps)[..., None].split([self.slices.heads, self.slices.kv_heads], 2)
        triples = zip((q, k), sizes, (layer.q_norm, layer.k_norm), strict=True)
        q, k = (self._scaled(x.to(wide) * size, weight) for x, size, weight in triples)
        return torch.cat([x.flatten(2) for x in (q, k, v)], dim=-1)

    def _scaled(self, normed: Tensor, weight: Tensor) -> Tensor:
        """Normed heads [b, s, heads, w], in fp32 or wider, times weight [w] or 1 + weight, in the model's dtype."""
        if self.model.norm_unit_offset:
            factor = 1 + weight.to(normed.dtype)
            return (normed * factor if torch.is_grad_enabled() else normed.mul_(factor)).to(self.dtype)
        return normed.to(self.dtype) * weight

    def _rotate(self, projections: Tensor, rotations: Sequence[Rotation], queries: Queries) -> Tensor:
        """Q and K of this slice with their rotary positions: in place, but where gradients need it."""
        if fused.usable(projections):
            heads = self.slices.heads + self.slices.kv_heads
            qk = projections[..., : heads * self.slices.qk_widths[self.slices.index]].unflatten(-1, (heads, -1))
            for turn, channels in zip(rotations, qk.split([r.width for r in rotations], dim=-1), strict=True):
                fused.rotate(channels, turn.cos, turn.sin, queries.at)
            return projections
        q, k, v = self.slices.split(projections, self.slices.index)
        if torch.is_grad_enabled():
            q, k = (torch.cat([rotated(*turn) for turn in _turns(x, rotations, queries)], dim=-1) for x in (q, k))
            return torch.cat([x.flatten(2) for x in (q, k, v)], dim=-1)
        for x in (q, k):
            for turn in _turns(x, rotations, queries):
                rotate(*turn)
        return projections

    def _output(self, out: Tensor, o: Linear, hidden: Hidden, call: StageCall) -> Tensor | None:
        """W_O: out [T, H u] of this rank -> the sum over ranks, of the tokens that this rank holds."""
        weight, bias = o
        if self.layout.output == "reduce":
            return self._row_parallel(out, weight, bias, hidden, self._residual(call))
        columns = [len(span) for span in balanced(self.model.hidden_size, self.mesh.tp.size)]
        mine = linear(self._concat(out, self.out_widths), weight, bias)
        return self._concat(mine, columns, alike=True)

    def _concat(self, x: Tensor, widths: Sequence[int], *, alike: bool = False) -> Tensor:
        """All-gather the last dim over the tp axis: x [T, widths[index]] -> [T, sum(widths)]."""
        sizes = [len(x) * width for width in widths]
        parts = self.mesh.tp.all_gather(x.reshape(-1), sizes, alike=alike).split(sizes)
        return torch.cat([part.view(len(x), -1) for part in parts], dim=-1)

    def _row_parallel(
        self, x: Input, weight: Weight, bias: Tensor | None, hidden: Hidden, residual: Residual
    ) -> Tensor | None:
        """x [T, local] times weight [D, local], summed over the tp axis; the bias is added once. Where nothing is to be
        summed, a GPU adds the product to the hidden states as it rounds it, which saves them a pass through memory.
        """
        alone = residual.tp.size == 1 and self._adds_products and bias is None and not torch.is_grad_enabled()
        if alone and isinstance(x, Tensor) and isinstance(weight, Tensor):
            hidden.x.addmm_(x, weight.t())
            return None
        y = residual.leave(linear(x, weight))
        return y if bias is None else y.add_(bias)

    def _mlp(self, layer: Layer, hidden: Hidden, call: StageCall) -> Tensor | None:
        """The MLP half of a layer before it is added: [T_r, D]."""
        units = self.activated(self._before(hidden, layer.mlp_norm, call), *layer.up)
        return self._row_parallel(units, *layer.down, hidden, self._residual(call))

    def final_norm(self, x: Tensor, call: StageCall) -> Tensor:
        """The ending tokens, normed where the model ends with a norm: x [T_r, D] -> [len(ending), D] on every rank."""
        last = self._residual(call).pick(x, call.tokens, call.ending)
        if not self.model.has_final_norm:
            return last.to(self.dtype)
        return self._norm(last, (self.weights["final.norm.weight"], self.weights.get("final.norm.bias"))).to(self.dtype)

    def head(self, last: Tensor) -> Tensor:
        """Final hidden states [n, D] -> logits [n, vocab_size], whole on every rank of the stage; without a head the
        states themselves.
        """
        if self.model.head == "none":
            return last
        if not len(last):
            return last.new_empty(0, self.model.vocab_size)
        tied, cap = self.model.tied_embeddings, self.model.final_logit_softcapping
        local = F.linear(self.mesh.tp.fan_out(last), self.weights["embedding.weight" if tied else "head.weight"])
        if cap:
            local = cap * torch.tanh(local / cap) if torch.is_grad_enabled() else local.div_(cap).tanh_().mul_(cap)
        return self._concat(local, [len(span) for span in self.vocab], alike=True)


def _turns(x: Tensor, rotations: Sequence[Rotation], queries: Queries) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The channels of each rotation in x [b, s, heads, w], with their cos and sin."""
    for turn, channels in zip(rotations, x.split([r.width for r in rotations], dim=-1), strict=True):
        yield channels, queries.of(turn.cos), queries.of(turn.sin)
