"""What the m slices of a head group do so that attention is exact. One exchange is one function in one table.

Letters: b sequences and s positions of the micro-batch; H, K query and KV heads of this head group; d the head dim;
w_r and u_r the channels of a Q/K head and of a V head in slice r, each summing to d over the slices.
An exchange gets the projections of this slice, [b, s, H w_j + K w_j + K u_j], and returns the attention output of
this slice, [b, s, H u_j]. `rows` are the numbers of sequences of the micro-batch that each slice attends to, where
they are divided. `core` stores K and V in the cache and computes attention for what it is given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headgrid.layout.batching import query_share, score_blocks
from headgrid.layout.span import Span, Spans, total
from headgrid.runtime import attention
from headgrid.runtime.attention import ALL, Keys, Queries, Rule
from headgrid.runtime.collectives import Axis


@dataclass(frozen=True, slots=True)
class Core:
    """Attention of one layer for one call: its rule, its queries, and the cache's K and V [b, S, K, ...], if any."""

    rule: Rule
    queries: Queries
    cache: tuple[Tensor, Tensor] | None

    def store(self, k: Tensor, v: Tensor, keys: Keys = ALL) -> None:
        """Keep k and v [b, s, K, ...] of the queries' positions, or of these those at `keys`."""
        if self.cache is not None:
            attention.store(k, v, self.cache, self.queries, keys)

    def seen(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that the queries may attend to: those just computed, or where there are earlier ones the
        cache's.
        """
        if not self.queries.cached:
            return k, v
        assert self.cache is not None
        return self.cache

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v, then attend to all there is: q [b, s, H, d] -> [b, s, H, u]."""
        self.store(k, v)
        return attention.attend(q, *self.seen(k, v), self.queries, self.rule)

    def attend_stored(self, q: Tensor, out: Tensor) -> None:
        """Attend to all that is in the cache, in a step of decode on a GPU: q [b, 1, H, d] -> out [b, 1, H, u]."""
        assert self.cache is not None
        attention.attend_one(q, *self.cache, self.queries, self.rule, out)

    def attend_kept(self, q: Tensor, keys: Keys, into: tuple[Tensor, Tensor]) -> None:
        """The same to a cache of the positions `keys` only: q [b, 1, H, d] -> wide [b, 1, H, u] and sums [b, 1, H]."""
        assert self.cache is not None
        attention.attend_part_one(q, *self.cache, self.queries, self.rule, keys, into)


@dataclass(frozen=True, slots=True)
class Slices:
    """Local numbers of heads and the widths of all slices; `index` is this rank's slice."""

    heads: int
    kv_heads: int
    qk_widths: tuple[int, ...]
    v_widths: tuple[int, ...]
    index: int

    @property
    def row_widths(self) -> list[int]:
        """Elements per token of the projections in each slice: H w_r + K w_r + K u_r."""
        return [
            (self.heads + self.kv_heads) * w + self.kv_heads * u
            for w, u in zip(self.qk_widths, self.v_widths, strict=True)
        ]

    def kv_width(self, r: int) -> int:
        """Elements per token of K and V in slice r."""
        return self.kv_heads * (self.qk_widths[r] + self.v_widths[r])

    def join_kv(self, gathered: Tensor, b: int, s: int) -> tuple[Tensor, Tensor]:
        """k [b, s, K, d] and v [b, s, K, d] from the flat K and V of all slices."""
        widths = [self.kv_width(r) for r in range(len(self.qk_widths))]
        pairs = [
            part.view(b, s, width).split([self.kv_heads * w, self.kv_heads * u], dim=-1)
            for part, width, w, u in zip(
                gathered.split([b * s * width for width in widths]), widths, self.qk_widths, self.v_widths, strict=True
            )
        ]
        ks, vs = ([x.unflatten(-1, (self.kv_heads, -1)) for x in part] for part in zip(*pairs, strict=True))
        return torch.cat(ks, dim=-1), torch.cat(vs, dim=-1)

    def split(self, projections: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views q [b, s, H, w_r], k [b, s, K, w_r], v [b, s, K, u_r] of slice r's projections [b, s, ...]."""
        w, u = self.qk_widths[r], self.v_widths[r]
        q, k, v = projections.split([self.heads * w, self.kv_heads * w, self.kv_heads * u], dim=-1)
        return (
            q.unflatten(-1, (self.heads, w)),
            k.unflatten(-1, (self.kv_heads, w)),
            v.unflatten(-1, (self.kv_heads, u)),
        )

    def join(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """q [b, s, H, d], k [b, s, K, d], v [b, s, K, d] from the projections [b, s, ...] of all slices."""
        if self.qk_widths == self.v_widths:  # one copy of contiguous pieces: 3.5 TB/s on an H200, three reach 0.9
            heads = self.heads + 2 * self.kv_heads
            whole = torch.cat([block.unflatten(-1, (heads, -1)) for block in blocks], dim=-1)
            return list(whole.split([self.heads, self.kv_heads, self.kv_heads], dim=2))
        triples = [self.split(block, r) for r, block in enumerate(blocks)]
        return [torch.cat(pieces, dim=-1) for pieces in zip(*triples, strict=True)]


def own_slice(slices: Slices, axis: Axis, rows: Sequence[int], projections: Tensor, core: Core) -> Tensor:
    """No exchange: exact for m = 1. For m > 1 this is the softmax per slice, another function, kept as a control."""
    return core.attend(*slices.split(projections, slices.index)).flatten(2)


def gather(slices: Slices, axis: Axis, rows: Sequence[int], projections: Tensor, core: Core) -> Tensor:
    """All-gather Q and K; V stays sliced, so the result is the slice's columns of softmax(QK^T) V.

    The gathered channels are in slice order, not in the head's: Q and K alike, and a sum does not mind.
    """
    b, s, _ = projections.shape
    heads, w = slices.heads + slices.kv_heads, slices.qk_widths[slices.index]
    mine = projections[..., : heads * w].reshape(-1)
    sizes = [b * s * heads * width for width in slices.qk_widths]
    parts = axis.all_gather(mine, sizes).split(sizes)
    del mine
    qk = torch.cat([part.view(b, s, heads, width) for part, width in zip(parts, slices.qk_widths, strict=True)], dim=-1)
    del parts
    q, k = qk.split([slices.heads, slices.kv_heads], dim=2)
    v = slices.split(projections, slices.index)[2]
    return core.attend(q, k, v).flatten(2)


def batch(slices: Slices, axis: Axis, rows: Sequence[int], projections: Tensor, core: Core) -> Tensor:
    """All-to-all: slices of channels become slices of the batch, and back after attention.

    `rows[r]` sequences of the micro-batch belong to slice r. Sequences are contiguous on one side of each
    all-to-all, so each direction copies once.
    """
    s, widths, mine = projections.shape[1], slices.row_widths, rows[slices.index]
    out_widths = [slices.heads * u for u in slices.v_widths]
    receive = [mine * s * width for width in widths]
    received = axis.all_to_all(projections.view(-1), [n * s * widths[slices.index] for n in rows], receive)
    blocks = [part.view(mine, s, width) for part, width in zip(received.split(receive), widths, strict=True)]
    q, k, v = slices.join(blocks)
    del received, blocks
    out = core.attend(q, k, v)
    del q, k, v
    back = _flat(out.split(list(slices.v_widths), dim=-1))
    del out
    send = [mine * s * width for width in out_widths]
    returned = axis.all_to_all(back, send, [n * s * out_widths[slices.index] for n in rows])
    return returned.view(sum(rows), s, -1)


def _flat(pieces: Sequence[Tensor]) -> Tensor:
    """All elements, piece by piece: copied once, or twice where shapes differ."""
    if len({piece.shape for piece in pieces}) == 1:
        return torch.stack(list(pieces)).view(-1)
    return torch.cat([piece.reshape(-1) for piece in pieces])


def sequence(slices: Slices, axis: Axis, rows: Sequence[int], projections: Tensor, core: Core) -> Tensor:
    """Slice j keeps K and V of positions j, j + m, ...; whatever the batch, the cache is divided evenly.

    From the start of a prompt, queries are divided by position and meet all keys and values, which are gathered. Later
    every slice attends with all queries to the keys it keeps, and the parts are merged by their log-sum-exp.
    """
    if core.queries.cached:
        return _over_cached_positions(slices, axis, projections, core)
    (b, s, _), m, j = projections.shape, axis.size, slices.index
    shares = [query_share(s, m, r) for r in range(m)]
    counts, heads = [total(share) for share in shares], slices.heads
    q, kv = projections.split([heads * slices.qk_widths[j], slices.kv_width(j)], dim=-1)
    send = [b * count * heads * slices.qk_widths[j] for count in counts]
    receive = [b * counts[j] * heads * width for width in slices.qk_widths]
    parts = axis.all_to_all(torch.cat([_at(q, share).reshape(-1) for share in shares]), send, receive).split(receive)
    blocks = zip(parts, slices.qk_widths, strict=True)  # widths by name: a slice may have no queries
    mine = torch.cat([part.view(b, counts[j], heads, width) for part, width in blocks], dim=-1)
    del parts, blocks
    k, v = slices.join_kv(axis.all_gather(kv.reshape(-1), [b * s * slices.kv_width(r) for r in range(m)]), b, s)
    core.store(k, v, Keys(j, m))
    out = _attend_share(mine, k, v, shares[j], core)
    del mine, k, v
    send = [b * counts[j] * heads * u for u in slices.v_widths]
    receive = [b * count * heads * slices.v_widths[j] for count in counts]
    back = _flat(out.split(list(slices.v_widths), dim=-1))
    del out
    returned = axis.all_to_all(back, send, receive).split(receive)
    del back
    width = heads * slices.v_widths[j]
    return _in_order([part.view(b, count, width) for part, count in zip(returned, counts, strict=True)], shares)


def _at(x: Tensor, spans: Spans) -> Tensor:
    """x [b, s, ...] at some positions, [b, total(spans), ...]."""
    return torch.cat([x[:, span.start : span.stop] for span in spans], dim=1) if spans else x[:, :0]


def _in_order(parts: Sequence[Tensor], shares: Sequence[Spans]) -> Tensor:
    """The whole [b, s, ...] from parts [b, total(share), ...]: the inverse of `_at` for shares that cover s."""
    pieces = [
        (span.start, piece)
        for part, share in zip(parts, shares, strict=True)
        for span, piece in zip(share, part.split([len(span) for span in share], dim=1), strict=True)
    ]
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda found: found[0])], dim=1)


def _attend_share(q: Tensor, k: Tensor, v: Tensor, share: Spans, core: Core) -> Tensor:
    """A share of the queries to all keys: q [b, total(share), H, d], k [b, s, K, d], v [b, s, K, d] -> like q."""
    if not share:
        return attention.nothing(q, k, v)
    pieces = zip(share, q.split([len(span) for span in share], dim=1), strict=True)
    return torch.cat([attention.attend(piece, k, v, core.queries.part(span), core.rule) for span, piece in pieces], 1)


def _over_cached_positions(slices: Slices, axis: Axis, projections: Tensor, core: Core) -> Tensor:
    (b, s, _), m, j = projections.shape, axis.size, slices.index
    sizes = [b * s * width for width in slices.row_widths]
    blocks = axis.all_gather(projections.view(-1), sizes).split(sizes)
    q, k, v = slices.join([block.view(b, s, -1) for block in blocks])
    del blocks
    core.store(k, v, Keys(j, m))
    assert core.cache is not None
    out, lse = attention.attend_part(q, *core.cache, core.queries, core.rule, Keys(j, m))
    del q, k, v
    parts = _flat([torch.cat([piece, lse[..., None]], dim=-1) for piece in out.split(list(slices.v_widths), dim=-1)])
    del out, lse
    tokens, u = b * s * slices.heads, slices.v_widths[j]
    received = axis.all_to_all(parts, [tokens * (width + 1) for width in slices.v_widths], [tokens * (u + 1)] * m)
    del parts
    outs, lses = received.view(m, b, s, slices.heads, u + 1).split([u, 1], dim=-1)
    return attention.merge(outs, lses[..., 0]).to(projections.dtype).flatten(2)


def scores(slices: Slices, axis: Axis, rows: Sequence[int], projections: Tensor, core: Core) -> Tensor:
    """All-reduce the partial scores of the slices, in fp32 or wider; nothing else moves, and K and V stay as they are.

    A query's scores are needed against all positions that the cache has room for, or one graph could not serve all
    steps of a decode.
    """
    q, k, v = slices.split(projections, slices.index)
    core.store(k, v)
    k, v = core.seen(k, v)
    queries = core.queries
    if queries.decoding:
        blocks = ((Span(0, 1), k.shape[1]),)
        written = torch.arange(v.shape[1], device=v.device) <= queries.at[:, None]
        v = v.masked_fill(~written[..., None, None], 0)  # what was never written may be NaN, and 0 NaN is NaN
    else:
        blocks = score_blocks(len(q) * slices.heads, queries.start, queries.count, is_causal=core.rule.is_causal)
    return torch.cat([_block(q, k[:, :keys], v[:, :keys], axis, block, core) for block, keys in blocks], dim=1)


def _block(q: Tensor, k: Tensor, v: Tensor, axis: Axis, block: Span, core: Core) -> Tensor:
    """Some of the queries: q [b, s, H, w], k [b, S, K, w], v [b, S, K, u] -> [b, len(block), H u]."""
    (b, _, heads, _), (_, length, kv_heads, u), rows = q.shape, v.shape, len(block)
    wide = torch.promote_types(q.dtype, torch.float32)
    # [b K, (H/K) rows, w]: the query heads that share a KV head meet it in one product
    mine = q[:, block.start : block.stop].transpose(1, 2).reshape(b * kv_heads, -1, q.shape[3]).to(wide)
    keys, values = (x.transpose(1, 2).reshape(b * kv_heads, length, x.shape[3]).to(wide) for x in (k, v))
    partial = torch.bmm(mine, keys.transpose(1, 2)) * core.rule.scale
    summed = attention.capped(axis.all_reduce(partial, alike=False), core.rule).view(b, heads, rows, length)
    del partial
    hidden = _hidden(core, block, length)
    if hidden is not None:
        summed = summed.masked_fill(hidden, float("-inf"))
    out = torch.bmm(torch.softmax(summed, dim=-1).view(b * kv_heads, -1, length), values)
    return out.view(b, heads, rows, u).transpose(1, 2).to(q.dtype).flatten(2)


def _hidden(core: Core, block: Span, length: int) -> Tensor | None:
    """Keys that the block's queries must not see: bool, broadcast to [b, H, rows, S]; None where they see all."""
    queries, device = core.queries, core.queries.at.device
    keys = torch.arange(length, device=device)
    if not core.rule.is_causal:
        own = queries.lengths
        return None if own is None else (keys >= torch.tensor(own, device=device)[:, None])[:, None, None]
    if queries.decoding:
        at = queries.at[:, None]
    else:
        at = torch.arange(block.start, block.stop, device=device)[None] + queries.start
    hidden = attention.hidden_keys(at, keys, core.rule)
    return None if hidden is None else hidden[:, None]


EXCHANGES: dict[str, Callable[[Slices, Axis, Sequence[int], Tensor, Core], Tensor]] = {
    "none": own_slice,
    "independent": own_slice,
    "gather": gather,
    "batch": batch,
    "sequence": sequence,
    "scores": scores,
}
