"""Predicted peak of activations: the largest set of tensors that a rank's prefill holds at any one moment, and the
largest one that a collective writes.

The tensors are those of `runtime.stage`, step by step, weights, cache and the engine's permanent buffers excluded.
Of calls that take turns the peaks are added: a bound, which is reached where both hold most while one waits.
Letters as in `held`.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from headgrid.layout.batching import Call, MicroBatch, attended_rows, pieces, prefill_calls, query_share, replica_rows
from headgrid.layout.held import INDEX_BYTES, Shape, gathered, turned_pairs
from headgrid.layout.layout import Layout
from headgrid.layout.shards import head_shard, stage_layers
from headgrid.layout.span import Span, balanced, total
from headgrid.layout.steps import embed_bytes, is_shared, last_bytes, logits_bytes, steps_bytes
from headgrid.layout.traffic import gathered_weights, over_heads
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

_SENDS_IN_FLIGHT = 2


def _windows(model: ModelSpec, layout: Layout, rank: int) -> frozenset[int]:
    """The different windows of the layers of a rank's stage."""
    layers = stage_layers(model, layout)[layout.coordinates(rank).pp]
    return frozenset(model.window(index) for index in range(layers.start, layers.stop))


@lru_cache(maxsize=32)  # the same for every call of a prefill
def _place(model: ModelSpec, layout: Layout, rank: int, e: int) -> Shape:
    """What all calls of a rank have in common, on the weights as they are stored, or as they are gathered."""
    at, m = layout.coordinates(rank), layout.num_dim_slices
    owners = tuple(head_shard(model, layout, at.head_group, j) for j in range(m))
    units, index = [len(span) for span in balanced(model.mlp_hidden_size, layout.tp)], layout.tp_index(at)
    common: dict[str, Any] = {"rows": 0, "attended": 0, "positions": Span(0, 0), "lengths": (), "ending": 0, "e": e}
    if layout.weights != "gathered":
        pairs = turned_pairs(model, owners[at.slice])
        own: dict[str, Any] = {"tp_index": index, "owners": owners, "slice": at.slice, "units": units[index]}
        return Shape(model=model, layout=layout, pairs=pairs, **own, **common)
    whole, pairs = over_heads(layout), max(turned_pairs(model, owner) for owner in owners)
    mine = sum(units[at.head_group * m : (at.head_group + 1) * m])
    heads = (head_shard(model, whole, at.head_group, 0),)
    own = {"tp_index": at.head_group, "owners": heads, "slice": 0, "units": mine}
    return Shape(model=model, layout=whole, pairs=pairs, **own, **common)


def _stationary_shape(model: ModelSpec, layout: Layout, workload: Workload, rank: int, call: Call) -> Shape:
    """A call of prefill on the weights as they are stored."""
    mb = call.micro_batch
    mine = attended_rows(layout, mb, layout.coordinates(rank))
    return replace(
        _place(model, layout, rank, workload.element_bytes),
        rows=mb.size,
        attended=len(mine),
        positions=call.positions,
        lengths=() if model.is_causal else tuple(map(workload.length, mine)),
        ending=len(call.wanted(workload)),
    )


def _stationary_shapes(
    model: ModelSpec, layout: Layout, workload: Workload, rank: int
) -> Iterator[tuple[Hashable, Shape]]:
    """Of every call of a prefill, with a key: calls of one size share both, where no prompt differs from another."""
    known: dict[Hashable, Shape] = {}
    for call in prefill_calls(layout, workload, layout.coordinates(rank).dp):
        key: Hashable = call
        if not workload.prompt_lengths:
            key = tuple(map(len, call.micro_batch.parts)), call.positions
        if key not in known:
            known[key] = _stationary_shape(model, layout, workload, rank, call)
        yield key, known[key]


@dataclass(frozen=True, slots=True)
class _Held:
    """Bytes of one call on one rank: its residual, its token ids, and the most that is held with the residual."""

    hidden: int
    ids: int
    most: int


@lru_cache(maxsize=64)  # calls of a prefill have few shapes
def _stationary(shape: Shape, spans: frozenset[int], first: bool, last: bool) -> _Held:
    hidden, starts = shape.hidden_bytes, shape.rows * INDEX_BYTES
    most = [hidden + steps_bytes(shape, spans)]
    if first:
        most.append(embed_bytes(shape))
    if last and shape.ending:
        model, logits = shape.model, 0
        if model.head == "vocabulary":
            logits = logits_bytes(model, shape.layout, shape.tp_index, shape.ending, shape.e)
        most.append(hidden + max(last_bytes(shape), logits))
    return _Held(hidden, shape.tokens * INDEX_BYTES, starts + max(most))


def _gathered_shapes(model: ModelSpec, layout: Layout, workload: Workload, rank: int, mb: MicroBatch) -> list[Shape]:
    """A slice's own sequences on the gathered weights of its head group, piece by piece."""
    mine, shape = mb.parts[layout.coordinates(rank).slice], _place(model, layout, rank, workload.element_bytes)
    shapes: list[Shape] = []
    for rows, positions in pieces(layout, len(mine), workload):
        span = rows.shift(mine.start)
        ending = len(Call(MicroBatch((span,)), positions).wanted(workload))
        lengths = () if model.is_causal else tuple(map(workload.length, range(span.start, span.stop)))
        piece = replace(shape, rows=len(span), attended=len(span), positions=positions, ending=ending, lengths=lengths)
        shapes.append(piece)
    return shapes


def _gathered(model: ModelSpec, layout: Layout, workload: Workload, rank: int, mb: MicroBatch) -> _Held:
    """Two layers of gathered weights, this one's and the next one's, beside the work on one piece."""
    at, e = layout.coordinates(rank), workload.element_bytes
    shapes = _gathered_shapes(model, layout, workload, rank, mb)
    hidden, starts = sum(shape.hidden_bytes for shape in shapes), sum(shape.rows for shape in shapes) * INDEX_BYTES
    parts = {name: list(sizes) for name, sizes in gathered_weights(model, layout, rank, e).items()}
    layer, under_way = sum(map(sum, parts.values())), sum(gathered(sizes, at.slice) for sizes in parts.values())
    spans, layers = _windows(model, layout, rank), stage_layers(model, layout)[at.pp]
    most_of = {shape: steps_bytes(shape, spans) for shape in set(shapes)}
    steps = max(_together([most_of[shape] for shape in shapes], layout.pieces_at_once), default=0)
    most = [
        hidden + _assembling_bytes(parts, at.slice, gated_mlp=model.gated_mlp),
        hidden + layer + (under_way if len(layers) > 1 else 0) + steps,
    ]
    if at.pp == 0:
        most.append(under_way + _gathered_embed_bytes(model, layout, rank, shapes, e))
    if at.pp == layout.pp - 1:
        last = sum(shape.ending for shape in shapes) * model.hidden_size * e
        logits = logits_bytes(model, layout, layout.tp_index(at), mb.size * workload.outputs, e)
        views = workload.every_token and all(map(is_shared, shapes))  # states themselves are put together
        most.append(hidden + (1 if views else 2) * last + logits)
    return _Held(hidden, mb.size * workload.seq * INDEX_BYTES, starts + max(most))


def _assembling_bytes(parts: dict[str, list[int]], index: int, *, gated_mlp: bool) -> int:
    """Slices that have arrived become whole weights, one after the other; all are copied but norms, and `up` where it
    has no gate.
    """
    held, most = sum(gathered(sizes, index) for sizes in parts.values()), 0
    copied = ("qkv", "qkv scale", "qkv bias", "o", "down", *(("up", "up scale", "up bias") if gated_mlp else ()))
    for name, sizes in parts.items():
        most = max(most, held)
        held -= gathered(sizes, index) - sum(sizes)
        if name in copied:
            most = max(most, held + sum(sizes))
    return most


def _gathered_embed_bytes(model: ModelSpec, layout: Layout, rank: int, shapes: list[Shape], e: int) -> int:
    """The head group's part of the vocabulary, and hidden states piece by piece, then put together."""
    at, m = layout.coordinates(rank), layout.num_dim_slices
    vocab = balanced(model.vocab_size, layout.tp)[at.head_group * m : (at.head_group + 1) * m]
    sizes = [len(span) * model.hidden_size * e for span in vocab]
    most, done = gathered(sizes, at.slice), 0
    for shape in shapes:
        most = max(most, sum(sizes) + done + embed_bytes(shape))
        done += shape.hidden_bytes
    return max(most, sum(sizes) + 2 * done)


def _held(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> Iterator[_Held]:
    """Every call of a rank's prefill."""
    at = layout.coordinates(rank)
    spans, first, last = _windows(model, layout, rank), at.pp == 0, at.pp == layout.pp - 1
    if layout.weights == "gathered":
        for call in prefill_calls(layout, workload, at.dp):
            yield _gathered(model, layout, workload, rank, call.micro_batch)
        return
    known: dict[Hashable, _Held] = {}
    for key, shape in _stationary_shapes(model, layout, workload, rank):
        if key not in known:
            known[key] = _stationary(shape, spans, first, last)
        yield known[key]


def activations_peak_bytes(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> int:
    """Peak bytes that `rank` allocates in a prefill, beyond weights, cache, logits and tokens."""
    stage, peak = layout.coordinates(rank).pp, 0
    calls, at_once = list(_held(model, layout, workload, rank)), layout.calls_at_once
    for k, held in enumerate(_together([call.most + call.ids * (stage == 0) for call in calls], at_once)):
        if stage > 0 and k + at_once < len(calls):
            held += calls[k + at_once].hidden  # its receive is posted before the call ahead of it computes
        if stage < layout.pp - 1:
            held += sum(sent.hidden for sent in calls[max(0, k - _SENDS_IN_FLIGHT) : k])
        peak = max(peak, held)
    return peak


def _together(held: list[int], at_once: int) -> list[int]:
    """From each call on, what so many of them hold."""
    return [sum(held[k : k + at_once]) for k in range(len(held))]


def _exchanged(shape: Shape) -> Iterator[int]:
    """Bytes that arrive in an exchange."""
    each, heads, kv, d = shape.tokens * shape.e, shape.heads, shape.kv_heads, shape.model.head_dim
    exchange, m, u = shape.layout.exchange, len(shape.owners), len(shape.own.v_channels)
    if exchange == "gather":
        yield each * (heads + kv) * d
    elif exchange == "batch":
        yield shape.attended * shape.queries * (heads + 2 * kv) * d * shape.e
        yield shape.out_bytes
    elif exchange == "sequence" and shape.is_cached:
        yield each * (heads + 2 * kv) * d
        yield m * shape.tokens * heads * (u + 1) * shape.wide
    elif exchange == "sequence":
        yield shape.rows * total(query_share(shape.queries, m, shape.slice)) * heads * d * shape.e
        yield each * 2 * kv * d
        yield shape.out_bytes


def _of_layers(shape: Shape) -> Iterator[int]:
    """Bytes that arrive in a layer: in its exchange, its output, and where the residual is sharded before products."""
    yield from _exchanged(shape)
    if shape.layout.output == "concat" and shape.layout.tp > 1:
        yield shape.tokens * shape.model.num_heads * shape.model.head_dim * shape.e
        yield shape.whole_bytes
    if shape.layout.residual == "sharded":
        yield shape.whole_bytes


def _of_weights(model: ModelSpec, layout: Layout, workload: Workload, rank: int, mb: MicroBatch) -> Iterator[int]:
    """Bytes that arrive where weights are gathered: these, the vocabulary and last tokens."""
    at, m, e = layout.coordinates(rank), layout.num_dim_slices, workload.element_bytes
    yield from map(sum, gathered_weights(model, layout, rank, e).values())
    if at.pp == 0:
        vocab = balanced(model.vocab_size, layout.tp)[at.head_group * m : (at.head_group + 1) * m]
        yield total(vocab) * model.hidden_size * e
    if at.pp == layout.pp - 1:
        yield mb.size * workload.outputs * model.hidden_size * e


def _of_call(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> Iterator[int]:
    """Bytes that arrive in each call: hidden states from the stage before, in layers, and logits."""
    at = layout.coordinates(rank)
    if layout.weights == "gathered":
        calls = prefill_calls(layout, workload, at.dp)
        for call in calls:
            yield from _of_weights(model, layout, workload, rank, call.micro_batch)
        ends = [c.micro_batch.size * workload.outputs for c in calls]
        shapes = [_gathered_shapes(model, layout, workload, rank, c.micro_batch) for c in calls]
        several = list(zip(shapes, ends, strict=True))
    else:
        different = dict(_stationary_shapes(model, layout, workload, rank))
        several = [([shape], shape.ending) for shape in different.values()]
    for shapes, ending in several:
        for shape in shapes:
            yield from _of_layers(shape)
        if at.pp > 0:
            yield sum(shape.hidden_bytes for shape in shapes)
        if at.pp == layout.pp - 1 and layout.tp > 1:
            yield ending * model.vocab_size * workload.element_bytes


def communication_buffer_bytes(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> int:
    """Bytes of the largest tensor that a collective of a prefill writes out of place, or that a message brings."""
    at = layout.coordinates(rank)
    tokens = len(replica_rows(layout, workload.batch)[at.dp]) * INDEX_BYTES if at.pp == 0 and layout.pp > 1 else 0
    return max(tokens, 0, *_of_call(model, layout, workload, rank))
