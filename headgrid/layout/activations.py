"""Predicted peak of activations: the largest set of tensors that a rank's prefill holds at any one moment, and the
largest one that a collective writes.

The tensors are those of `runtime.stage`, step by step, weights, cache and the engine's permanent buffers excluded.
Letters as in `held`.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from headgrid.layout.batching import Call, MicroBatch, attended_rows, pieces, prefill_calls, query_share, replica_rows
from headgrid.layout.held import INDEX_BYTES, Shape, exchange_bytes, gathered, token_shares, turned_pairs
from headgrid.layout.layout import Layout
from headgrid.layout.shards import head_shard, head_shards, stage_layers
from headgrid.layout.span import Span, balanced, total
from headgrid.layout.traffic import gathered_weights, over_heads
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

_SENDS_IN_FLIGHT = 2


def _norm_bytes(shape: Shape, tokens: int) -> int:
    """A layer norm: its result with mean and reciprocal deviation, or with a copy in the model's dtype."""
    width, r = shape.model.hidden_size, shape.residual
    weights, out, stats = 2 * width * r if r != shape.e else 0, tokens * width * r, 2 * tokens * max(4, r)
    return weights + out + max(stats, tokens * width * shape.e if r != shape.e else 0)


def _enter_bytes(shape: Shape) -> int:
    """Normed hidden states, and those of all tokens that are gathered from them."""
    size = shape.own_tokens * shape.model.hidden_size * shape.e
    if shape.layout.residual == "sharded":
        width = shape.model.hidden_size * shape.e
        size += gathered([tokens * width for tokens in token_shares(shape)], shape.tp_index)
    return max(size, _norm_bytes(shape, shape.own_tokens))


def _leave_bytes(shape: Shape) -> int:
    """A product of all tokens, and the own tokens' share of its sum; uneven parts are received, then added up."""
    if shape.layout.residual != "sharded":
        return shape.whole_bytes
    shares, mine = token_shares(shape), shape.own_tokens * shape.model.hidden_size
    if len(set(shares)) == 1:
        return shape.whole_bytes + mine * shape.e
    copy = shape.e if shape.wide != shape.e else 0
    return shape.whole_bytes + mine * (len(shares) * shape.e + shape.wide + copy)


def _embed_bytes(shape: Shape) -> int:
    """The embedding of a call, its result included, beside the token ids."""
    local, bools = shape.tokens * INDEX_BYTES, shape.tokens
    own = shape.own_tokens * shape.model.hidden_size
    sizes = [local + 3 * bools, local + bools + _leave_bytes(shape)]
    if shape.residual != shape.e:
        summed = own * shape.e if shape.layout.residual == "sharded" else 0
        sizes.append(local + bools + shape.whole_bytes + summed + own * shape.residual)
    if shape.model.positions == "learned":
        sizes.append(local + bools + own * shape.residual + (shape.whole_bytes if shape.rows > 1 else 0))
    return max(sizes)


def _head_norm_bytes(shape: Shape) -> Iterator[int]:
    """RMS norms of heads; the projections are held throughout."""
    e, wide, held = shape.e, shape.wide, shape.projections_bytes
    q, k = (shape.tokens * heads * shape.own.qk_width for heads in (shape.heads, shape.kv_heads))
    q_sums, k_sums = shape.tokens * shape.heads * wide, shape.tokens * shape.kv_heads * wide
    widened = wide if wide != e else 0
    yield held + max(q * (wide + widened), q * wide + q_sums)
    yield held + q_sums + max(k * (wide + widened), k * wide + k_sums)
    sums = held + 3 * (q_sums + k_sums)
    # x in fp32, times its size, back in the model's dtype, times the weight: two of these at a time
    yield sums + q * (2 * wide if widened else 2 * e)
    yield sums + q * e + k * (2 * wide if widened else 2 * e)
    yield sums + (q + k) * e + shape.projections_bytes


def _rotation_bytes(shape: Shape) -> int:
    """Three products of half the turned channels at a time, in place; behind norms of heads in a copy."""
    held = shape.projections_bytes * (2 if shape.model.qk_norm else 1)
    return held + 3 * shape.tokens * shape.heads * shape.pairs * shape.e


def _output_bytes(shape: Shape) -> Iterator[int]:
    model, layout, e, out = shape.model, shape.layout, shape.e, shape.out_bytes
    if layout.output == "reduce":
        yield out + _leave_bytes(shape)
        return
    widths = [len(owner.heads) * len(owner.v_channels) for owner in head_shards(model, layout)]
    columns = [len(span) for span in balanced(model.hidden_size, layout.tp)]
    mine = shape.tokens * columns[shape.tp_index] * e
    for beside, own, sizes in ((0, out, widths), (out, mine, columns)):
        yield beside + own + _concat_bytes([shape.tokens * size * e for size in sizes], shape.tp_index)
    yield out + shape.tokens * sum(widths) * e + mine


def _concat_bytes(sizes: list[int], index: int) -> int:
    """An all-gather of columns and the copy that puts them side by side."""
    return max(gathered(sizes, index), 2 * sum(sizes)) if len(sizes) > 1 else sum(sizes)


def _layer_bytes(shape: Shape) -> Iterator[int]:
    """Bytes held beside the residual at each step of a layer."""
    yield _enter_bytes(shape)
    yield shape.whole_bytes + shape.projections_bytes
    if shape.model.qk_norm:
        yield from _head_norm_bytes(shape)
    yield _rotation_bytes(shape)
    yield from exchange_bytes(shape)
    yield from _output_bytes(shape)
    units = shape.tokens * shape.units * shape.e
    yield shape.whole_bytes + units
    yield units + _leave_bytes(shape)


def _steps_bytes(shape: Shape, windows: frozenset[int]) -> int:
    """The most that a layer holds beside the residual, whatever its window."""
    return max(max(_layer_bytes(replace(shape, window=window))) for window in windows)


def _last_bytes(shape: Shape) -> int:
    """Last tokens picked and normed."""
    width, n = shape.model.hidden_size, shape.ending
    picked = (
        0 if n == shape.tokens and shape.layout.residual != "sharded" else n * (width * shape.residual + INDEX_BYTES)
    )
    more = n * width * shape.residual + INDEX_BYTES * n if shape.layout.residual == "sharded" else 0
    return picked + max(more, _norm_bytes(shape, n))


def _logits_bytes(model: ModelSpec, layout: Layout, index: int, rows: int, e: int) -> int:
    """Normed last tokens, this rank's part of their logits, and whole logits."""
    sizes = [rows * len(span) * e for span in balanced(model.vocab_size, layout.tp)]
    return rows * model.hidden_size * e + sizes[index] + _concat_bytes(sizes, index)


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
    at, mb = layout.coordinates(rank), call.micro_batch
    rows = mb.parts[at.slice] if layout.exchange == "batch" else None
    mine = range(rows.start, rows.stop) if rows is not None else mb.rows()
    return replace(
        _place(model, layout, rank, workload.element_bytes),
        rows=mb.size,
        attended=attended_rows(layout, mb, at.slice),
        positions=call.positions,
        lengths=() if model.is_causal else tuple(map(workload.length, mine)),
        ending=len(call.ending(workload)),
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
    most = [hidden + _steps_bytes(shape, spans)]
    if first:
        most.append(_embed_bytes(shape))
    if last and shape.ending:
        logits = _logits_bytes(shape.model, shape.layout, shape.tp_index, shape.ending, shape.e)
        most.append(hidden + max(_last_bytes(shape), logits))
    return _Held(hidden, shape.tokens * INDEX_BYTES, starts + max(most))


def _gathered_shapes(model: ModelSpec, layout: Layout, workload: Workload, rank: int, mb: MicroBatch) -> list[Shape]:
    """A slice's own sequences on the gathered weights of its head group, piece by piece."""
    mine, shape = mb.parts[layout.coordinates(rank).slice], _place(model, layout, rank, workload.element_bytes)
    shapes: list[Shape] = []
    for rows, positions in pieces(len(mine), workload):
        span = rows.shift(mine.start)
        ending = len(Call(MicroBatch((span,)), positions).ending(workload))
        lengths = () if model.is_causal else tuple(map(workload.length, range(span.start, span.stop)))
        piece = replace(shape, rows=len(span), attended=len(span), positions=positions, ending=ending, lengths=lengths)
        shapes.append(piece)
    return shapes


def _gathered(model: ModelSpec, layout: Layout, workload: Workload, rank: int, mb: MicroBatch) -> _Held:
    """Two layers of gathered weights, this one's and the next one's, beside the work on one piece."""
    at, e = layout.coordinates(rank), workload.element_bytes
    shapes = _gathered_shapes(model, layout, workload, rank, mb)
    hidden, starts = sum(shape.hidden_bytes for shape in shapes), sum(shape.rows for shape in shapes) * INDEX_BYTES
    parts = {name: [size * e for size in sizes] for name, sizes in gathered_weights(model, layout, rank).items()}
    layer, under_way = sum(map(sum, parts.values())), sum(gathered(sizes, at.slice) for sizes in parts.values())
    spans, layers = _windows(model, layout, rank), stage_layers(model, layout)[at.pp]
    steps = max((_steps_bytes(shape, spans) for shape in set(shapes)), default=0)
    most = [
        hidden + _assembling_bytes(parts, at.slice),
        hidden + layer + (under_way if len(layers) > 1 else 0) + steps,
    ]
    if at.pp == 0:
        most.append(under_way + _gathered_embed_bytes(model, layout, rank, shapes, e))
    if at.pp == layout.pp - 1:
        last = sum(shape.ending for shape in shapes) * model.hidden_size * e
        logits = _logits_bytes(model, layout, layout.tp_index(at), mb.size, e)
        most.append(hidden + 2 * last + logits)
    return _Held(hidden, mb.size * workload.seq * INDEX_BYTES, starts + max(most))


def _assembling_bytes(parts: dict[str, list[int]], index: int) -> int:
    """Slices that have arrived become whole weights, one after the other; all but `up` and norms are copied."""
    held, most = sum(gathered(sizes, index) for sizes in parts.values()), 0
    for name, sizes in parts.items():
        most = max(most, held)
        held -= gathered(sizes, index) - sum(sizes)
        if name in ("qkv", "qkv bias", "o", "down"):
            most = max(most, held + sum(sizes))
    return most


def _gathered_embed_bytes(model: ModelSpec, layout: Layout, rank: int, shapes: list[Shape], e: int) -> int:
    """The head group's part of the vocabulary, and hidden states piece by piece, then put together."""
    at, m = layout.coordinates(rank), layout.num_dim_slices
    vocab = balanced(model.vocab_size, layout.tp)[at.head_group * m : (at.head_group + 1) * m]
    sizes = [len(span) * model.hidden_size * e for span in vocab]
    most, done = gathered(sizes, at.slice), 0
    for shape in shapes:
        most = max(most, sum(sizes) + done + _embed_bytes(shape))
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
    calls = list(_held(model, layout, workload, rank))
    for k, call in enumerate(calls):
        held = call.most
        if stage == 0:
            held += call.ids
        elif k + 1 < len(calls):
            held += calls[k + 1].hidden  # its receive is posted before this call computes
        if stage < layout.pp - 1:
            held += sum(sent.hidden for sent in calls[max(0, k - _SENDS_IN_FLIGHT) : k])
        peak = max(peak, held)
    return peak


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
    yield from (sum(sizes) * e for sizes in gathered_weights(model, layout, rank).values())
    if at.pp == 0:
        vocab = balanced(model.vocab_size, layout.tp)[at.head_group * m : (at.head_group + 1) * m]
        yield total(vocab) * model.hidden_size * e
    if at.pp == layout.pp - 1:
        yield mb.size * model.hidden_size * e


def _of_call(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> Iterator[int]:
    """Bytes that arrive in each call: hidden states from the stage before, in layers, and logits."""
    at = layout.coordinates(rank)
    if layout.weights == "gathered":
        calls = prefill_calls(layout, workload, at.dp)
        for call in calls:
            yield from _of_weights(model, layout, workload, rank, call.micro_batch)
        several = [(_gathered_shapes(model, layout, workload, rank, c.micro_batch), c.micro_batch.size) for c in calls]
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
