"""Predicted peak of activations: the largest set of tensors that a rank's prefill holds at any one moment.

The tensors are those of `runtime.stage` and `runtime.exchange`, step by step, weights, cache and the engine's
permanent buffers excluded. Letters as there: T tokens of the micro-batch, D hidden size, w and u the channels of a
Q/K head and of a V head in this slice, d those of whole heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from headgrid.layout.batching import MicroBatch, prefill_micro_batches, replica_rows
from headgrid.layout.layout import Layout
from headgrid.layout.shards import HeadShard, head_shard
from headgrid.layout.span import balanced
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
    copies = heads * call.seq * (qk_width + v_width) if heads != len(call.own.kv_heads) else 0
    block = plain_rows(heads, call.seq, call.seq) * call.seq
    return out + (copies + 2 * heads * block) * e


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
    return (call.projections + 3 * call.tokens * widest // 2) * call.element_bytes


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
        tokens, attended = mb.size * workload.seq, _attended(layout, mb, at.slice) * workload.seq
        yield _Call(
            model, layout, own, tokens, attended, workload.seq, tokens * units, tokens * columns, workload.element_bytes
        )


def _attended(layout: Layout, micro_batch: MicroBatch, index: int) -> int:
    return len(micro_batch.parts[index]) if layout.exchange == "batch" else micro_batch.size


def activations_peak_bytes(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> int:
    """Peak bytes that `rank` allocates in a prefill, beyond weights, cache, logits and tokens.

    Micro-batches never grow (`balanced` puts longer parts first), so the first few hold the peak.
    """
    stage = layout.coordinates(rank).pp
    calls, peak = list(islice(_calls(model, layout, workload, rank), _SENDS_IN_FLIGHT + 2)), 0
    for k, call in enumerate(calls):
        e = call.element_bytes
        held = call.hidden * e
        if stage == 0:
            held += call.tokens * _ID_BYTES
        elif k + 1 < len(calls):
            held += calls[k + 1].hidden * e  # its receive is posted before this call computes
        if stage < layout.pp - 1:
            held += sum(sent.hidden * e for sent in calls[max(0, k - _SENDS_IN_FLIGHT) : k])
        peak = max(peak, held + max(_steps_bytes(call)))
    return peak


def communication_buffer_bytes(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> int:
    """Bytes of the largest tensor that a collective of a prefill writes out of place."""
    sizes = [0]
    for call in islice(_calls(model, layout, workload, rank), 1):
        e, heads, kv, d = call.element_bytes, len(call.own.heads), len(call.own.kv_heads), model.head_dim
        if layout.exchange == "gather":
            sizes.append(call.tokens * (heads + kv) * d * e)
        elif layout.exchange == "batch":
            sizes += [call.attended * (heads + 2 * kv) * d * e, call.out * e]
        if layout.output == "concat" and layout.tp > 1:
            sizes += [call.tokens * model.num_heads * d * e, call.hidden * e]
        if layout.coordinates(rank).pp > 0:
            sizes.append(call.hidden * e)
        elif layout.pp == 1 and layout.tp > 1:
            sizes.append(call.tokens // call.seq * model.vocab_size * e)
    if layout.coordinates(rank).pp == 0 and layout.pp > 1:
        sizes.append(len(replica_rows(layout, workload.batch)[layout.coordinates(rank).dp]) * _ID_BYTES)
    return max(sizes)
