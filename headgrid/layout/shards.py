"""Which rank owns which part of which tensor.

Rank (i, j) owns the query heads and KV heads of group i; of these, channels slice j of Q and K (whole RoPE pairs),
channels slice j of V (contiguous), the matching columns of W_O, 1/P of the MLP's units and 1/P of the vocabulary.
No matrix is stored twice, with three exceptions: m = 1 with more ranks than KV heads copies KV heads, as vLLM does;
with `dp-attention` every rank owns all heads, so that the attention weights are stored n times; and tied embeddings are
on the first and on the last pipeline stage.
"""

from dataclasses import dataclass

from headgrid.layout.layout import Layout
from headgrid.layout.span import Span, Spans, balanced, merged, total
from headgrid.spec.model import ModelSpec


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part of a global tensor: the rows, and of a matrix the columns, in local order."""

    shape: tuple[int, ...]
    rows: Spans
    cols: Spans | None = None

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the stored part."""
        return (total(self.rows),) if self.cols is None else (total(self.rows), total(self.cols))

    @property
    def num_elements(self) -> int:
        """Elements of the stored part."""
        return total(self.rows) * (1 if self.cols is None else total(self.cols))


@dataclass(frozen=True, slots=True)
class HeadShard:
    """The part of one attention layer that rank (i, j) owns.

    `qk_channels` are channels of a head, as spans in local order; `v_channels` is contiguous.
    """

    heads: Span
    kv_heads: Span
    qk_channels: Spans
    v_channels: Span

    @property
    def qk_width(self) -> int:
        """Channels per Q or K head held here."""
        return total(self.qk_channels)

    @property
    def row_width(self) -> int:
        """Elements per token of Q, K and V together."""
        qk = (len(self.heads) + len(self.kv_heads)) * self.qk_width
        return qk + len(self.kv_heads) * len(self.v_channels)


def head_groups(model: ModelSpec, layout: Layout) -> tuple[tuple[Span, Span], ...]:
    """Query heads and KV heads of each head group. Only where n > K is a KV head in more than one group, and with
    `dp-attention`, where every group has all heads.
    """
    n, k = layout.num_head_groups, model.num_kv_heads
    if layout.attention == "dp-attention":
        return ((Span(0, model.num_heads), Span(0, k)),) * n
    heads = balanced(model.num_heads, n)
    if n <= k:
        return tuple(zip(heads, balanced(k, n), strict=True))
    return tuple((span, Span(i * k // n, i * k // n + 1)) for i, span in enumerate(heads))


def qk_channels(model: ModelSpec, num_slices: int) -> tuple[Spans, ...]:
    """Channels of a Q or K head in each slice, covering all of them once.

    With rotary positions (rotate-half: channel c turns with c + r/2, r the channels that turn) slices consist of
    whole pairs, first halves before second halves, so that a slice is rotated like a small head; channels that do not
    turn follow, longer spans in the last slices, where there are fewer pairs. Otherwise slices are contiguous.
    """
    r = model.rotated_dim
    pairs, still = balanced(r // 2, num_slices), [len(span) for span in balanced(model.head_dim - r, num_slices)]
    if r:
        still.reverse()
    slices: list[Spans] = []
    start = r
    for span, width in zip(pairs, still, strict=True):
        slices.append(merged((span, span.shift(r // 2), Span(start, start + width))))
        start += width
    return tuple(slices)


def head_shard(model: ModelSpec, layout: Layout, i: int, j: int) -> HeadShard:
    """What rank (i, j) owns of one attention layer."""
    heads, kv_heads = head_groups(model, layout)[i]
    m = layout.num_dim_slices
    return HeadShard(heads, kv_heads, qk_channels(model, m)[j], balanced(model.head_dim, m)[j])


def head_shards(model: ModelSpec, layout: Layout) -> tuple[HeadShard, ...]:
    """`head_shard` of every tp rank, in tp order (slice varies fastest)."""
    n, m = layout.num_head_groups, layout.num_dim_slices
    return tuple(head_shard(model, layout, i, j) for i in range(n) for j in range(m))


def stage_layers(model: ModelSpec, layout: Layout) -> Spans:
    """The layers of each pipeline stage."""
    return balanced(model.num_layers, layout.pp)


def _channels_of(heads: Span, channels: Spans, head_dim: int) -> Spans:
    """Rows of a projection matrix [heads x head_dim, ...] that hold these channels of these heads."""
    return merged(span.shift(head * head_dim) for head in range(heads.start, heads.stop) for span in channels)


def _attention(model: ModelSpec, layout: Layout, rank: int) -> dict[str, Shard]:
    at, d, hidden = layout.coordinates(rank), model.head_dim, Span(0, model.hidden_size)
    mine = head_shard(model, layout, at.head_group, at.slice)
    q_size, kv_size = model.num_heads * d, model.num_kv_heads * d
    rows = {
        "q": (q_size, _channels_of(mine.heads, mine.qk_channels, d)),
        "k": (kv_size, _channels_of(mine.kv_heads, mine.qk_channels, d)),
        "v": (kv_size, _channels_of(mine.kv_heads, (mine.v_channels,), d)),
    }
    shards = {f"{name}.weight": Shard((size, len(hidden)), spans, (hidden,)) for name, (size, spans) in rows.items()}
    if layout.output == "reduce":
        out_rows, out_cols = (hidden,), _channels_of(mine.heads, (mine.v_channels,), d)
    else:  # W_O by output columns; its inputs in the order in which the gathered heads arrive
        out_rows = (balanced(hidden, layout.tp)[layout.tp_index(at)],)
        owners = head_shards(model, layout)
        out_cols = merged(s for o in owners for s in _channels_of(o.heads, (o.v_channels,), d))
    shards["o.weight"] = Shard((len(hidden), q_size), out_rows, out_cols)
    if "qkv" in model.linear_bias:
        shards |= {f"{name}.bias": Shard((size,), spans) for name, (size, spans) in rows.items()}
    if "o" in model.linear_bias:
        shards["o.bias"] = Shard((len(hidden),), out_rows)
    if model.qk_norm:
        shards |= {f"{name}_norm.weight": Shard((d,), mine.qk_channels) for name in ("q", "k")}
    return shards


def _mlp(model: ModelSpec, layout: Layout, rank: int) -> dict[str, Shard]:
    hidden, size = Span(0, model.hidden_size), model.mlp_hidden_size
    units = balanced(size, layout.tp)[layout.tp_index(layout.coordinates(rank))]
    ups = ("gate", "up") if model.gated_mlp else ("up",)
    shards = {f"{name}.weight": Shard((size, len(hidden)), (units,), (hidden,)) for name in ups}
    shards["down.weight"] = Shard((len(hidden), size), (hidden,), (units,))
    if "mlp" in model.linear_bias:
        shards |= {f"{name}.bias": Shard((size,), (units,)) for name in ups}
        shards["down.bias"] = Shard((len(hidden),), (hidden,))
    return shards


def _norm(model: ModelSpec, name: str) -> dict[str, Shard]:
    kinds = ("weight", "bias") if model.norm == "layer" else ("weight",)
    return {f"{name}.{kind}": Shard((model.hidden_size,), (Span(0, model.hidden_size),)) for kind in kinds}


def _embeddings(model: ModelSpec, table: Shard) -> dict[str, Shard]:
    """The vocabulary's part, and what is added to it, whole on every rank."""
    shards, hidden = {"embedding.weight": table}, Span(0, model.hidden_size)
    rows = {"positions": model.max_positions if model.positions == "learned" else 0, "token_types": model.token_types}
    for name, size in rows.items():
        if size:
            shards[f"{name}.weight"] = Shard((size, len(hidden)), (Span(0, size),), (hidden,))
    return shards | (_norm(model, "embedding.norm") if model.embedding_norm else {})


def parameters(model: ModelSpec, layout: Layout, rank: int) -> dict[str, Shard]:
    """Every tensor that `rank` stores, by its global name, in the order of the forward pass."""
    at, width = layout.coordinates(rank), model.hidden_size
    vocab = balanced(model.vocab_size, layout.tp)[layout.tp_index(at)]
    table = Shard((model.vocab_size, width), (vocab,), (Span(0, width),))
    first, last = at.pp == 0, at.pp == layout.pp - 1
    result: dict[str, Shard] = {}
    if first:
        result |= _embeddings(model, table)
    elif last and model.tied_embeddings:
        result["embedding.weight"] = table
    layers = stage_layers(model, layout)[at.pp]
    parts = {"attention": _attention(model, layout, rank), "mlp": _mlp(model, layout, rank)}  # alike in every layer
    for layer in range(layers.start, layers.stop):
        for part, shards in parts.items():
            for norm in model.norms:
                result |= _norm(model, f"layers.{layer}.{part}.{norm}")
            result |= {f"layers.{layer}.{part}.{name}": shard for name, shard in shards.items()}
    if last and model.has_final_norm:
        result |= _norm(model, "final.norm")
    if last and model.head == "vocabulary" and not model.tied_embeddings:
        result["head.weight"] = table
    return result


_STACKS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


def stacks(shards: dict[str, Shard]) -> dict[str, tuple[str, ...]]:
    """The tensors that a rank really holds, and the named ones that each consists of, one below the other.

    Matrices with the same input are multiplied at once: W_Q, W_K and W_V, and the gate and the up matrix of an MLP.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in shards:
        stem, part, kind = ("", *name.rsplit(".", 2))[-3:]
        stored = name, (name,)
        for stack, parts in _STACKS.items():
            names = tuple(f"{stem}.{each}.{kind}" for each in parts)
            if part in parts and names[0] in shards:
                stored = f"{stem}.{stack}.{kind}", names
        found.setdefault(*stored)
    return found


@dataclass(frozen=True, slots=True)
class Cell:
    """One rank's place in the partition, for drawings and tables."""

    rank: int
    dp: int
    pp: int
    head_group: int
    slice: int
    heads: Span
    kv_heads: Span
    channels: Spans
    layers: Span


def partition(model: ModelSpec, layout: Layout) -> tuple[Cell, ...]:
    """Which heads, channels (of Q and K) and layers every rank owns."""
    layers = stage_layers(model, layout)
    cells: list[Cell] = []
    for rank in range(layout.ranks):
        at = layout.coordinates(rank)
        own = head_shard(model, layout, at.head_group, at.slice)
        cells.append(
            Cell(rank, at.dp, at.pp, at.head_group, at.slice, own.heads, own.kv_heads, own.qk_channels, layers[at.pp])
        )
    return tuple(cells)
