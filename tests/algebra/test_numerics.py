"""Rounding: error bounds of partial scores, sums that cancel, empty shards, and how far 16-bit attention may be off."""

from collections.abc import Sequence

import pytest
import torch
from plain import Heads, draw, run, summed_by, transported_in, truth
from simulated import Part, Ranks
from torch import Tensor
from torch.nn import functional as F

from headgrid.layout.layout import EXCHANGES
from headgrid.reference import relative_error
from headgrid.runtime import attention
from headgrid.runtime.attention import Keys, Queries, Rule

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ALL_PAIRS = Rule(1.0, is_causal=False)
D, S, HEADS = 128, 512, 4
MISSET, MARGIN = 1 / 100, 1.3
FP32_BOUND = 2e-6


def in_rank_order(parts: Sequence[Part]) -> Tensor:
    result = parts[0].x.clone()
    for part in parts[1:]:
        result += part.x
    return result


def reversed_sum(parts: Sequence[Part]) -> Tensor:
    return in_rank_order(parts[::-1])


def tree_sum(parts: Sequence[Part]) -> Tensor:
    sums = [part.x for part in parts]
    while len(sums) > 1:
        sums = [sums[k] + sums[k + 1] if k + 1 < len(sums) else sums[k] for k in range(0, len(sums), 2)]
    return sums[0].clone()


ORDERS = {2: in_rank_order, 3: reversed_sum, 4: tree_sum, 8: tree_sum, 16: reversed_sum}


def scores_of(heads: Heads, m: int, ranks: Ranks) -> Tensor:
    """The runtime's own scores [b H, s, S] before the softmax, summed over m slices."""
    _, kept = run(heads, "scores", m, ALL_PAIRS, ranks)
    results = [torch.cat(each.results, dim=-2) for each in kept]
    assert all(torch.equal(results[0], other) for other in results)
    return results[0]


def flat(x: Tensor) -> Tensor:
    """[b, S, H, d] -> [b H, S, d]."""
    return x.transpose(1, 2).flatten(0, 1)


def product(heads: Heads) -> Tensor:
    return torch.bmm(flat(heads.q), flat(heads.k).transpose(1, 2))


def size(heads: Heads) -> Tensor:
    """|q_i| . |k_j|, the sum of the sizes of all products."""
    return product(Heads(heads.q.abs(), heads.k.abs(), heads.v))


def gamma(terms: int, u: float) -> float:
    return terms * u / (1 - terms * u)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_fp32_sums_stay_within_their_bound(dtype: torch.dtype, ranks: Ranks) -> None:
    """Of partial scores in fp32, whatever the inputs' dtype and the order: gamma_D |q_i|.|k_j| (Higham 2002, 3.1)."""
    checked, worst = 0, 0.0
    for m, order in ORDERS.items():
        heads = draw(m, 1, S, HEADS, HEADS, D, outlier=4.0 if m > 3 else 1.0).to(dtype)
        with summed_by(order):
            actual = scores_of(heads, m, ranks).double()
        wide = heads.to(torch.float64)
        ratio = (actual - product(wide)).abs() / (gamma(D, UNIT[torch.float32]) * size(wide))
        checked, worst = checked + ratio.numel(), max(worst, ratio.max().item())
    assert checked >= 5_000_000  # of each dtype: over 10^7 in all
    assert worst <= 1
    assert worst > MISSET, "a bound a hundred times as small would pass as well: it says nothing"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_transport_stays_within_its_bound(dtype: torch.dtype, ranks: Ranks) -> None:
    """Partial scores rounded to 16 bits before and after every hop: ((1 + u)^m - 1) sum_j |S_j|, and the fp32 term."""
    worst, by_half, u = 0.0, 0, UNIT[dtype]
    for m, order in ORDERS.items():
        heads = draw(m, 1, S // 2, HEADS, HEADS, D).to(torch.float32)
        with summed_by(order), transported_in(dtype):
            actual = scores_of(heads, m, ranks).double()
        wide = heads.to(torch.float64)
        slices = zip(*(x.split(D // m if D % m == 0 else [43, 43, 42], -1) for x in (wide.q, wide.k)), strict=True)
        parts = sum(product(Heads(q, k, k)).abs() for q, k in slices)
        subnormal = m * 2.0**-25 if dtype == torch.float16 else 0.0
        rest = gamma(D, UNIT[torch.float32]) * size(wide) * (1 + u) ** m + subnormal
        error = (actual - product(wide)).abs()
        worst = max(worst, (error / (((1 + u) ** m - 1) * parts + rest)).max().item())
        by_half += int((error > ((1 + u / 2) ** m - 1) * parts + rest).sum())
    assert worst <= 1
    assert by_half, "half the unit roundoff would pass as well: the bound says nothing"


def cancelling(dtype: torch.dtype) -> Heads:
    """Partial scores of +-1.28e6 that cancel: fp16 ends at 65504."""
    b, s, d = 2, 6, 64
    signs = torch.tensor([1.0, -1.0, 1.0]).repeat(2)[None, :, None, None]
    k = torch.cat([torch.full((d // 2,), 200.0), torch.full((d // 2,), -200.0)]).expand(b, s, 1, d)
    return Heads((200 * signs).expand(b, s, 1, d), k, draw(1, b, s, 1, 1, d).v).to(dtype)


def test_sums_that_cancel(ranks: Ranks) -> None:
    heads, rule = cancelling(torch.float16), Rule(1.0)
    kept = run(heads, "scores", 2, rule, ranks)[1]
    assert all(torch.equal(result, torch.zeros_like(result)) for each in kept for result in each.results)
    with transported_in(torch.float16):
        narrow, _ = run(heads, "scores", 2, rule, ranks)
    assert not narrow.isfinite().any()
    for exchange in EXCHANGES:
        out = run(heads, exchange, 2, rule, ranks, decoded=2)[0]
        assert relative_error(out, truth(heads, rule)) < UNIT[torch.float16]


def part_of(heads: Heads, keys: Keys, positions: Sequence[int], stop: int) -> tuple[Tensor, Tensor]:
    """What a shard that keeps the positions `keys` before `stop` contributes to one query of each sequence."""
    at = torch.tensor(positions)
    queries, rows = Queries(1, tuple(positions), at, decoding=True), slice(keys.first, stop, keys.stride)
    q = heads.q[torch.arange(len(at)), at][:, None]
    return attention.attend_part(q, heads.k[:, rows], heads.v[:, rows], queries, Rule(0.3), keys)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_empty_shards_count_nothing(dtype: torch.dtype) -> None:
    heads, wide = draw(5, 3, 7, 4, 2, 16).to(dtype), torch.float32
    m, positions = 4, (0, 2, 5)  # position 0: three shards see nothing; 2: one; 5: none
    parts = [part_of(heads, Keys(j, m), positions, 7) for j in range(m)] + [part_of(heads, Keys(9, m), positions, 7)]
    outs, lses = (torch.stack(each) for each in zip(*parts, strict=True))
    empty = torch.tensor([[j > position for position in positions] for j in (0, 1, 2, 3, 9)])
    assert (outs.dtype, lses.dtype) == (wide, wide)
    assert torch.equal(lses.isneginf().all(-1).all(-1), empty) and torch.equal(lses.isneginf().any(-1).any(-1), empty)
    assert not outs[empty].any() and outs.isfinite().all()
    expected = torch.stack([truth(heads, Rule(0.3))[row, at] for row, at in enumerate(positions)])[:, None]
    whole = attention.merge(outs, lses)
    assert relative_error(whole, expected) < FP32_BOUND
    garbage = torch.where(empty[..., None, None, None], torch.full_like(outs, 1e30), outs)
    assert torch.equal(attention.merge(garbage, lses), whole)
    assert relative_error(attention.merge(garbage, lses.nan_to_num(neginf=0.0)), expected) > 1  # it could have counted


def test_all_shards_empty() -> None:
    outs, lses = torch.full((3, 2, 1, 4, 8), 7.0), torch.full((3, 2, 1, 4), float("-inf"))
    assert torch.equal(attention.merge(outs, lses), torch.zeros(2, 1, 4, 8))


def test_far_scores_do_not_overflow_the_merge() -> None:
    """Scores beyond the range of exp, which only differences of them keep finite."""
    outs, lses = torch.arange(8.0).view(2, 1, 1, 1, 4), torch.tensor([1e4, 1e4 + 1.0]).view(2, 1, 1, 1)
    weights = torch.softmax(torch.tensor([0.0, 1.0]), 0).view(2, 1, 1, 1, 1)
    assert relative_error(attention.merge(outs, lses), (outs * weights).sum(0)) < FP32_BOUND


def sdpa(heads: Heads, rule: Rule) -> Tensor:
    """torch's own attention on one device, in the inputs' dtype."""
    q, k, v = (x.transpose(1, 2) for x in (heads.q, heads.k, heads.v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=rule.scale, enable_gqa=True)
    return out.transpose(1, 2)


SHAPES = [(2, 128, 8, 2, 64, 1.0), (3, 128, 4, 4, 96, 4.0), (1, 256, 4, 1, 128, 1.0), (2, 192, 4, 2, 128, 2.0)]
FEW = [(exchange, m) for exchange in EXCHANGES for m in (2, 4)] + [("none", 1)]
DECODED, SEEDS = 16, 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("exchange", "m"), FEW)
def test_error_beside_plain_attention(exchange: str, m: int, dtype: torch.dtype, ranks: Ranks) -> None:
    """16 bits: at most 1.3 times the error of torch's attention; fp32: 2e-6. In prefill, and in decode."""
    for seed, (*shape, outlier) in enumerate(SHAPES * SEEDS):
        heads, rule = draw(seed, *shape, outlier=outlier).to(dtype), Rule(shape[-1] ** -0.5)  # type: ignore[arg-type]
        expected, plain = truth(heads, rule), sdpa(heads, rule)
        out = run(heads, exchange, m, rule, ranks, decoded=DECODED)[0]
        for phase, at in (("prefill", slice(0, -DECODED)), ("decode", slice(-DECODED, None))):
            error, noise = (relative_error(x[:, at], expected[:, at]) for x in (out, plain))
            bound = MARGIN * noise if dtype.itemsize == 2 else FP32_BOUND
            assert error <= bound, f"{phase} of {shape}: {error:.3g}, bound {bound:.3g}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounded_scores_are_over_the_bar(dtype: torch.dtype, ranks: Ranks) -> None:
    """Negative control: partial scores that travel in 16 bits, which the bar must reject."""
    *shape, _ = SHAPES[2]
    heads, rule = draw(3, *shape, outlier=4.0).to(dtype), Rule(shape[-1] ** -0.5)  # type: ignore[arg-type]
    with transported_in(dtype):
        out = run(heads, "scores", 16, rule, ranks)[0]
    expected = truth(heads, rule)
    assert relative_error(out, expected) > MARGIN * relative_error(sdpa(heads, rule), expected)
