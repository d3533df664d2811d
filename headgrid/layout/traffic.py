"""Predicted collectives: what a rank issues in a prefill or a decode step, to the byte.

`bytes` is what the rank must send to others with a bandwidth-optimal algorithm over a group of g ranks:
all-reduce of N bytes 2 (g - 1) N / g, all-gather of an own part of N bytes (g - 1) N, all-to-all the parts for
others, send N (Thakur, Rabenseifner, Gropp 2005); `recv` counts the N bytes that arrive.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from headgrid.layout.batching import MicroBatch, chunks, decode_micro_batches, prefill_micro_batches, replica_rows
from headgrid.layout.layout import Layout
from headgrid.layout.shards import HeadShard, head_shard, parameters, stage_layers
from headgrid.layout.span import balanced, indices
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

Kind = Literal["all_reduce", "all_gather", "all_to_all", "send", "recv"]
TOKEN_BYTES = 8


@dataclass(frozen=True, slots=True)
class Collective:
    """One call as a rank issues it. `axis` is the mesh axis, or `pp_back` for tokens that return to stage 0."""

    kind: Kind
    axis: str
    bytes: int


@dataclass(frozen=True, slots=True)
class _Call:
    """What one forward call of a micro-batch depends on."""

    model: ModelSpec
    layout: Layout
    rank: int
    micro_batch: MicroBatch
    queries: int
    element_bytes: int

    @property
    def tokens(self) -> int:
        return self.micro_batch.size * self.queries

    @property
    def hidden_bytes(self) -> int:
        return self.tokens * self.model.hidden_size * self.element_bytes

    @property
    def own(self) -> HeadShard:
        at = self.layout.coordinates(self.rank)
        return head_shard(self.model, self.layout, at.head_group, at.slice)


def all_reduce_bytes(size: int, group: int) -> int:
    """Bytes a rank sends to reduce `size` bytes over `group` ranks."""
    return 2 * (group - 1) * size // group


def _gather_exchange(call: _Call) -> Iterator[Collective]:
    own, m = call.own, call.layout.num_dim_slices
    part = call.tokens * (len(own.heads) + len(own.kv_heads)) * own.qk_width * call.element_bytes
    yield Collective("all_gather", "tp_slice", (m - 1) * part)


def _batch_exchange(call: _Call) -> Iterator[Collective]:
    own, j = call.own, call.layout.coordinates(call.rank).slice
    width = (len(own.heads) + len(own.kv_heads)) * own.qk_width + len(own.kv_heads) * len(own.v_channels)
    mine = len(call.micro_batch.parts[j])
    away = call.micro_batch.size - mine
    yield Collective("all_to_all", "tp_slice", away * call.queries * width * call.element_bytes)
    others = call.model.head_dim - len(own.v_channels)
    yield Collective("all_to_all", "tp_slice", mine * call.queries * len(own.heads) * others * call.element_bytes)


def _no_exchange(call: _Call) -> Iterator[Collective]:
    return iter(())


_EXCHANGE = {"none": _no_exchange, "independent": _no_exchange, "gather": _gather_exchange, "batch": _batch_exchange}


def _hidden_reduce(call: _Call) -> Iterator[Collective]:
    if call.layout.tp > 1:
        yield Collective("all_reduce", "tp", all_reduce_bytes(call.hidden_bytes, call.layout.tp))


def _output(call: _Call) -> Iterator[Collective]:
    layout, own = call.layout, call.own
    if layout.output == "reduce":
        yield from _hidden_reduce(call)
    elif layout.tp > 1:
        heads = call.tokens * len(own.heads) * len(own.v_channels) * call.element_bytes
        yield Collective("all_gather", "tp", (layout.tp - 1) * heads)
        columns = balanced(call.model.hidden_size, layout.tp)[layout.tp_index(layout.coordinates(call.rank))]
        yield Collective("all_gather", "tp", (layout.tp - 1) * call.tokens * len(columns) * call.element_bytes)


def _layer(call: _Call) -> Iterator[Collective]:
    yield from _EXCHANGE[call.layout.exchange](call)
    yield from _output(call)
    yield from _hidden_reduce(call)


def _forward(call: _Call) -> Iterator[Collective]:
    """One micro-batch through one stage: receive or embed, the layers, send or logits of the last position."""
    model, layout, stage = call.model, call.layout, call.layout.coordinates(call.rank).pp
    if stage > 0:
        yield Collective("recv", "pp", call.hidden_bytes)
    else:
        yield from _hidden_reduce(call)
    for _ in range(len(stage_layers(model, layout)[stage])):
        yield from _layer(call)
    if stage < layout.pp - 1:
        yield Collective("send", "pp", call.hidden_bytes)
    elif layout.tp > 1:
        vocab = balanced(model.vocab_size, layout.tp)[layout.tp_index(layout.coordinates(call.rank))]
        part = call.micro_batch.size * len(vocab) * call.element_bytes
        yield Collective("all_gather", "tp", (layout.tp - 1) * part)


def _gathered(model: ModelSpec, layout: Layout, workload: Workload, rank: int, mb: MicroBatch) -> Iterator[Collective]:
    """One micro-batch through one stage with gathered weights: the slice computes its own sequences only."""
    at, e = layout.coordinates(rank), workload.element_bytes
    shards, others = parameters(model, layout, rank), layout.num_dim_slices - 1
    rows = len(mb.parts[at.slice])
    hidden = rows * workload.seq * model.hidden_size * e
    over_heads = Collective("all_reduce", "tp_head", all_reduce_bytes(hidden, layout.num_head_groups))
    if at.pp > 0:
        yield Collective("recv", "pp", hidden)
    else:
        yield Collective("all_gather", "tp_slice", others * shards["embedding.weight"].num_elements * e)
        if layout.num_head_groups > 1 and rows:
            yield over_heads
    for index in indices((stage_layers(model, layout)[at.pp],)):
        yield from _gathered_layer(model, layout, workload, rank, index, rows)
    if at.pp < layout.pp - 1:
        yield Collective("send", "pp", hidden)
    else:
        yield Collective("all_gather", "tp_slice", others * rows * model.hidden_size * e)
        vocab = balanced(model.vocab_size, layout.tp)[layout.tp_index(at)]
        yield Collective("all_gather", "tp", (layout.tp - 1) * mb.size * len(vocab) * e)


def _gathered_layer(
    model: ModelSpec, layout: Layout, workload: Workload, rank: int, index: int, rows: int
) -> Iterator[Collective]:
    """The slices of a layer's weights once, then two reductions over the head groups for each chunk of sequences."""
    shards, e = parameters(model, layout, rank), workload.element_bytes
    parts = (("attention.q", "attention.k", "attention.v"), ("attention.o",), ("mlp.up",), ("mlp.down",))
    named = [[f"layers.{index}.{name}.weight" for name in names] for names in parts]
    if model.linear_bias:
        named += [[f"layers.{index}.{name}.bias" for name in names] for names in (parts[0], parts[2])]
    for names in named:
        size = sum(shards[name].num_elements for name in names) * e
        yield Collective("all_gather", "tp_slice", (layout.num_dim_slices - 1) * size)
    for chunk in chunks(rows, workload) if layout.num_head_groups > 1 else ():
        hidden = len(chunk) * workload.seq * model.hidden_size * e
        for _ in range(2):
            yield Collective("all_reduce", "tp_head", all_reduce_bytes(hidden, layout.num_head_groups))


def _tokens_back(layout: Layout, rank: int, rows: int) -> Iterator[Collective]:
    """Greedy tokens return from the last stage to the first."""
    stage = layout.coordinates(rank).pp
    if layout.pp > 1 and stage in (0, layout.pp - 1):
        yield Collective("send" if stage else "recv", "pp_back", rows * TOKEN_BYTES)


def layer_collectives(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> frozenset[Collective]:
    """The kinds of calls that layers issue, in either phase; embedding and logits may issue equal ones."""
    at = layout.coordinates(rank)
    found: set[Collective] = set()
    for mb in prefill_micro_batches(layout, workload, at.dp):
        if layout.weights == "gathered":
            first = stage_layers(model, layout)[at.pp].start
            found.update(_gathered_layer(model, layout, workload, rank, first, len(mb.parts[at.slice])))
        else:
            found.update(_layer(_Call(model, layout, rank, mb, workload.seq, workload.element_bytes)))
    for mb in decode_micro_batches(layout, workload, at.dp):
        found.update(_layer(_Call(model, layout, rank, mb, 1, workload.element_bytes)))
    return frozenset(found)


def prefill_collectives(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> Counter[Collective]:
    """All calls of one prefill of the batch by `rank`, with their numbers."""
    replica = layout.coordinates(rank).dp
    issued: Counter[Collective] = Counter()
    for micro_batch in prefill_micro_batches(layout, workload, replica):
        if layout.weights == "gathered":
            issued.update(_gathered(model, layout, workload, rank, micro_batch))
        else:
            issued.update(_forward(_Call(model, layout, rank, micro_batch, workload.seq, workload.element_bytes)))
    issued.update(_tokens_back(layout, rank, len(replica_rows(layout, workload.batch)[replica])))
    return issued


def decode_collectives(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> Counter[Collective]:
    """All calls of one decode step (a token for every sequence) by `rank`, with their numbers."""
    issued: Counter[Collective] = Counter()
    for micro_batch in decode_micro_batches(layout, workload, layout.coordinates(rank).dp):
        call = _Call(model, layout, rank, micro_batch, 1, workload.element_bytes)
        issued.update(_forward(call))
        issued.update(_tokens_back(layout, rank, micro_batch.size))
    return issued
