"""Predicted collectives: what a rank issues in a prefill or a decode step, to the byte.

`bytes` is what the rank must send to others with a bandwidth-optimal algorithm over a group of g ranks:
all-reduce of N bytes 2 (g - 1) N / g, all-gather of an own part of N bytes (g - 1) N, reduce-scatter and all-to-all
the parts for others, send N (Thakur, Rabenseifner, Gropp 2005); `recv` counts the N bytes that arrive.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from headgrid.layout.batching import (
    Call,
    MicroBatch,
    decode_micro_batches,
    pieces,
    prefill_calls,
    query_share,
    replica_rows,
    score_blocks,
    token_shares,
)
from headgrid.layout.layout import Coordinates, Layout
from headgrid.layout.quantised import FP8_BYTES, is_quantised, scale_bytes
from headgrid.layout.shards import HeadShard, Shard, head_shard, parameters, stage_layers
from headgrid.layout.span import Span, balanced, total
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "recv"]
TOKEN_BYTES = 8


@dataclass(frozen=True, slots=True)
class Collective:
    """One call as a rank issues it. `axis` is the mesh axis, or `pp_back` for tokens that return to stage 0."""

    kind: Kind
    axis: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward call depends on: the ranks that share it, the sequences, and their positions.

    `positions` is None in decode: one query, over a cache of `capacity` positions. `ending` tokens get logits.
    """

    model: ModelSpec
    layout: Layout
    axis: str
    tp_index: int
    own: HeadShard
    micro_batch: MicroBatch
    positions: Span | None
    ending: int
    capacity: int
    element_bytes: int

    @property
    def queries(self) -> int:
        """Of each sequence."""
        return 1 if self.positions is None else len(self.positions)

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.micro_batch.size * self.queries

    @property
    def slice(self) -> int:
        """This rank's slice."""
        return self.tp_index % self.layout.num_dim_slices

    @property
    def own_tokens(self) -> int:
        """Tokens whose hidden states this rank holds."""
        return own_tokens(self.layout, self.micro_batch.size, self.queries, self.tp_index)

    @property
    def wide_bytes(self) -> int:
        """Of an element of what is never summed in 16 bits."""
        return max(4, self.element_bytes)


def own_tokens(layout: Layout, rows: int, queries: int, tp_index: int) -> int:
    """Tokens of a call whose hidden states a rank holds: all, or its share where the residual is sharded."""
    return len(token_shares(layout, rows, queries)[tp_index]) if layout.residual == "sharded" else rows * queries


def residual_bytes(layout: Layout, element_bytes: int) -> int:
    """Bytes of an element of the hidden states."""
    return max(4, element_bytes) if layout.residual_dtype == "fp32" else element_bytes


def all_reduce_bytes(size: int, group: int) -> int:
    """Bytes a rank sends to reduce `size` bytes over `group` ranks."""
    return 2 * (group - 1) * size // group


def _gather_exchange(step: Step) -> Iterator[Collective]:
    own, m = step.own, step.layout.num_dim_slices
    part = step.tokens * (len(own.heads) + len(own.kv_heads)) * own.qk_width * step.element_bytes
    yield Collective("all_gather", "tp_slice", (m - 1) * part)


def _batch_exchange(step: Step) -> Iterator[Collective]:
    own = step.own
    mine = len(step.micro_batch.parts[step.slice])
    away = step.micro_batch.size - mine
    yield Collective("all_to_all", "tp_slice", away * step.queries * own.row_width * step.element_bytes)
    others = step.model.head_dim - len(own.v_channels)
    yield Collective("all_to_all", "tp_slice", mine * step.queries * len(own.heads) * others * step.element_bytes)


def _sequence_exchange(step: Step) -> Iterator[Collective]:
    own, m, e = step.own, step.layout.num_dim_slices, step.element_bytes
    heads, others = len(own.heads), step.model.head_dim - len(own.v_channels)
    if step.positions is not None and not step.positions.start:
        mine = total(query_share(step.queries, m, step.slice))
        rows, kv = step.micro_batch.size, len(own.kv_heads) * (own.qk_width + len(own.v_channels))
        yield Collective("all_to_all", "tp_slice", rows * (step.queries - mine) * heads * own.qk_width * e)
        yield Collective("all_gather", "tp_slice", (m - 1) * step.tokens * kv * e)
        yield Collective("all_to_all", "tp_slice", rows * mine * heads * others * e)
        return
    yield Collective("all_gather", "tp_slice", (m - 1) * step.tokens * own.row_width * e)
    yield Collective("all_to_all", "tp_slice", step.tokens * heads * (others + m - 1) * step.wide_bytes)


def _scores_exchange(step: Step) -> Iterator[Collective]:
    rows, blocks = step.micro_batch.size * len(step.own.heads), ((Span(0, 1), step.capacity),)
    if step.positions is not None:
        blocks = score_blocks(rows, step.positions.start, step.queries, is_causal=step.model.is_causal)
    for block, keys in blocks:
        size = rows * len(block) * keys * step.wide_bytes
        yield Collective("all_reduce", "tp_slice", all_reduce_bytes(size, step.layout.num_dim_slices))


def _no_exchange(step: Step) -> Iterator[Collective]:
    return iter(())


EXCHANGE_CALLS = {
    "none": _no_exchange,
    "independent": _no_exchange,
    "gather": _gather_exchange,
    "batch": _batch_exchange,
    "sequence": _sequence_exchange,
    "scores": _scores_exchange,
}


def qk_norm_calls(step: Step) -> Iterator[Collective]:
    """Sums of squares over the slices of each head."""
    m, heads = step.layout.num_dim_slices, len(step.own.heads) + len(step.own.kv_heads)
    if step.model.qk_norm and m > 1:
        yield Collective("all_reduce", "tp_slice", all_reduce_bytes(step.tokens * heads * step.wide_bytes, m))


def enter_calls(step: Step) -> Iterator[Collective]:
    """Hidden states of all tokens, for a product with columns that are owned here."""
    if step.layout.residual == "sharded":
        part = step.own_tokens * step.model.hidden_size * step.element_bytes
        yield Collective("all_gather", step.axis, (step.layout.tp - 1) * part)


def leave_calls(step: Step) -> Iterator[Collective]:
    """The sum of a product's parts, of all tokens or of this rank's."""
    width = step.model.hidden_size * step.element_bytes
    if step.layout.residual == "sharded":
        yield Collective("reduce_scatter", step.axis, (step.tokens - step.own_tokens) * width)
    elif step.layout.tp > 1:
        yield Collective("all_reduce", step.axis, all_reduce_bytes(step.tokens * width, step.layout.tp))


def _output(step: Step) -> Iterator[Collective]:
    layout, own = step.layout, step.own
    if layout.output == "reduce":
        yield from leave_calls(step)
    elif layout.tp > 1:
        heads = step.tokens * len(own.heads) * len(own.v_channels) * step.element_bytes
        yield Collective("all_gather", step.axis, (layout.tp - 1) * heads)
        columns = balanced(step.model.hidden_size, layout.tp)[step.tp_index]
        yield Collective("all_gather", step.axis, (layout.tp - 1) * step.tokens * len(columns) * step.element_bytes)


def layer_calls(step: Step) -> Iterator[Collective]:
    """One layer, both halves; data-parallel attention sends nothing."""
    if step.layout.attention == "cut":
        yield from enter_calls(step)
        yield from qk_norm_calls(step)
        yield from EXCHANGE_CALLS[step.layout.exchange](step)
        yield from _output(step)
    yield from enter_calls(step)
    yield from leave_calls(step)


def pick_calls(step: Step) -> Iterator[Collective]:
    """Hidden states of last tokens, on every rank."""
    if step.layout.residual == "sharded" and step.ending:
        size = step.ending * step.model.hidden_size * residual_bytes(step.layout, step.element_bytes)
        yield Collective("all_reduce", step.axis, all_reduce_bytes(size, step.layout.tp))


def logits_calls(model: ModelSpec, layout: Layout, rank: int, rows: int, element_bytes: int) -> Iterator[Collective]:
    """The vocabulary's parts of `rows` tokens' logits."""
    if layout.tp > 1 and rows and model.head == "vocabulary":
        vocab = balanced(model.vocab_size, layout.tp)[layout.tp_index(layout.coordinates(rank))]
        yield Collective("all_gather", "tp", (layout.tp - 1) * rows * len(vocab) * element_bytes)


def hidden_bytes(step: Step) -> int:
    """Of the hidden states that this rank holds."""
    return step.own_tokens * step.model.hidden_size * residual_bytes(step.layout, step.element_bytes)


def message(kind: Literal["send", "recv"], size: int, axis: str = "pp") -> Iterator[Collective]:
    """Between stages; a rank that holds no tokens has nothing to say."""
    if size:
        yield Collective(kind, axis, size)


def _forward(step: Step, rank: int) -> Iterator[Collective]:
    """One call through one stage: receive or embed, the layers, send or logits of last positions."""
    model, layout, stage = step.model, step.layout, step.layout.coordinates(rank).pp
    if stage > 0:
        yield from message("recv", hidden_bytes(step))
    else:
        yield from leave_calls(step)
    for _ in range(len(stage_layers(model, layout)[stage])):
        yield from layer_calls(step)
    if stage < layout.pp - 1:
        yield from message("send", hidden_bytes(step))
        return
    yield from pick_calls(step)
    yield from logits_calls(model, layout, rank, step.ending, step.element_bytes)


def over_heads(layout: Layout) -> Layout:
    """How a head group's whole weights are run once they are gathered: tensor parallelism over the head groups."""
    residual = layout.residual if layout.num_head_groups > 1 else "replicated"
    return replace(layout, num_dim_slices=1, exchange="none", weights="stationary", residual=residual)


def gathered_steps(model: ModelSpec, layout: Layout, workload: Workload, rank: int, mb: MicroBatch) -> list[Step]:
    """A slice's own sequences with gathered weights, in the pieces in which a layer computes them."""
    at, whole = layout.coordinates(rank), over_heads(layout)
    own, mine = head_shard(model, whole, at.head_group, 0), mb.parts[at.slice]
    found: list[Step] = []
    for rows, positions in pieces(layout, len(mine), workload):
        piece = Call(MicroBatch((rows.shift(mine.start),)), positions)
        ending, e = len(piece.wanted(workload)), workload.element_bytes
        found.append(Step(model, whole, "tp_head", at.head_group, own, piece.micro_batch, positions, ending, 0, e))
    return found


def _gathered(model: ModelSpec, layout: Layout, workload: Workload, rank: int, mb: MicroBatch) -> Iterator[Collective]:
    """One micro-batch through one stage with gathered weights: the slice computes its own sequences only."""
    at, e = layout.coordinates(rank), workload.element_bytes
    shards, others = parameters(model, layout, rank), layout.num_dim_slices - 1
    steps = gathered_steps(model, layout, workload, rank, mb)
    if at.pp > 0:
        yield from message("recv", sum(map(hidden_bytes, steps)))
    else:
        yield Collective("all_gather", "tp_slice", others * shards["embedding.weight"].num_elements * e)
        for step in steps:
            yield from leave_calls(step)
    for _ in range(len(stage_layers(model, layout)[at.pp])):
        yield from _gathered_layer(model, layout, workload, rank, steps)
    if at.pp < layout.pp - 1:
        yield from message("send", sum(map(hidden_bytes, steps)))
    else:
        for step in steps:
            yield from pick_calls(step)
        last = len(mb.parts[at.slice]) * workload.outputs
        yield Collective("all_gather", "tp_slice", others * last * model.hidden_size * e)
        yield from logits_calls(model, layout, rank, mb.size * workload.outputs, e)


_GATHERED = {
    "qkv": ("attention.q.weight", "attention.k.weight", "attention.v.weight"),
    "qkv scale": ("attention.q.weight", "attention.k.weight", "attention.v.weight"),
    "qkv bias": ("attention.q.bias", "attention.k.bias", "attention.v.bias"),
    "o": ("attention.o.weight",),
    "up": ("mlp.gate.weight", "mlp.up.weight"),
    "up scale": ("mlp.gate.weight", "mlp.up.weight"),
    "up bias": ("mlp.gate.bias", "mlp.up.bias"),
    "down": ("mlp.down.weight",),
    "q_norm": ("attention.q_norm.weight",),
    "k_norm": ("attention.k_norm.weight",),
}
"""What a layer gathers, in the order in which it is put together, and the weights that it consists of, or whose scales
these are.
"""


@lru_cache(maxsize=32)  # the same for every layer and call
def gathered_weights(model: ModelSpec, layout: Layout, rank: int, element_bytes: int) -> dict[str, tuple[int, ...]]:
    """Bytes of each slice's part of what a layer of the rank's stage gathers, in the order it is put together."""
    at = layout.coordinates(rank)
    prefix = f"layers.{stage_layers(model, layout)[at.pp].start}."
    peers = [layout.rank(Coordinates(at.dp, at.pp, at.head_group, j)) for j in range(layout.num_dim_slices)]
    shards = [parameters(model, layout, peer) for peer in peers]

    def size(name: str, part: str, shard: Shard) -> int:
        if not is_quantised(layout, part):
            return shard.num_elements * element_bytes
        return scale_bytes(shard) if name.endswith("scale") else shard.num_elements * FP8_BYTES

    return {
        name: tuple(
            sum(size(name, part, held[prefix + part]) for part in parts if prefix + part in held) for held in shards
        )
        for name, parts in _GATHERED.items()
        if prefix + parts[-1] in shards[0] and (layout.linears == "fp8" or not name.endswith("scale"))
    }


def _gathered_layer(
    model: ModelSpec, layout: Layout, workload: Workload, rank: int, steps: list[Step]
) -> Iterator[Collective]:
    """The slices of a layer's weights once, then what the head groups exchange for each piece."""
    others, j = layout.num_dim_slices - 1, layout.coordinates(rank).slice
    for sizes in gathered_weights(model, layout, rank, workload.element_bytes).values():
        yield Collective("all_gather", "tp_slice", others * sizes[j])
    for step in steps:
        yield from layer_calls(step)


def _tokens_back(layout: Layout, rank: int, rows: int) -> Iterator[Collective]:
    """Greedy tokens return from the last stage to the first."""
    stage = layout.coordinates(rank).pp
    if layout.pp > 1 and stage in (0, layout.pp - 1):
        yield Collective("send" if stage else "recv", "pp_back", rows * TOKEN_BYTES)


def stationary_step(model: ModelSpec, layout: Layout, workload: Workload, rank: int, call: Call | MicroBatch) -> Step:
    """A call of prefill, or a micro-batch of decode, on the weights as they are stored."""
    at, e = layout.coordinates(rank), workload.element_bytes
    own = head_shard(model, layout, at.head_group, at.slice)
    if isinstance(call, Call):
        mb, positions, ending = call.micro_batch, call.positions, len(call.wanted(workload))
    else:
        mb, positions, ending = call, None, call.size
    return Step(model, layout, "tp", layout.tp_index(at), own, mb, positions, ending, workload.cache_positions, e)


def layer_collectives(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> frozenset[Collective]:
    """The kinds of calls that layers issue, in either phase; embedding and logits may issue equal ones."""
    at = layout.coordinates(rank)
    found: set[Collective] = set()
    for call in prefill_calls(layout, workload, at.dp):
        if layout.weights == "gathered":
            steps = gathered_steps(model, layout, workload, rank, call.micro_batch)
            found.update(_gathered_layer(model, layout, workload, rank, steps))
        else:
            found.update(layer_calls(stationary_step(model, layout, workload, rank, call)))
    for mb in decode_micro_batches(layout, workload, at.dp):
        found.update(layer_calls(stationary_step(model, layout, workload, rank, mb)))
    return frozenset(found)


def prefill_collectives(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> Counter[Collective]:
    """All calls of one prefill of the batch by `rank`, with their numbers."""
    replica = layout.coordinates(rank).dp
    issued: Counter[Collective] = Counter()
    for call in prefill_calls(layout, workload, replica):
        if layout.weights == "gathered":
            issued.update(_gathered(model, layout, workload, rank, call.micro_batch))
        else:
            issued.update(_forward(stationary_step(model, layout, workload, rank, call), rank))
    issued.update(_tokens_back(layout, rank, len(replica_rows(layout, workload.batch)[replica])))
    return issued


def decode_collectives(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> Counter[Collective]:
    """All calls of one decode step (a token for every sequence) by `rank`, with their numbers."""
    issued: Counter[Collective] = Counter()
    for micro_batch in decode_micro_batches(layout, workload, layout.coordinates(rank).dp):
        issued.update(_forward(stationary_step(model, layout, workload, rank, micro_batch), rank))
        issued.update(_tokens_back(layout, rank, micro_batch.size))
    return issued
