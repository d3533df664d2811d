"""Predicted floating-point operations: a multiplication and an addition for each term of a matrix product."""

from headgrid.layout.batching import attended_rows, decode_micro_batches, prefill_micro_batches
from headgrid.layout.layout import Coordinates, Layout
from headgrid.layout.shards import head_shard, parameters
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload


def _linears(model: ModelSpec, layout: Layout, rank: int) -> tuple[int, int]:
    """Elements of the rank's weight matrices used for every token, and of those used for last positions only."""
    matrices = {k: v for k, v in parameters(model, layout, rank).items() if v.cols is not None}
    tables = ("embedding.weight", "positions.weight", "head.weight")
    per_token = sum(shard.num_elements for name, shard in matrices.items() if name not in tables)
    last = layout.coordinates(rank).pp == layout.pp - 1
    head = matrices.get("head.weight", matrices.get("embedding.weight") if model.tied_embeddings else None)
    return per_token, head.num_elements if last and head else 0


def _attention(model: ModelSpec, layout: Layout, rank: int, rows: int, queries: int, keys: int) -> int:
    """Of one layer: scores and their product with V, without counting the causal mask as saved work."""
    at = layout.coordinates(rank)
    own = head_shard(model, layout, at.head_group, at.slice)
    qk = own.qk_width if layout.exchange in ("none", "independent") else model.head_dim
    v = model.head_dim if layout.exchange == "batch" else len(own.v_channels)
    return 2 * rows * len(own.heads) * queries * keys * (qk + v)


def _layers(model: ModelSpec, layout: Layout, rank: int) -> int:
    return sum(name.endswith("attention.q.weight") for name in parameters(model, layout, rank))


def prefill_flops(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> int:
    """Operations that `rank` issues in one prefill of the batch, the upper half of the causal square included."""
    if layout.weights == "gathered":
        return _gathered_flops(model, layout, workload, rank)
    per_token, head = _linears(model, layout, rank)
    flops = 0
    for mb in prefill_micro_batches(layout, workload, layout.coordinates(rank).dp):
        rows = attended_rows(layout, mb, layout.coordinates(rank).slice)
        flops += 2 * per_token * mb.size * workload.seq + 2 * head * mb.size
        flops += _layers(model, layout, rank) * _attention(model, layout, rank, rows, workload.seq, workload.seq)
    return flops


def _gathered_flops(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> int:
    """The whole group's weights for the slice's own sequences; logits as with stationary weights."""
    at = layout.coordinates(rank)
    peers = [layout.rank(Coordinates(at.dp, at.pp, at.head_group, j)) for j in range(layout.num_dim_slices)]
    per_token = sum(_linears(model, layout, peer)[0] for peer in peers)
    head, flops = _linears(model, layout, rank)[1], 0
    for mb in prefill_micro_batches(layout, workload, at.dp):
        rows = attended_rows(layout, mb, layout.coordinates(rank).slice)
        flops += 2 * per_token * rows * workload.seq + 2 * head * mb.size
        flops += _layers(model, layout, rank) * _attention(model, layout, rank, rows, workload.seq, workload.seq)
    return flops


def decode_flops(model: ModelSpec, layout: Layout, workload: Workload, rank: int, keys: int) -> int:
    """Operations that `rank` issues in one decode step in which every query attends to `keys` positions."""
    per_token, head = _linears(model, layout, rank)
    flops = 0
    for mb in decode_micro_batches(layout, workload, layout.coordinates(rank).dp):
        rows = attended_rows(layout, mb, layout.coordinates(rank).slice)
        flops += 2 * (per_token + head) * mb.size
        flops += _layers(model, layout, rank) * _attention(model, layout, rank, rows, 1, keys)
    return flops


def model_flops(model: ModelSpec, workload: Workload) -> int:
    """Operations that a prefill of the batch needs at least: causal attention counted half (for MFU)."""
    single = Layout()
    full = prefill_flops(model, single, workload, 0)
    square = model.num_layers * _attention(model, single, 0, workload.batch, workload.seq, workload.seq)
    return full - square // 2
