"""What a forward call holds, in bytes: its attention and the exchange, step by step as `runtime.exchange` takes them.

Letters as there: b sequences, s queries of each, T = b s tokens; H and K query and KV heads; w and u the channels of a
Q/K head and of a V head in this slice, d those of whole heads; e bytes of an element, W of one in fp32 or wider.
Tensors are those that torch operations return; on a CPU, where attention that torch's own cannot do holds its scores.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from headgrid.layout.batching import cached_positions, query_share, score_blocks, token_shares, visible
from headgrid.layout.layout import Layout
from headgrid.layout.shards import HeadShard
from headgrid.layout.span import Span, indices, total
from headgrid.layout.traffic import own_tokens, residual_bytes
from headgrid.spec.model import ModelSpec

_PLAIN_SCORES = 1 << 22
INDEX_BYTES = 8


def plain_rows(heads: int, queries: int, keys: int) -> int:
    """Queries whose scores the unfused CPU attention holds at a time: at most 4 Mi elements, at least one query."""
    return max(1, min(queries, _PLAIN_SCORES // (heads * keys)))


def gathered(sizes: Sequence[int], index: int) -> int:
    """Elements of an all-gather's result, and where parts differ of the copies of the own part that are sent."""
    return sum(sizes) + (sizes[index] * len(sizes) if len(set(sizes)) > 1 else 0)


@dataclass(frozen=True, slots=True)
class Shape:
    """One call on one rank: sizes of everything in its forward pass.

    `owners` are the slices of its head group and `slice` is this rank's; `attended` sequences meet their keys here, and
    `lengths` are those of a bidirectional model's prompts. `pairs` channels are turned together by a rotation.
    """

    model: ModelSpec
    layout: Layout
    tp_index: int
    owners: tuple[HeadShard, ...]
    slice: int
    rows: int
    attended: int
    positions: Span
    lengths: tuple[int, ...]
    ending: int
    units: int
    pairs: int
    e: int
    window: int = 0

    @property
    def own(self) -> HeadShard:
        """This rank's heads and channels."""
        return self.owners[self.slice]

    @property
    def heads(self) -> int:
        """H."""
        return len(self.own.heads)

    @property
    def kv_heads(self) -> int:
        """K."""
        return len(self.own.kv_heads)

    @property
    def qk_widths(self) -> list[int]:
        """w of every slice."""
        return [owner.qk_width for owner in self.owners]

    @property
    def v_widths(self) -> list[int]:
        """u of every slice."""
        return [len(owner.v_channels) for owner in self.owners]

    @property
    def queries(self) -> int:
        """s."""
        return len(self.positions)

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows * self.queries

    @property
    def own_tokens(self) -> int:
        """Tokens whose hidden states this rank holds."""
        return own_tokens(self.layout, self.rows, self.queries, self.tp_index)

    @property
    def wide(self) -> int:
        """W."""
        return max(4, self.e)

    @property
    def residual(self) -> int:
        """Bytes of an element of the hidden states."""
        return residual_bytes(self.layout, self.e)

    @property
    def hidden_bytes(self) -> int:
        """Hidden states of this rank's tokens between the halves of a layer."""
        return self.own_tokens * self.model.hidden_size * self.residual

    @property
    def whole_bytes(self) -> int:
        """Hidden states of all tokens, as products take and give them."""
        return self.tokens * self.model.hidden_size * self.e

    @property
    def projections_bytes(self) -> int:
        """Q, K and V."""
        return self.tokens * self.own.row_width * self.e

    @property
    def out_bytes(self) -> int:
        """What attention gives for this slice."""
        return self.tokens * self.heads * len(self.own.v_channels) * self.e

    @property
    def is_cached(self) -> bool:
        """Whether earlier positions are in the cache."""
        return self.positions.start > 0


def _blocks(shape: Shape, sequences: int, queries: Span, keys: int, w: int, u: int, *, part: bool = False) -> int:
    """Beside its result, attention by its definition: one sequence and `plain_rows` queries at a time.

    `part`: with the log-sum-exp.
    """
    if not keys:
        return 0
    heads, e, wide, grouped = shape.heads, shape.e, shape.wide, shape.heads != shape.kv_heads
    rows = plain_rows(heads, len(queries), keys)
    copies = heads * keys * (w + u) * (wide if wide > e else e if grouped else 0)
    making = copies + (heads * keys * u * e if grouped and wide > e else 0)
    mine = heads * rows * w * (wide if wide > e else 0)
    scores, causal = heads * rows * keys * wide, shape.model.is_causal
    mask = rows * keys * (2 if shape.window else 1) + (INDEX_BYTES * rows if shape.window else 0) if causal else keys
    positions, sums = INDEX_BYTES * rows, heads * rows * wide if part else 0
    again = sequences > 1 or rows < len(queries)  # then those of the block before are there as well
    at_once = max(2 * scores, scores + mask, scores + heads * rows * u * wide, 3 * scores + sums if part else 0)
    at_once += positions + (sums if again else 0)
    if shape.model.attn_logit_softcapping:
        at_once = max(at_once, 3 * scores + (positions + sums if again else 0))
    return max(making, copies + mine + at_once + INDEX_BYTES * keys)


def attend_bytes(shape: Shape, rows: int, queries: Span, w: int, u: int) -> int:
    """Whole attention of some queries: the result and what computing it holds, scores or a kernel's log-sum-exp."""
    if not rows or not len(queries):
        return 0
    count = len(queries)
    out = rows * count * shape.heads * u * shape.e
    seen = visible(queries, shape.positions.stop, shape.window, shape.model.is_causal)
    plain = shape.window or shape.model.attn_logit_softcapping or any(n < shape.positions.stop for n in shape.lengths)
    if plain or w != u or 1 < count < seen.stop:
        return out + _blocks(shape, rows, queries, len(seen), w, u)
    return out + rows * count * shape.heads * shape.wide


def exchange_bytes(shape: Shape) -> Iterator[int]:
    """Beside the residual, of an exchange; the projections are held throughout."""
    steps = {"gather": _gather, "batch": _batch, "sequence": _sequence, "scores": _scores}
    for size in steps.get(shape.layout.exchange, _own_slice)(shape):
        yield shape.projections_bytes + size


def _own_slice(shape: Shape) -> Iterator[int]:
    yield attend_bytes(shape, shape.attended, shape.positions, shape.own.qk_width, len(shape.own.v_channels))


def _gather(shape: Shape) -> Iterator[int]:
    each, d = shape.tokens * (shape.heads + shape.kv_heads) * shape.e, shape.model.head_dim
    sizes = [each * width for width in shape.qk_widths]
    yield sizes[shape.slice] + gathered(sizes, shape.slice)
    yield 2 * each * d
    yield each * d + attend_bytes(shape, shape.attended, shape.positions, d, len(shape.own.v_channels))


def _flat(size: int, widths: Sequence[int]) -> int:
    """Pieces of these widths one after the other: copied twice where they differ."""
    return size if len(set(widths)) == 1 else 2 * size


def _batch(shape: Shape) -> Iterator[int]:
    each, d, heads = shape.attended * shape.queries * shape.e, shape.model.head_dim, shape.heads
    received, result = each * (heads + 2 * shape.kv_heads) * d, each * heads * d
    yield 2 * received
    yield received + attend_bytes(shape, shape.attended, shape.positions, d, d)
    yield result + _flat(result, shape.v_widths)
    yield result + shape.out_bytes


def _sequence(shape: Shape) -> Iterator[int]:
    if shape.is_cached:
        yield from _over_cached_positions(shape)
        return
    m, each, d = len(shape.owners), shape.tokens * shape.e, shape.model.head_dim
    share = query_share(shape.queries, m, shape.slice)
    q, mine = each * shape.heads * shape.own.qk_width, shape.rows * total(share) * shape.heads * d * shape.e
    kv = [each * shape.kv_heads * (w + u) for w, u in zip(shape.qk_widths, shape.v_widths, strict=True)]
    yield 2 * q
    yield q + mine
    yield 2 * mine
    yield mine + kv[shape.slice] + gathered(kv, shape.slice)
    yield mine + 2 * sum(kv)
    done = 0
    for span in share:
        yield mine + sum(kv) + done + attend_bytes(shape, shape.rows, span, d, d)
        done += shape.rows * len(span) * shape.heads * d * shape.e
    yield 2 * mine + sum(kv) + done
    yield mine + _flat(mine, shape.v_widths)
    yield mine + shape.out_bytes
    yield 2 * shape.out_bytes


def _over_cached_positions(shape: Shape) -> Iterator[int]:
    m, d, u, j = len(shape.owners), shape.model.head_dim, len(shape.own.v_channels), shape.slice
    sizes = [shape.tokens * owner.row_width * shape.e for owner in shape.owners]
    yield gathered(sizes, j)
    yield 2 * sum(sizes)
    each = shape.tokens * shape.heads * shape.wide
    seen = visible(shape.positions, shape.positions.stop, shape.window, is_causal=True)
    keys = cached_positions(shape.layout, seen.stop, j) - cached_positions(shape.layout, seen.start, j)
    yield sum(sizes) + each * (d + 1) + _blocks(shape, shape.rows, shape.positions, keys, d, d, part=True)
    yield each * (d + 1) + 2 * each * (d + m)
    yield each * (d + m) + m * each * (u + 1)
    yield m * each * (u + 1) + each * (1 + 2 * m + m * u + u)


def _scores(shape: Shape) -> Iterator[int]:
    b, heads, kv, w, u = shape.attended, shape.heads, shape.kv_heads, shape.own.qk_width, len(shape.own.v_channels)
    done, wide = 0, shape.wide
    viewed = wide == shape.e and (b == 1 or kv == 1)  # heads and sequences are one dim without a copy
    for block, keys in score_blocks(b * heads, shape.positions.start, shape.queries, is_causal=shape.model.is_causal):
        scores, out = b * heads * len(block) * keys * wide, b * len(block) * heads * u * wide
        copies = 0 if viewed else b * keys * kv * (w + u) * wide
        copies += 0 if viewed and (len(block) == 1 or heads == kv) else b * len(block) * heads * w * wide
        mask = len(block) * keys if shape.model.is_causal else b * keys if shape.lengths else 0
        capped = 3 * scores if shape.model.attn_logit_softcapping else 0
        yield done + copies + max(capped, 2 * scores + mask + out)
        done += b * len(block) * heads * u * shape.e
    yield 2 * done


def turned_pairs(model: ModelSpec, owner: HeadShard) -> int:
    """Pairs of channels of a slice that rotary positions turn."""
    return sum(channel < model.rotated_dim // 2 for channel in indices(owner.qk_channels))


def tokens_of_ranks(shape: Shape) -> list[int]:
    """Tokens whose hidden states each of the ranks that share a layer holds, where these are sharded."""
    return [len(span) for span in token_shares(shape.layout, shape.rows, shape.queries)]


def attention_shape(shape: Shape) -> Shape:
    """The call in the attention half of a layer: as it is, or with `dp-attention` this rank's sequences, alone."""
    if shape.layout.attention == "cut":
        return shape
    alone = Layout(residual_dtype=shape.layout.residual_dtype, linears=shape.layout.linears)
    return replace(shape, layout=alone, tp_index=0, rows=shape.attended)
