"""Predicted floating-point operations: a multiplication and an addition for each term of a matrix product."""

from collections.abc import Iterator
from dataclasses import replace

from headgrid.layout.batching import (
    MicroBatch,
    attended_rows,
    cached_positions,
    decode_micro_batches,
    pieces,
    prefill_calls,
    projected_rows,
    query_share,
    score_blocks,
    visible,
)
from headgrid.layout.layout import Coordinates, Layout
from headgrid.layout.shards import head_shard, parameters, stage_layers
from headgrid.layout.span import Span
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload


def _linears(model: ModelSpec, layout: Layout, rank: int) -> tuple[int, int, int]:
    """Elements of the rank's matrices of attention, of the MLP, and of those used for last positions only."""
    matrices = {k: v for k, v in parameters(model, layout, rank).items() if v.cols is not None}
    attention, mlp = (
        sum(shard.num_elements for name, shard in matrices.items() if f".{half}." in name)
        for half in ("attention", "mlp")
    )
    last = layout.coordinates(rank).pp == layout.pp - 1
    head = matrices.get("head.weight", matrices.get("embedding.weight") if model.tied_embeddings else None)
    return attention, mlp, head.num_elements if last and head else 0


def _pairs(model: ModelSpec, layout: Layout, rank: int, rows: int, call: Span, window: int) -> int:
    """Pairs of a query and a key for which a rank computes products, for each of its heads.

    The causal mask saves whole spans of keys only: the upper half of a square is computed.
    """
    j, start = layout.coordinates(rank).slice, call.start
    if layout.exchange == "sequence" and not start:
        shares = query_share(len(call), layout.num_dim_slices, j)
        return rows * sum(len(share) * len(visible(share, len(call), window, model.is_causal)) for share in shares)
    seen = visible(call, call.stop, window, model.is_causal)
    if layout.exchange == "sequence":
        kept = cached_positions(layout, seen.stop, j) - cached_positions(layout, seen.start, j)
        return rows * len(call) * kept
    return rows * len(call) * len(seen)


def _score_pairs(model: ModelSpec, layout: Layout, rank: int, rows: int, call: Span) -> int:
    """As `_pairs` where scores are computed in blocks of queries."""
    heads = len(head_shard(model, layout, layout.coordinates(rank).head_group, 0).heads)
    blocks = score_blocks(rows * heads, call.start, len(call), is_causal=model.is_causal)
    return rows * sum(len(block) * keys for block, keys in blocks)


def _attention(model: ModelSpec, layout: Layout, rank: int, pairs: int) -> int:
    """Of one layer: scores and their product with V."""
    at = layout.coordinates(rank)
    own = head_shard(model, layout, at.head_group, at.slice)
    qk = own.qk_width if layout.exchange in ("none", "independent", "scores") else model.head_dim
    v = model.head_dim if layout.exchange in ("batch", "sequence") else len(own.v_channels)
    return 2 * pairs * len(own.heads) * (qk + v)


def _prefill_attention(model: ModelSpec, layout: Layout, rank: int, rows: int, positions: Span) -> int:
    """Of all layers of the rank's stage, for a call of prefill."""
    layers = stage_layers(model, layout)[layout.coordinates(rank).pp]
    flops = 0
    for layer in range(layers.start, layers.stop):
        if layout.exchange == "scores":
            pairs = _score_pairs(model, layout, rank, rows, positions)
        else:
            pairs = _pairs(model, layout, rank, rows, positions, model.window(layer))
        flops += _attention(model, layout, rank, pairs)
    return flops


def prefill_flops(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> int:
    """Operations that `rank` issues in one prefill of the batch, the upper half of the causal square included."""
    if layout.weights == "gathered":
        return _gathered_flops(model, layout, workload, rank)
    attention, mlp, head = _linears(model, layout, rank)
    flops, at = 0, layout.coordinates(rank)
    for call in prefill_calls(layout, workload, at.dp):
        products = 2 * (attention * projected_rows(layout, call.micro_batch, at) + mlp * call.micro_batch.size)
        flops += products * len(call.positions) + 2 * head * len(call.wanted(workload))
        rows = len(attended_rows(layout, call.micro_batch, at))
        flops += _prefill_attention(model, layout, rank, rows, call.positions)
    return flops


def _gathered_flops(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> int:
    """The whole group's weights for the slice's own sequences; logits as with stationary weights."""
    at = layout.coordinates(rank)
    peers = [layout.rank(Coordinates(at.dp, at.pp, at.head_group, j)) for j in range(layout.num_dim_slices)]
    per_token = sum(sum(_linears(model, layout, peer)[:2]) for peer in peers)
    head, flops = _linears(model, layout, rank)[2], 0
    for call in prefill_calls(layout, workload, at.dp):
        rows = len(call.micro_batch.parts[at.slice])
        flops += 2 * per_token * rows * workload.seq + 2 * head * call.micro_batch.size * workload.outputs
        for some, positions in pieces(layout, rows, workload):
            flops += _prefill_attention(model, layout, rank, len(some), positions)
    return flops


def _decode_pairs(
    model: ModelSpec, layout: Layout, workload: Workload, rank: int, mb: MicroBatch, step: int
) -> Iterator[int]:
    """Of each layer: pairs of a query and a key, each sequence at its own length."""
    at = layout.coordinates(rank)
    layers = stage_layers(model, layout)[at.pp]
    rows = attended_rows(layout, mb, at)
    for layer in range(layers.start, layers.stop):
        if layout.exchange == "scores":
            yield len(rows) * workload.cache_positions
            continue
        ends = [workload.length(row) + step for row in rows]
        yield sum(_pairs(model, layout, rank, 1, Span(end, end + 1), model.window(layer)) for end in ends)


def decode_flops(model: ModelSpec, layout: Layout, workload: Workload, rank: int, step: int) -> int:
    """Operations that `rank` issues in the decode step number `step`, 0 for the first after the prompt."""
    attention, mlp, head = _linears(model, layout, rank)
    flops, at = 0, layout.coordinates(rank)
    for mb in decode_micro_batches(layout, workload, at.dp):
        flops += 2 * (attention * projected_rows(layout, mb, at) + (mlp + head) * mb.size)
        pairs = _decode_pairs(model, layout, workload, rank, mb, step)
        flops += sum(_attention(model, layout, rank, each) for each in pairs)
    return flops


def _masked_pairs_twice(model: ModelSpec, seq: int, window: int) -> int:
    """Twice the pairs of a query and a key that attention skips: half a causal square, and those behind a window."""
    if not model.is_causal:
        return 0
    return seq * seq + ((seq - window) ** 2 if 0 < window < seq else 0)


def model_flops(model: ModelSpec, workload: Workload) -> int:
    """Operations that a prefill of the batch needs at least (for MFU): whole prompts, masked pairs not counted."""
    single, whole = Layout(), replace(workload, chunk_positions=0, prompt_lengths=())
    full, seq = prefill_flops(model, single, whole, 0), workload.seq
    masked_twice = sum(_masked_pairs_twice(model, seq, model.window(layer)) for layer in range(model.num_layers))
    return full - _attention(model, single, 0, workload.batch * masked_twice) // 2


def model_attention_flops(model: ModelSpec, workload: Workload) -> int:
    """Of `model_flops`, what scores and their products with V need; the rest are products with weights."""
    seq = workload.seq
    masked_twice = sum(_masked_pairs_twice(model, seq, model.window(layer)) for layer in range(model.num_layers))
    pairs_twice = 2 * model.num_layers * seq * seq - masked_twice
    return _attention(model, Layout(), 0, workload.batch * pairs_twice) // 2
