"""Predicted peak of activations: the largest set of tensors that a rank's prefill holds at any one moment.

The tensors are those of `runtime.stage` and `runtime.exchange`, step by step, weights, cache and the engine's
permanent buffers excluded. Where shards are of unequal size, the copies that an all-gather by all-to-all sends are
not counted. Letters as there: T tokens of the micro-batch, D hidden size, w and u the channels of a
Q/K head and of a V head in this slice, d those of whole heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from headgrid.layout.batching import attended_rows, chunks, prefill_micro_batches, replica_rows
from headgrid.layout.layout import Coordinates, Layout
from headgrid.layout.shards import HeadShard, head_shard, parameters, stage_layers
from headgrid.layout.span import balanced, total
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

_SENDS_IN_FLIGHT = 2
_PLAIN_SCORES = 1 << 22
_ID_BYTES = 8


def plain_rows(heads: int, queries: int, keys: int) -> int:
    """Queries whose scores the unfused CPU attention holds at a time: at most 4 Mi elements, at least one query."""
    return max(1, min(queries, _PLAIN_SCORES // (heads * keys)))


@dataclass(frozen=True, slots=True)
class _Call:
    """One micro-batch on one rank: elements (or bytes, where named so) of everything in its forward pass."""

    model: ModelSpec
    layout: Layout
    own: HeadShard
    tokens: int
    attended: int
    seq: int
    mlp: int
    columns: int
    element_bytes: int
    rotations: int = 1

    @property
    def hidden(self) -> int:
        return self.tokens * self.model.hidden_size

    @property
    def q_and_k(self) -> int:
        return (len(self.own.heads) + len(self.own.kv_heads)) * self.own.qk_width

    @property
    def projections(self) -> int:
        return self.tokens * (self.q_and_k + len(self.own.kv_heads) * len(self.own.v_channels))

    @property
    def out(self) -> int:
        return self.tokens * len(self.own.heads) * len(self.own.v_channels)

    @property
    def stats_bytes(self) -> int:
        """Mean and reciprocal deviation that layer norm returns beside its result, in fp32 or wider."""
        return 2 * self.tokens * max(4, self.element_bytes)


def _attend_bytes(call: _Call, qk_width: int, v_width: int) -> int:
    """The result, and what computing it holds: the log-sum-exp of a fused kernel, or scores where there is none."""
    heads, e = len(call.own.heads), call.element_bytes
    out = call.attended * heads * v_width * e
    if qk_width == v_width:
        return out + call.attended * heads * max(4, e)
    wide, grouped = max(4, e), heads != len(call.own.kv_heads)
    rows = plain_rows(heads, call.seq, call.seq)
    keys = heads * call.seq * (qk_width + v_width) * (wide if wide > e else e if grouped else 0)
    queries = heads * rows * qk_width * (wide if wide > e else 0)
    return out + keys + queries + 2 * heads * rows * call.seq * wide


def _exchange_bytes(call: _Call) -> Iterator[int]:
    """Beside the residual; the projections are held throughout."""
    e, d, heads, kv = call.element_bytes, call.model.head_dim, len(call.own.heads), len(call.own.kv_heads)
    projections, u = call.projections * e, len(call.own.v_channels)
    if call.layout.exchange in ("none", "independent"):
        yield projections + _attend_bytes(call, call.own.qk_width, u)
    elif call.layout.exchange == "gather":
        mine, whole = call.tokens * call.q_and_k * e, call.tokens * (heads + kv) * d * e
        yield projections + mine + whole
        yield projections + 2 * whole
        yield projections + whole + _attend_bytes(call, d, u)
    else:
        rows, result = call.attended * (heads + 2 * kv) * d * e, call.attended * heads * d * e
        yield projections + 2 * rows
        yield projections + rows + _attend_bytes(call, d, d)
        yield projections + 2 * result
        yield projections + result + call.out * e


def _output_bytes(call: _Call) -> Iterator[int]:
    e = call.element_bytes
    if call.layout.output == "reduce" or call.layout.tp == 1:
        yield (call.out + call.hidden) * e
        return
    heads = call.tokens * call.model.num_heads * call.model.head_dim
    yield (call.out + 2 * heads) * e
    yield (call.out + heads + call.columns) * e
    yield (call.out + call.columns + 2 * call.hidden) * e


def _rotation_bytes(call: _Call) -> int:
    if call.model.positions != "rotary":
        return 0
    widest = max(len(call.own.heads), len(call.own.kv_heads)) * call.own.qk_width
    return (call.projections + 3 * call.tokens * (widest // call.rotations) // 2) * call.element_bytes


def _steps_bytes(call: _Call) -> Iterator[int]:
    """Bytes held beside the residual at each step of a layer."""
    e = call.element_bytes
    yield call.hidden * e + call.stats_bytes
    yield (call.hidden + call.projections) * e
    yield _rotation_bytes(call)
    yield from _exchange_bytes(call)
    yield from _output_bytes(call)
    yield (call.hidden + call.mlp) * e


def _calls(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> Iterator[_Call]:
    at = layout.coordinates(rank)
    own, index = head_shard(model, layout, at.head_group, at.slice), layout.tp_index(at)
    units = len(balanced(model.mlp_hidden_size, layout.tp)[index])
    columns = len(balanced(model.hidden_size, layout.tp)[index])
    for mb in prefill_micro_batches(layout, workload, at.dp):
        tokens, attended = mb.size * workload.seq, attended_rows(layout, mb, at.slice) * workload.seq
        yield _Call(
            model, layout, own, tokens, attended, workload.seq, tokens * units, tokens * columns, workload.element_bytes
        )


@dataclass(frozen=True, slots=True)
class _Held:
    """Bytes of one micro-batch on one rank: its residual, its token ids, and the most that is held beside them."""

    hidden: int
    ids: int
    steps: int


def _stationary(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> Iterator[_Held]:
    for call in _calls(model, layout, workload, rank):
        yield _Held(call.hidden * call.element_bytes, call.tokens * _ID_BYTES, max(_steps_bytes(call)))


def _matrices(model: ModelSpec, layout: Layout, rank: int, *, biases: bool) -> dict[str, int]:
    """Elements of a head group's matrices in one layer, with the biases that are cut like them or without."""
    at = layout.coordinates(rank)
    sizes = {"qkv": 0, "o": 0, "up": 0, "down": 0}
    for j in range(layout.num_dim_slices):
        shards = parameters(model, layout, layout.rank(Coordinates(at.dp, at.pp, at.head_group, j)))
        prefix = f"layers.{stage_layers(model, layout)[at.pp].start}."
        for name, shard in shards.items():
            part, kind = name.split(".")[-2:]
            if (
                name.startswith(prefix)
                and part != "norm"
                and (kind == "weight" or (biases and part in ("q", "k", "v", "up")))
            ):
                sizes["qkv" if part in ("q", "k", "v") else part] += shard.num_elements
    return sizes


def _gathered(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> Iterator[_Held]:
    """Two layers of gathered weights (this one's and the next one's) beside the work on one chunk of sequences.

    Slices of unequal size need a further copy of the own slice for each peer, which is not counted.
    """
    at, e = layout.coordinates(rank), workload.element_bytes
    whole = replace(layout, num_dim_slices=1, exchange="none", weights="stationary")
    own = head_shard(model, whole, at.head_group, 0)
    sizes = {name: size * e for name, size in _matrices(model, layout, rank, biases=True).items()}
    layer, units = sum(sizes.values()), sizes["up"] // e // (model.hidden_size + model.linear_bias)
    layers = min(2, len(stage_layers(model, layout)[at.pp]))
    for mb in prefill_micro_batches(layout, workload, at.dp):
        rows = len(mb.parts[at.slice])
        largest = max((len(piece) for piece in chunks(rows, workload)), default=0) * workload.seq
        call = _Call(model, whole, own, largest, largest, workload.seq, largest * units, 0, e, layout.num_dim_slices)
        assembling = layer + max(sizes["qkv"], sizes["o"], sizes["down"])
        computing = layers * layer + max(_steps_bytes(call))
        hidden, ids = rows * workload.seq * model.hidden_size * e, mb.size * workload.seq * _ID_BYTES
        yield _Held(hidden, ids, max(assembling, computing))


def activations_peak_bytes(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> int:
    """Peak bytes that `rank` allocates in a prefill, beyond weights, cache, logits and tokens.

    Micro-batches never grow (`balanced` puts longer parts first), so the first few hold the peak.
    """
    stage, peak = layout.coordinates(rank).pp, 0
    sequence = _gathered if layout.weights == "gathered" else _stationary
    calls = list(islice(sequence(model, layout, workload, rank), _SENDS_IN_FLIGHT + 2))
    for k, call in enumerate(calls):
        held = call.hidden + call.steps
        if stage == 0:
            held += call.ids
        elif k + 1 < len(calls):
            held += calls[k + 1].hidden  # its receive is posted before this call computes
        if stage < layout.pp - 1:
            held += sum(sent.hidden for sent in calls[max(0, k - _SENDS_IN_FLIGHT) : k])
        peak = max(peak, held)
    return peak


def communication_buffer_bytes(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> int:
    """Bytes of the largest tensor that a collective of a prefill writes out of place."""
    sizes = [0]
    at = layout.coordinates(rank)
    if layout.weights == "gathered":
        sizes += [size * workload.element_bytes for size in _matrices(model, layout, rank, biases=False).values()]
        table = balanced(model.vocab_size, layout.tp)[at.head_group * layout.num_dim_slices :][: layout.num_dim_slices]
        sizes += [total(table) * model.hidden_size * workload.element_bytes] if at.pp == 0 else []
    for call in islice(_calls(model, layout, workload, rank), 1):
        e, heads, kv, d = call.element_bytes, len(call.own.heads), len(call.own.kv_heads), model.head_dim
        if layout.exchange == "gather":
            sizes.append(call.tokens * (heads + kv) * d * e)
        elif layout.exchange == "batch" and layout.weights == "stationary":
            sizes += [call.attended * (heads + 2 * kv) * d * e, call.out * e]
        if layout.output == "concat" and layout.tp > 1:
            sizes += [call.tokens * model.num_heads * d * e, call.hidden * e]
        if at.pp > 0:
            sizes.append((call.attended * model.hidden_size if layout.weights == "gathered" else call.hidden) * e)
        elif layout.pp == 1 and layout.tp > 1:
            sizes.append(call.tokens // call.seq * model.vocab_size * e)
    if at.pp == 0 and layout.pp > 1:
        sizes.append(len(replica_rows(layout, workload.batch)[at.dp]) * _ID_BYTES)
    return max(sizes)
