"""Attention of one rank, without communication: over keys just computed, or over the cache.

Letters: b sequences, s queries of each, S keys; H query heads, K KV heads (K divides H); d and u the widths of a Q/K
head and of a V head. "Wide" is fp32, or fp64 where the inputs are: scores are never rounded to 16 bits.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from headgrid.layout.batching import visible
from headgrid.layout.held import plain_rows
from headgrid.layout.span import Span
from headgrid.runtime.kernels import fused, split_kv

_FAST_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, slots=True)
class Rule:
    """What a layer's attention is. `window` keys are seen by a query, itself included; 0 and 0.0 mean none."""

    scale: float
    is_causal: bool = True
    window: int = 0
    softcap: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Nothing but scores, a causal mask or none, and a softmax."""
        return not self.window and not self.softcap


@dataclass(frozen=True, slots=True)
class Queries:
    """Where the queries of a call stand: `count` of each sequence, those of sequence i from position `starts[i]` on.

    In prefill all start at the same position. In decode each has its own, and `at` [b] (int64, on the device) says the
    same to kernels, so that a CUDA graph serves every step: `starts` must not be read there. `lengths` are prompts' own
    lengths, for bidirectional models.
    """

    count: int
    starts: tuple[int, ...]
    at: Tensor
    decoding: bool = False
    lengths: tuple[int, ...] | None = None

    @property
    def start(self) -> int:
        """Where prefill's queries start."""
        return self.starts[0] if self.starts else 0

    @property
    def cached(self) -> bool:
        """Whether earlier positions are in the cache."""
        return self.decoding or any(self.starts)

    def rows(self, rows: Span) -> "Queries":
        """The same for some of the sequences."""
        lengths = self.lengths and self.lengths[rows.start : rows.stop]
        starts, at = self.starts[rows.start : rows.stop], self.at[rows.start : rows.stop]
        return replace(self, starts=starts, at=at, lengths=lengths)

    def of(self, table: Tensor) -> Tensor:
        """Rows of a table by position: [s, ...] in prefill, [b, s, ...] in decode."""
        if not self.decoding:
            return table[self.start : self.start + self.count]
        return table.index_select(0, self.at)[:, None]

    def part(self, span: Span) -> "Queries":
        """Some of the queries of each sequence."""
        return replace(self, count=len(span), starts=tuple(start + span.start for start in self.starts))


@dataclass(frozen=True, slots=True)
class Keys:
    """Positions of keys: the t-th is at `first` + `stride` t."""

    first: int = 0
    stride: int = 1

    def before(self, position: int) -> int:
        """How many are at earlier positions."""
        return len(range(self.first, position, self.stride))


ALL = Keys()


def attend(q: Tensor, k: Tensor, v: Tensor, queries: Queries, rule: Rule) -> Tensor:
    """q [b, s, H, d], k [b, S, K, d], v [b, S, K, u], keys from position 0 on; returns [b, s, H, u].

    Keys behind a sequence's last query need not have been written.
    """
    if not len(q):
        return nothing(q, k, v)
    if queries.decoding and q.is_cuda and q.dtype != torch.float64:
        return attend_one(q, k, v, queries, rule)
    if not rule.is_plain or len(set(queries.starts)) > 1 or _ragged(queries, k.shape[1]):
        return _plain(q, k, v, queries, rule)
    if rule.is_causal:
        k, v = (x[:, : queries.start + queries.count] for x in (k, v))
    if not q.is_cuda and (k.shape[-1] != v.shape[-1] or 1 < queries.count < k.shape[1]):
        return _plain(q, k, v, queries, rule)
    return _fused(q, k, v, rule)


def attend_one(q: Tensor, k: Tensor, v: Tensor, queries: Queries, rule: Rule, out: Tensor | None = None) -> Tensor:
    """`attend` for one query of each sequence on a GPU, to `out` [b, 1, H, u] where that is given."""
    options = {"window": rule.window, "softcap": rule.softcap, "out": out}
    return split_kv.decode(q, k, v, queries.at, rule.scale, **options)[0]


def _fused(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """torch's own attention; causal queries are the last ones of the keys."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    s, length = q.shape[2], k.shape[2]
    square = rule.is_causal and s == length and s > 1
    mask = causal_lower_right(s, length) if rule.is_causal and 1 < s < length else None
    with sdpa_kernel(_FAST_FIRST, set_priority=True) if q.is_cuda else nullcontext():
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=square, scale=rule.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(1, 2)


def _ragged(queries: Queries, keys: int) -> bool:
    return queries.lengths is not None and any(length < keys for length in queries.lengths)


def nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What attention gives for no sequences, [0, s, H, u], with a gradient (none) for each input."""
    empty = q.new_empty(*q.shape[:3], v.shape[3])
    return empty + (q.sum() + k.sum() + v.sum()) if q.requires_grad else empty


def attend_part(q: Tensor, k: Tensor, v: Tensor, queries: Queries, rule: Rule, keys: Keys) -> tuple[Tensor, Tensor]:
    """Attention to some of the keys, those at the positions `keys`: wide output [b, s, H, u] and log-sum-exp [b, s, H].

    A query that sees none of them gets 0 and -inf. `merge` puts parts together (Milakov, Gimelshein 2018).
    """
    if queries.decoding and q.is_cuda and q.dtype != torch.float64:
        return attend_part_one(q, k, v, queries, rule, keys)
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = q.new_zeros(*q.shape[:3], v.shape[3], dtype=wide), q.new_full(q.shape[:3], float("-inf"), dtype=wide)
    _by_blocks(q, k, v, queries, rule, keys, out, lse)
    return out, lse


def attend_part_one(
    q: Tensor, k: Tensor, v: Tensor, queries: Queries, rule: Rule, keys: Keys, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """`attend_part` for one query of each sequence on a GPU, to `into` where that is given: [b, 1, H, u], [b, 1, H]."""
    options = {"window": rule.window, "softcap": rule.softcap, "first": keys.first, "stride": keys.stride}
    out, lse = into or (None, None)
    return split_kv.decode(q, k, v, queries.at, rule.scale, **options, part=True, out=out, lse=lse)


def merge(outs: Tensor, lses: Tensor) -> Tensor:
    """Attention to all keys from parts: outs [m, b, s, H, u], lses [m, b, s, H] -> [b, s, H, u], all wide.

    A part with -inf counts nothing, whatever finite output it has; where all are -inf the result is 0.
    """
    top = lses.amax(0).clamp_min(torch.finfo(lses.dtype).min)
    weights = torch.exp(lses - top)
    share = weights / weights.sum(0).clamp_min(torch.finfo(lses.dtype).tiny)
    return (outs * share[..., None]).sum(0)


def _plain(q: Tensor, k: Tensor, v: Tensor, queries: Queries, rule: Rule) -> Tensor:
    """Attention by its definition, for what torch's own does not compute: windows, caps, ragged batches; on a CPU also
    V's heads narrower than K's, where its fallback holds several copies of all scores.
    """
    return _by_blocks(q, k, v, queries, rule, ALL, q.new_empty(*q.shape[:3], v.shape[3]), None)


def _by_blocks(
    q: Tensor, k: Tensor, v: Tensor, queries: Queries, rule: Rule, keys: Keys, out: Tensor, lse: Tensor | None
) -> Tensor:
    """`out` [b, s, H, u] filled in, and `lse` [b, s, H] if wanted: then queries may see no key, and are left out.

    16-bit inputs are computed in fp32. Scores are held for one sequence and `plain_rows` queries at a time.
    """
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    last, blocks = keys.first + keys.stride * k.shape[1], []
    for i, first in enumerate(queries.starts):
        seen = visible(Span(first, first + queries.count), last, rule.window, rule.is_causal)
        low, high = keys.before(seen.start), min(keys.before(seen.stop), k.shape[1])
        if low == high:
            continue
        mine, values = (
            (x[i] if group == 1 else x[i].repeat_interleave(group, 1)).transpose(0, 1).to(wide)
            for x in (k[:, low:high], v[:, low:high])
        )
        at = torch.arange(low, high, device=q.device) * keys.stride + keys.first
        for start in range(0, queries.count, step := plain_rows(heads, queries.count, high - low)):
            rows = q[i, start : start + step].transpose(0, 1).to(wide)
            scores = capped(torch.bmm(rows, mine.transpose(1, 2)).mul_(rule.scale), rule)
            positions = torch.arange(first + start, first + start + rows.shape[1], device=q.device)
            hidden = hidden_keys(positions, at, rule, queries.lengths[i] if queries.lengths else None)
            if hidden is not None:
                scores.masked_fill_(hidden, float("-inf"))
            del hidden
            block = slice(start, start + rows.shape[1])
            if lse is None:
                weights = torch.softmax(scores, dim=-1)
            else:
                weights, sums = _guarded_softmax(scores)
                lse[i, block] = sums.transpose(0, 1)
            del scores
            result = torch.bmm(weights, values).transpose(0, 1)
            del weights  # or the next block would hold both
            if result.requires_grad:  # each write into `out` would cost a copy of its whole gradient
                blocks.append(result.to(q.dtype))
            else:
                out[i, block] = result
            del result
        del mine, values
    return torch.cat(blocks).view(out.shape) if blocks else out


def _guarded_softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [H, s, S] and log-sum-exp [H, s] of scores; zeros and -inf where all are -inf."""
    limits = torch.finfo(scores.dtype)
    top = scores.amax(-1, keepdim=True).clamp_min(limits.min)
    weights = torch.exp(scores - top)
    norm = weights.sum(-1, keepdim=True)
    return weights.div_(norm.clamp_min(limits.tiny)), (top + torch.log(norm))[..., 0]


def capped(scores: Tensor, rule: Rule) -> Tensor:
    """Scores with their soft cap, if there is one."""
    return torch.tanh(scores / rule.softcap) * rule.softcap if rule.softcap else scores


def hidden_keys(queries: Tensor, keys: Tensor, rule: Rule, length: int | None = None) -> Tensor | None:
    """Which keys a query must not see, by positions [..., s] and [S]: bool [..., s, S]; None where it sees all."""
    if not rule.is_causal:
        return None if length is None else (keys >= length).expand(len(queries), -1)
    hidden = keys > queries[..., None]
    return hidden.logical_or_(keys <= queries[..., None] - rule.window) if rule.window else hidden


def store(k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor], queries: Queries, keys: Keys = ALL) -> None:
    """Write keys [b, s, K, d] and values [b, s, K, u] of these queries' positions into the cache [b, S, K, ...], which
    keeps the positions `keys` only.
    """
    if fused.usable(k):
        fused.store(k, v, cache, queries.at, first=keys.first, stride=keys.stride)
        return
    for new, kept in zip((k, v), cache, strict=True):
        _stored(new, kept, queries, keys)


def _stored(new: Tensor, cache: Tensor, queries: Queries, keys: Keys) -> None:
    if not queries.decoding:
        first = keys.before(queries.start)
        offset = keys.first + keys.stride * first - queries.start
        mine = new[:, offset :: keys.stride]
        cache[:, first : first + mine.shape[1]] = mine
        return
    if not cache.shape[1]:
        return
    position = queries.at
    slot = ((position - keys.first) // keys.stride).clamp_(0, cache.shape[1] - 1)
    rows = torch.arange(len(new), device=new.device)
    if keys.stride > 1:  # not a branch by position: a CUDA graph serves every step
        mine = ((position - keys.first) % keys.stride == 0) & (position >= keys.first)
        cache[rows, slot] = torch.where(mine[:, None, None], new[:, 0], cache[rows, slot])
    else:
        cache[rows, slot] = new[:, 0]
