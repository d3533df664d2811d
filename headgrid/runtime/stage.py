"""One rank's part of the transformer: its stage's layers, of each layer its shard.

Shapes: a call has b sequences and s positions of each, T = b s tokens; D hidden size; P' = n m ranks share a layer, and
rank r holds the hidden states x [T_r, D] of T_r tokens: all T, or with a sharded residual its share of them.
Each half of a layer adds a sum over ranks to them:
    x += leave( attention_ij(enter(norm(x))) W_O[(heads i, channels j), :] )
    x += leave( gelu(enter(norm(x)) W_up[:, units]) W_down[units, :] )
where enter and leave are nothing and an all-reduce, or an all-gather and a reduce-scatter (`residual`).
With output `concat` the heads' outputs are all-gathered instead, W_O is owned by columns, and these are all-gathered.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from headgrid.layout.batching import Call, MicroBatch
from headgrid.layout.layout import Layout
from headgrid.layout.shards import head_shards, parameters, stage_layers
from headgrid.layout.span import Span, Spans, balanced, indices
from headgrid.runtime.attention import Queries, Rule
from headgrid.runtime.cache import KVCache
from headgrid.runtime.exchange import EXCHANGES, Core, Slices
from headgrid.runtime.mesh import StageAxes
from headgrid.runtime.residual import Replicated, Residual, Sharded
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

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
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StageCall:
    """What goes through a stage at once: sequences, their queries, and which of these want logits.

    `ending` are places of tokens, sequence by sequence, in ascending order.
    """

    micro_batch: MicroBatch
    queries: Queries
    ending: Sequence[int]

    @property
    def tokens(self) -> int:
        """Tokens of the call, T."""
        return self.micro_batch.size * self.queries.count


def prefill_call(
    model: ModelSpec, workload: Workload, call: Call, device: torch.device, *, every_token: bool = False
) -> StageCall:
    """A call of prefill: its queries, and the places of its sequences' last tokens, or with `every_token` of all."""
    rows, positions, lengths = call.micro_batch.rows(), call.positions, workload.lengths
    starts = torch.full((len(rows),), positions.start, device=device)
    own = None if model.is_causal else tuple(lengths[row] for row in rows)
    queries = Queries(len(positions), (positions.start,) * len(rows), starts, lengths=own)
    places = [k * len(positions) + lengths[rows[k]] - 1 - positions.start for k in call.ending(workload)]
    return StageCall(call.micro_batch, queries, range(len(rows) * len(positions)) if every_token else places)


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
    """Tables cos and sin [max_positions, 1, pairs] for consecutive channels of a head, pairs (c, c + pairs) of `width`;
    channels behind the pairs do not turn.
    """

    cos: Tensor
    sin: Tensor
    width: int


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
        *(weights.get(f"layers.{index}.attention.{name}_norm.weight") for name in "qk"),
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn channel pairs (c, c + p) in place. x [b, s, heads, w]; cos, sin [s, 1, p] or [b, s, 1, p], 2 p at most w.

    RoFormer (Su et al. 2021) in the rotate-half order of Hugging Face.
    """
    p = cos.shape[-1]
    a, b = x[..., :p], x[..., p : 2 * p]
    turned = a * cos - b * sin
    b.mul_(cos).add_(a * sin)
    a.copy_(turned)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` as a new tensor, for gradients."""
    p = cos.shape[-1]
    a, b = x[..., :p], x[..., p : 2 * p]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * p :]], dim=-1)


class Stage:
    """The layers of one pipeline stage on one rank, with the weights, the KV cache and the mesh they use."""

    def __init__(
        self, model: ModelSpec, layout: Layout, mesh: StageAxes, weights: Weights, cache: KVCache | None, owned: Span
    ) -> None:
        """`weights` as from `load`; `cache` with the shape of `layout.memory.cache_shape` for the rows `owned`, or None
        where nothing is decoded.
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
        self._no_bias = some.new_zeros(0)
        self.rotations = [self.rotation(own.qk_channels)] if model.positions == "rotary" else []

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

    def rotation(self, channels: Spans) -> Rotation:
        """The rotary tables of a slice that holds these channels of every head: whole pairs, first halves first."""
        half = self.model.rotated_dim // 2
        mine = torch.tensor([c for c in indices(channels) if c < half])
        turns = self.model.rope_theta ** (-mine.double() / half)
        angles = torch.arange(self.model.max_positions).double()[:, None, None] * turns
        cos, sin = (f(angles).to(self.device, self.dtype) for f in (torch.cos, torch.sin))
        return Rotation(cos, sin, len(indices(channels)))

    def forward(self, x: Tensor, call: StageCall) -> Tensor:
        """One call through this stage.

        `x`: token ids [b, s] on the first stage, else hidden states [T_r, D], which are overwritten. Returns hidden
        states [T_r, D], or on the last stage the logits of the ending tokens [len(ending), vocab_size].
        """
        if self.first:
            x = self.embed(x, self.weights["embedding.weight"], self.vocab[self.mesh.tp.index], call.queries)
        for index, layer in enumerate(self.layers):
            x = self.apply(layer, index, x, call)
        return self.head(self.final_norm(x, call)) if self.last else x

    def apply(self, layer: Layer, index: int, x: Tensor, call: StageCall) -> Tensor:
        """Both halves of the stage's layer number `index`, added to x [T_r, D]: in place, unless gradients need it."""
        x = _added(x, self._attention(layer, index, x, call))
        return _added(x, self._mlp(layer, x, call))

    def embed(self, tokens: Tensor, table: Tensor, own: Span, queries: Queries) -> Tensor:
        """Token ids [b, s] to this rank's [T_r, D]; `table` [len(own), D] holds the ids `own`, others give zeros, and
        the ranks' results are summed.
        """
        local = tokens - own.start
        outside = (local < 0) | (local >= len(own))
        x = F.embedding(local.masked_fill_(outside, 0).flatten(), table)
        if self.mesh.tp.size > 1:
            x.masked_fill_(outside.view(-1, 1), 0)
        x = self.residual.leave(x).to(self.residual_dtype)
        if self.model.positions == "learned":
            mine = self.residual.own(tokens.numel())
            rows = queries.of(self.weights["positions.weight"]).expand(*tokens.shape, -1)
            x = _added(x, rows.flatten(0, 1)[mine.start : mine.stop])
        return x

    def _norm(self, x: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        weight, bias = (each.to(x.dtype) for each in norm)
        return F.layer_norm(x, (self.model.hidden_size,), weight, bias, self.model.norm_eps).to(self.dtype)

    def _attention(self, layer: Layer, index: int, x: Tensor, call: StageCall) -> Tensor:
        """The attention half of a layer before it is added: x [T_r, D] -> [T_r, D]."""
        normed = self.residual.enter(self._norm(x, layer.attention_norm), call.tokens)
        projections = F.linear(normed, *layer.qkv).view(call.micro_batch.size, call.queries.count, -1)
        del normed
        projections = self._rotate(self._head_norms(projections, layer), call.queries)
        exchange = EXCHANGES[self.layout.exchange]
        rows = [len(part) for part in call.micro_batch.parts]
        out = exchange(self.slices, self.mesh.tp_slice, rows, projections, self._core(index, call))
        del projections
        return self._output(out.flatten(0, 1), layer.o)

    def _core(self, index: int, call: StageCall) -> Core:
        """Attention of layer `index` for the sequences of the call that this rank attends to, with their cache rows."""
        parts, j = call.micro_batch.parts, self.slices.index if len(call.micro_batch.parts) > 1 else 0
        start = sum(len(part) for part in parts[:j])
        queries, cache = call.queries.rows(Span(start, start + len(parts[j]))), None
        if self.cache is not None:
            rows = parts[j].within(self.owned)
            k, v = (part[index, rows.start : rows.stop] for part in (self.cache.keys, self.cache.values))
            cache = k, v
        return Core(self.rules[index], queries, cache)

    def _head_norms(self, projections: Tensor, layer: Layer) -> Tensor:
        """RMS norms of whole Q and K heads (`qk_norm`): squares are summed over the slices, in fp32 or wider."""
        if layer.q_norm is None or layer.k_norm is None:
            return projections
        q, k, v = self.slices.split(projections, self.slices.index)
        wide = torch.promote_types(self.dtype, torch.float32)
        squares = torch.cat([x.to(wide).square().sum(-1) for x in (q, k)], dim=-1)
        means = self.mesh.tp_slice.all_reduce(squares, alike=False) / self.model.head_dim
        sizes = torch.rsqrt(means + self.model.norm_eps)[..., None].split([self.slices.heads, self.slices.kv_heads], 2)
        q, k = (
            (x.to(wide) * size).to(self.dtype) * weight
            for x, size, weight in zip((q, k), sizes, (layer.q_norm, layer.k_norm), strict=True)
        )
        return torch.cat([x.flatten(2) for x in (q, k, v)], dim=-1)

    def _rotate(self, projections: Tensor, queries: Queries) -> Tensor:
        """Q and K of this slice with their rotary positions: in place, but where gradients need it."""
        if not self.rotations:
            return projections
        q, k, v = self.slices.split(projections, self.slices.index)
        if torch.is_grad_enabled():
            q, k = (torch.cat([rotated(*turn) for turn in self._turns(x, queries)], dim=-1) for x in (q, k))
            return torch.cat([x.flatten(2) for x in (q, k, v)], dim=-1)
        for x in (q, k):
            for turn in self._turns(x, queries):
                rotate(*turn)
        return projections

    def _turns(self, x: Tensor, queries: Queries) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The channels of each rotation in x [b, s, heads, w], with their cos and sin."""
        widths = [rotation.width for rotation in self.rotations]
        for rotation, channels in zip(self.rotations, x.split(widths, dim=-1), strict=True):
            yield channels, queries.of(rotation.cos), queries.of(rotation.sin)

    def _output(self, out: Tensor, o: tuple[Tensor, Tensor | None]) -> Tensor:
        """W_O: out [T, H u] of this rank -> the sum over ranks, of the tokens that this rank holds."""
        weight, bias = o
        if self.layout.output == "reduce":
            return self._row_parallel(out, weight, bias)
        columns = [len(span) for span in balanced(self.model.hidden_size, self.mesh.tp.size)]
        mine = F.linear(self._concat(out, self.out_widths), weight, bias)
        return self._concat(mine, columns, alike=True)

    def _concat(self, x: Tensor, widths: Sequence[int], *, alike: bool = False) -> Tensor:
        """All-gather the last dim over the tp axis: x [T, widths[index]] -> [T, sum(widths)]."""
        sizes = [len(x) * width for width in widths]
        parts = self.mesh.tp.all_gather(x.reshape(-1), sizes, alike=alike).split(sizes)
        return torch.cat([part.view(len(x), -1) for part in parts], dim=-1)

    def _row_parallel(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, local] times weight [D, local], summed over the tp axis; the bias is added once."""
        y = self.residual.leave(F.linear(x, weight))
        return y if bias is None else y.add_(bias)

    def _mlp(self, layer: Layer, x: Tensor, call: StageCall) -> Tensor:
        """The MLP half of a layer before it is added: x [T_r, D] -> [T_r, D]."""
        units = self._gelu_linear(self.residual.enter(self._norm(x, layer.mlp_norm), call.tokens), *layer.up)
        return self._row_parallel(units, *layer.down)

    def _gelu_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """gelu(x weight^T + bias): x [T, D] -> [T, units].

        cuBLASLt computes the tanh form inside the matrix product, before it rounds (8 % faster on an H200 than a
        kernel of its own, and nearer to the exact value).
        """
        approximate = "tanh" if self.model.activation == "gelu_tanh" else "none"
        if torch.is_grad_enabled():
            return F.gelu(F.linear(x, weight, bias), approximate=approximate)
        if x.is_cuda and self.model.activation == "gelu_tanh":
            if bias is None:
                bias = self._no_bias = self._no_bias if len(self._no_bias) == len(weight) else x.new_zeros(len(weight))
            return torch.ops.aten._addmm_activation(bias, x, weight.t(), use_gelu=True)
        return torch.ops.aten.gelu_(F.linear(x, weight, bias), approximate=approximate)

    def final_norm(self, x: Tensor, call: StageCall) -> Tensor:
        """The ending tokens, normalised: x [T_r, D] -> [len(ending), D] on every rank."""
        last = self.residual.pick(x, call.tokens, call.ending)
        return self._norm(last, (self.weights["final.norm.weight"], self.weights["final.norm.bias"]))

    def head(self, last: Tensor) -> Tensor:
        """Normalised hidden states [b, D] -> logits [b, vocab_size], whole on every rank of the stage."""
        if not len(last):
            return last.new_empty(0, self.model.vocab_size)
        tied = self.model.tied_embeddings
        local = F.linear(self.mesh.tp.fan_out(last), self.weights["embedding.weight" if tied else "head.weight"])
        return self._concat(local, [len(span) for span in self.vocab], alike=True)


def _added(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in x where no gradient needs it as it was."""
    return x + y if torch.is_grad_enabled() else x.add_(y)
