"""Decode through peers' memory: which steps may go that way, and how much of a rank's memory its peers read."""

from headgrid.layout.batching import MicroBatch, decode_micro_batches
from headgrid.layout.layout import Layout
from headgrid.layout.shards import head_shard
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

LARGEST_BYTES = 4 << 20
"""Hidden states of a step beyond which NCCL's all-reduce, which sends each byte less often, is as fast."""
WIDEST = 1 << 14
"""Hidden size that one program of the kernel adds and norms at once."""
ROOMS = 2
"""Parts of a sum that are there at a time: each half of a layer has its own (`runtime.peers.Sums`)."""


def suits(model: ModelSpec, layout: Layout, sequences: int, element_bytes: int) -> bool:
    """Whether decode steps of at most so many sequences can go through peers' memory.

    It takes plain sums (no biases or norms behind them) of replicated hidden states, steps of up to `LARGEST_BYTES`, a
    power of two of ranks (the kernels index them as a block of Triton's), and no fp64: the kernels compute in fp32.
    """
    plain = model.norm_placement == "pre" and not {"o", "mlp"} & set(model.linear_bias)
    plain = plain and (layout.residual, layout.output) == ("replicated", "reduce")
    small = 0 < sequences * model.hidden_size * element_bytes <= LARGEST_BYTES and model.hidden_size <= WIDEST
    return plain and small and element_bytes <= 4 and layout.tp > 1 and not layout.tp & (layout.tp - 1)


def exchanges(model: ModelSpec, layout: Layout) -> bool:
    """Whether the exchange goes that way, too: that of whole slices of one width, without norms."""
    shards = [head_shard(model, layout, 0, j) for j in range(layout.num_dim_slices)]
    even = len({width for shard in shards for width in (shard.qk_width, len(shard.v_channels))}) == 1
    return layout.exchange in ("batch", "gather", "sequence") and even and not model.qk_norm


def _exchange_bytes(
    model: ModelSpec, layout: Layout, micro_batch: MicroBatch, head_group: int, element_bytes: int
) -> int:
    """Of one decode micro-batch: a slice's projections of all its sequences, and unless K and V stay apart (`gather`)
    whole heads' outputs; with `batch` of the most sequences that a slice has, with `sequence` of all, in fp32, and with
    their log-sum-exps.
    """
    shard, b = head_shard(model, layout, head_group, 0), micro_batch.size
    whole, sent_bytes = len(shard.v_channels) * layout.num_dim_slices, b * shard.row_width * element_bytes
    if layout.exchange == "gather":
        return sent_bytes
    if layout.exchange == "sequence":
        return sent_bytes + b * len(shard.heads) * (whole + 1) * 4
    return sent_bytes + max(map(len, micro_batch.parts)) * len(shard.heads) * whole * element_bytes


def peers_bytes(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> int:
    """Bytes that `rank` keeps where its peers read them while an engine lives; 0 where decode goes through collectives.

    On GPUs that reach each other's memory; on others nothing is kept. Where a step has more sequences than the pads of
    signals have words for, the exchange goes through collectives and these are more than are kept.
    """
    at, e = layout.coordinates(rank), workload.element_bytes
    plan = decode_micro_batches(layout, workload, at.dp)
    most = max((mb.size for mb in plan), default=0)
    if not suits(model, layout, most, e):
        return 0
    exchanged = (_exchange_bytes(model, layout, mb, at.head_group, e) for mb in {*plan} if exchanges(model, layout))
    return ROOMS * most * model.hidden_size * e + sum(exchanged)
