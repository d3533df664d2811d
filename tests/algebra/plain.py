"""Exchanges alone, on given q, k and v of any dtype: no projections, no rotation, no output."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import simulated
import torch
from simulated import Part, Ranks, axes
from torch import Tensor

from headgrid.layout.batching import cached_positions
from headgrid.layout.layout import Layout
from headgrid.layout.span import balanced
from headgrid.runtime.attention import Queries, Rule
from headgrid.runtime.collectives import Axis, Issued
from headgrid.runtime.exchange import EXCHANGES, Core, Slices


@dataclass(frozen=True, slots=True)
class Heads:
    """Whole heads: q [b, S, H, d], k and v [b, S, K, d]."""

    q: Tensor
    k: Tensor
    v: Tensor

    def to(self, dtype: torch.dtype) -> "Heads":
        """The same in another dtype."""
        return Heads(*(x.to(dtype) for x in (self.q, self.k, self.v)))


def draw(seed: int, b: int, s: int, heads: int, kv_heads: int, d: int, outlier: float = 1.0) -> Heads:
    """Normal numbers in fp64; two channels of q and k are `outlier` times as large."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, s, h, d, generator=generator).double() for h in (heads, kv_heads, kv_heads))
    for x in (q, k):
        x[..., [1, d // 2]] *= outlier
    return Heads(q, k, v)


class Kept:
    """An observer that keeps the results of one kind of collective."""

    def __init__(self, kind: str) -> None:
        self.kind, self.results = kind, []

    def before(self, issued: Issued) -> None:
        """Nothing."""

    def after(self, issued: Issued, result: Tensor) -> None:
        """Keep it."""
        if issued.kind == self.kind:
            self.results.append(result.clone())


def run(
    heads: Heads, exchange: str, m: int, rule: Rule, ranks: Ranks, *, decoded: int = 0
) -> tuple[Tensor, list[Kept]]:
    """Attention [b, S, H, d] by m slices, the last `decoded` positions in steps of a decode; and each rank's sums."""
    (b, length, h, d), kv = heads.q.shape, heads.k.shape[2]
    widths, rows = [len(span) for span in balanced(d, m)], [len(span) for span in balanced(b, m)]
    layout = Layout(num_dim_slices=m, exchange=exchange)  # type: ignore[arg-type]
    meshes, kept = axes(layout, ranks), [Kept("all_reduce") for _ in range(m)]

    def job(j: int) -> Tensor:
        axis, slices = meshes[j].tp_slice, Slices(h, kv, tuple(widths), tuple(widths), j)
        axis.observers.append(kept[j])
        mine = slice(sum(rows[:j]), sum(rows[: j + 1])) if exchange == "batch" else slice(0, b)
        parts = [x.split(widths, dim=-1)[j].flatten(2) for x in (heads.q, heads.k, heads.v)]
        projections, cache = torch.cat(parts, dim=-1), new_cache(heads, layout, j, mine)
        outs = []
        for start, count in [(0, length - decoded)] + [(length - decoded + step, 1) for step in range(decoded)]:
            queries = Queries(count, (start,) * b, torch.full((b,), start), decoding=start > 0)
            core = Core(rule, rows_of(queries, mine), cache)
            now = projections[:, start : start + count].contiguous()
            outs.append(EXCHANGES[exchange](slices, axis, rows, now, core).unflatten(-1, (h, -1)))
        return torch.cat(outs, dim=1)

    with torch.no_grad():
        return torch.cat(ranks.run([lambda j=j: job(j) for j in range(m)]), dim=-1), kept


def rows_of(queries: Queries, rows: slice) -> Queries:
    """Those of some sequences."""
    return Queries(queries.count, queries.starts[rows], queries.at[rows], queries.decoding)


def new_cache(heads: Heads, layout: Layout, j: int, rows: slice) -> tuple[Tensor, Tensor]:
    """Slice j's cache, full of NaN."""
    (_, length, kv, d), whole = heads.k.shape, layout.exchange in ("none", "batch", "sequence")
    positions, width = cached_positions(layout, length, j), len(balanced(d, layout.num_dim_slices)[j])
    b = len(heads.k[rows])
    k = heads.k.new_full((b, positions, kv, d if whole or layout.exchange == "gather" else width), torch.nan)
    return k, heads.v.new_full((b, positions, kv, d if whole else width), torch.nan)


def truth(heads: Heads, rule: Rule) -> Tensor:
    """Causal attention [b, S, H, d] by its definition, in fp64."""
    wide, group = heads.to(torch.float64), heads.q.shape[2] // heads.k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (wide.k, wide.v))
    scores = torch.einsum("bqhd,bkhd->bhqk", wide.q, k) * rule.scale
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores.masked_fill(hidden, -torch.inf), -1), v)


@contextmanager
def summed_by(order: Callable[[Sequence[Part]], Tensor]) -> Iterator[None]:
    """Sums over ranks in another order."""
    with patch.object(simulated, "_sum", order):
        yield


@contextmanager
def transported_in(dtype: torch.dtype) -> Iterator[None]:
    """All-reduces whose parts travel, and are added up, in a narrower dtype."""
    right = Axis.all_reduce

    def narrow(axis: Axis, x: Tensor, *, alike: bool = True) -> Tensor:
        return right(axis, x.to(dtype), alike=alike).to(x.dtype)

    with patch.object(Axis, "all_reduce", narrow):
        yield
