"""Drawn tokens: the right distribution, the same token however the batch is cut, the candidates of transformers."""

import hashlib
import itertools
import math
import time
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from headgrid.errors import InvalidInput
from headgrid.runtime import sampling as module
from headgrid.runtime.sampling import Sampling, candidates, choose, gumbel, scaled

DRAWS = 20_000
SMALL = torch.tensor([1.0, 0.5, 0.0, -0.5, 2.0, 1.9, -3.0, 0.2, 0.7, -1.0, 1.2, 0.1])
CASES = [
    Sampling(1.0),
    Sampling(0.7),
    Sampling(1.8, seed=3),
    Sampling(1.0, top_k=4),
    Sampling(1.3, top_p=0.7, seed=2**64 - 1),
    Sampling(0.9, top_k=7, top_p=0.8, seed=5),
    Sampling(1.0, top_k=100, top_p=0.999999),
]


@pytest.fixture(autouse=True)
def the_same_logits_in_every_run() -> None:
    torch.manual_seed(0)


def numbers(count: int) -> Tensor:
    return torch.arange(count)


def same(value: int, count: int) -> Tensor:
    return torch.full((count,), value)


def warped(logits: Tensor, sampling: Sampling) -> Tensor:
    """Scores as transformers makes them in `generate`: -inf for what may not be drawn."""
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits.float())
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    return TopPLogitsWarper(sampling.top_p)(None, scores) if sampling.top_p < 1 else scores


def p_value(drawn: Tensor, probabilities: Tensor) -> float:
    """Of a chi-square test; 0 where something impossible was drawn."""
    counts = torch.bincount(drawn, minlength=len(probabilities))
    possible = probabilities > 0
    if counts[~possible].sum() > 0:
        return 0.0
    if possible.sum() == 1:
        return 1.0
    return stats.chisquare(counts[possible].numpy(), (probabilities[possible] * len(drawn)).numpy()).pvalue


def expected(logits: Tensor, sampling: Sampling) -> Tensor:
    return torch.softmax(warped(logits[None], sampling).double(), -1)[0]


def drawn_over_rows(logits: Tensor, sampling: Sampling, step: int = 0) -> Tensor:
    return choose(logits.expand(DRAWS, -1), sampling, numbers(DRAWS), same(step, DRAWS))


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_tokens_follow_the_distribution_of_transformers(sampling: Sampling) -> None:
    over_rows = drawn_over_rows(SMALL, sampling)
    over_steps = choose(SMALL.expand(DRAWS, -1), sampling, same(7, DRAWS), numbers(DRAWS))
    for drawn in (over_rows, over_steps):
        assert p_value(drawn, expected(SMALL, sampling)) > 1e-3
    assert not torch.equal(over_rows, over_steps)


def test_tokens_of_one_draw_follow_it_over_seeds() -> None:
    drawn = [choose(SMALL[None], Sampling(1.0, seed=seed), same(3, 1), same(11, 1)) for seed in range(2000)]
    assert p_value(torch.cat(drawn), expected(SMALL, Sampling(1.0))) > 1e-3


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_the_check_of_distributions_can_fail(sampling: Sampling) -> None:
    drawn = drawn_over_rows(SMALL, sampling)
    for wrong in (replace(sampling, temperature=sampling.temperature * 1.25), replace(sampling, top_k=3)):
        assert p_value(drawn, expected(SMALL, wrong)) < 1e-6, wrong
    assert p_value(drawn, expected(SMALL.roll(1), sampling)) < 1e-6


def pairs(first: Tensor, second: Tensor, vocab: int) -> float:
    """P value of the two having nothing to do with each other."""
    table = torch.bincount(first * vocab + second, minlength=vocab**2).reshape(vocab, vocab)
    return stats.chi2_contingency(table.numpy()).pvalue


def test_neighbouring_draws_have_nothing_to_do_with_each_other() -> None:
    flat, sampling = torch.zeros(6), Sampling(1.0)
    drawn = drawn_over_rows(flat, sampling)
    others = {
        "next row": drawn.roll(1),
        "next step": drawn_over_rows(flat, sampling, step=1),
        "step + 2^32": drawn_over_rows(flat, sampling, step=1 << 32),
        "next seed": drawn_over_rows(flat, replace(sampling, seed=1)),
        "row and step swapped": choose(flat.expand(DRAWS, -1), sampling, same(0, DRAWS), numbers(DRAWS)),
    }
    for name, other in others.items():
        assert pairs(drawn, other, 6) > 1e-3, name
    copied = torch.where(numbers(DRAWS) % 10 == 0, drawn, others["next seed"])
    assert pairs(drawn, copied, 6) < 1e-6, "a tenth in common is seen"


def test_equal_logits_of_a_large_vocabulary_are_equally_likely() -> None:
    """Noise of 24 bits would prefer small tokens in ties."""
    vocab, count = 131072, 400
    drawn = torch.cat([choose(torch.zeros(1, vocab), Sampling(1.0), same(row, 1), same(0, 1)) for row in range(count)])
    assert stats.kstest((drawn.double() + 0.5).numpy() / vocab, "uniform").pvalue > 1e-3
    assert len(drawn.unique()) > count - 5


def exact_gumbel(seed: int, row: int, step: int, token: int) -> float:
    """In Python's own integers and floats."""
    mask = (1 << 64) - 1

    def mixed(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    key = int.from_bytes(hashlib.sha256(f"{seed}/sampling".encode()).digest()[:8], "big") ^ (1 << 63)
    stream = mixed((mixed((row + key) & mask) + step) & mask)
    bits = mixed((token * 0x9E3779B97F4A7C15 + stream) & mask) >> 12
    return -math.log(-math.log((bits + 0.5) / 2**52))


def test_noise_is_what_splitmix64_says() -> None:
    for seed, row, step in ((0, 0, 0), (7, 3, 1000), (2**64 - 1, 2**40, 2**31)):
        noise = gumbel(seed, torch.tensor([5, row]), torch.tensor([1, step]), 1000)[1]
        for token in (0, 1, 500, 999):
            assert noise[token].item() == pytest.approx(exact_gumbel(seed, row, step, token), rel=1e-6)


def test_noise_is_gumbel() -> None:
    noise = gumbel(1, numbers(20), numbers(20), 10_000).flatten()
    assert noise.dtype == torch.float32
    assert noise.isfinite().all()
    assert stats.kstest(noise.double().numpy(), "gumbel_r").pvalue > 1e-3
    assert stats.kstest((noise.double() * 1.02).numpy(), "gumbel_r").pvalue < 1e-6


def test_noise_is_finite_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([[0.0, 2.0**52 - 1]], dtype=torch.float64)
    monkeypatch.setattr(module, "unit", lambda tokens, streams: ends.add(0.5).mul(2.0**-52))
    low, high = gumbel(0, numbers(1), numbers(1), 2)[0].tolist()
    assert -3.61 < low < -3.6
    assert 36.7 < high < 36.8


def test_the_same_seed_chooses_the_same_tokens_in_any_order_and_split() -> None:
    logits = torch.randn(24, 1000, generator=torch.Generator().manual_seed(0)) * 3
    rows, steps = numbers(24) + 5, (numbers(24) * 7) % 11
    for sampling in (Sampling(1.0), Sampling(0.8, 50, 0.9, seed=4)):
        whole = choose(logits, sampling, rows, steps)
        order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
        assert torch.equal(choose(logits[order], sampling, rows[order], steps[order]), whole[order])
        for size in (1, 5, 23):
            cut = zip(logits.split(size), rows.split(size), steps.split(size), strict=True)
            assert torch.equal(torch.cat([choose(a, sampling, b, c) for a, b, c in cut]), whole), size
        assert not torch.equal(choose(logits, sampling, rows + 1, steps), whole)
        assert not torch.equal(choose(logits, sampling, rows, steps + 1), whole)
        assert not torch.equal(choose(logits, replace(sampling, seed=9), rows, steps), whole)


def test_rows_are_worked_on_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, sampling = torch.randn(7, 300), Sampling(1.0, 100, 0.9)
    at_once = choose(logits, sampling, numbers(7), numbers(7))
    monkeypatch.setattr(module, "_ELEMENTS", 5000)
    assert torch.equal(choose(logits, sampling, numbers(7), numbers(7)), at_once)


def test_the_bits_stay_as_they_are() -> None:
    """A change of these tokens changes what a seed that somebody noted down gives."""
    logits = torch.linspace(0, 4, 5000).sin().expand(8, -1)
    drawn = choose(logits, Sampling(0.9, 2000, 0.95, seed=42), numbers(8), numbers(8) * 3)
    assert drawn.tolist() == [2736, 1974, 1927, 1238, 2674, 1559, 1716, 1707]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_greedy_is_argmax(dtype: torch.dtype) -> None:
    logits = torch.randn(9, 333).to(dtype)
    chosen = choose(logits, Sampling(), numbers(9), numbers(9))
    assert chosen.dtype == torch.int64
    assert torch.equal(chosen, logits.argmax(-1))
    assert choose(torch.tensor([[1.0, 3.0, 3.0]]).to(dtype), Sampling(), same(0, 1), same(0, 1)).tolist() == [1]
    for nearly in (Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-9), Sampling(1e-3)):
        distinct = torch.stack([torch.randperm(120) for _ in range(9)]).to(dtype)
        assert torch.equal(choose(distinct, nearly, numbers(9), numbers(9)), distinct.argmax(-1)), nearly


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_anything_else(dtype: torch.dtype) -> None:
    logits = (torch.randn(16, 5000) * 4).to(dtype)
    for sampling in (Sampling(1.1), Sampling(0.7, 40, 0.9)):
        chosen = choose(logits, sampling, numbers(16), numbers(16))
        assert torch.equal(chosen, choose(logits.float(), sampling, numbers(16), numbers(16)))
        assert torch.equal(chosen, choose(logits.double(), sampling, numbers(16), numbers(16)))


def kept(logits: Tensor, sampling: Sampling) -> Tensor:
    return candidates(scaled(logits, sampling.temperature), sampling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2, 50, 999, 1000, 5000])
def test_top_k_keeps_what_transformers_keeps(top_k: int, dtype: torch.dtype) -> None:
    """In bfloat16 many are equal to the k-th: all of them stay, in both."""
    logits, sampling = (torch.randn(20, 1000) * 3).to(dtype), Sampling(0.8, top_k=top_k)
    ours = kept(logits, sampling)
    assert torch.equal(ours, warped(logits, sampling).isfinite())
    if dtype == torch.float32 and top_k < 1000:
        assert ours.sum(-1).unique().tolist() == [top_k]
        assert not torch.equal(ours, warped(logits, replace(sampling, top_k=top_k + 1)).isfinite())


@pytest.mark.parametrize("top_k", [0, 100])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.95, 0.999])
def test_top_p_keeps_what_transformers_keeps(top_p: float, top_k: int, budget) -> None:
    for seed in range(budget(3, 50)):
        logits = torch.randn(20, 2000, generator=torch.Generator().manual_seed(seed)).double() * 3
        sampling = Sampling(1.3, top_k, top_p)
        ours, theirs = kept(logits, sampling), warped(logits, sampling).isfinite()
        # Sets are counted: two probabilities may be closer than fp32 tells apart, and the sums of transformers round.
        assert (ours.sum(-1) - theirs.sum(-1)).abs().max() <= 1
        assert (ours == theirs).all(-1).float().mean() > 0.9
        other = warped(logits, replace(sampling, top_p=top_p * 0.97)).isfinite()
        assert top_p < 0.5 or not torch.equal(ours, other), "the comparison can fail"


def smallest_set(probabilities: list[float], top_p: float) -> set[int]:
    order = sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token))
    sums = list(itertools.accumulate(probabilities[token] for token in order))
    return set(order[: 1 + next(i for i, s in enumerate(sums) if s >= top_p * sums[-1])])


def test_top_p_is_the_smallest_set_and_of_equals_the_first() -> None:
    generator = torch.Generator().manual_seed(2)
    for top_p in (1e-12, 0.2, 0.35, 0.77, 0.999):
        logits = torch.randint(-4, 5, (40, 60), generator=generator).float()  # many equal ones
        ours, chances = kept(logits, Sampling(1.0, top_p=top_p)), torch.softmax(logits.double(), -1).tolist()
        for row, mask in zip(chances, ours, strict=True):
            assert set(mask.nonzero().flatten().tolist()) == smallest_set(row, top_p)
    assert kept(torch.zeros(1, 100), Sampling(1.0, top_p=0.305))[0].nonzero().flatten().tolist() == list(range(31))


@pytest.mark.parametrize("top_p", [math.nextafter(1.0, 0.0), 1 - 1e-12, 1e-300, 5e-324])
def test_extreme_top_p(top_p: float) -> None:
    logits = torch.randn(3, 50_000)
    ours = kept(logits, Sampling(1.0, top_p=top_p))
    assert (ours.sum(-1) == 1).all() if top_p < 0.5 else ours.float().mean() > 0.999
    assert ours.gather(-1, logits.argmax(-1, keepdim=True)).all()


def test_extreme_logits() -> None:
    for low in (-1e4, -3e38, -math.inf):
        logits = torch.full((500, 40), low)
        logits[:, 7], logits[:, 30] = 3e38, 3e38
        for sampling in (Sampling(1e-3), Sampling(1e3), Sampling(1.0, 5), Sampling(1.0, 0, 0.9), Sampling(1.0, 3, 0.9)):
            drawn = choose(logits, sampling, numbers(500), numbers(500))
            assert set(drawn.tolist()) == {7, 30}, (low, sampling)


def test_logits_that_are_not_numbers_do_not_crash() -> None:
    """Another rank would wait for this one forever. The token is within the vocabulary."""
    for value in (math.nan, math.inf, -math.inf):
        for sampling in (Sampling(), Sampling(1.0), Sampling(1.0, 3), Sampling(1.0, 3, 0.5)):
            drawn = choose(torch.full((4, 30), value), sampling, numbers(4), numbers(4))
            assert ((drawn >= 0) & (drawn < 30)).all()


def test_no_rows_and_one_token() -> None:
    for sampling in (Sampling(), Sampling(1.0, 3, 0.5)):
        assert choose(torch.zeros(0, 9), sampling, numbers(0), numbers(0)).shape == (0,)
        assert choose(torch.zeros(2, 1), sampling, numbers(2), numbers(2)).tolist() == [0, 0]


def test_shapes_do_not_depend_on_data() -> None:
    """Tensors without data do: the host waits for nothing, and a CUDA graph can record it."""
    logits, where = torch.empty(3, 1000, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    for sampling in (Sampling(), *CASES):
        assert choose(logits, sampling, where, where).shape == (3,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        logits[logits > 0]
    with pytest.raises((RuntimeError, NotImplementedError)):
        logits.amax().item()


def test_a_row_of_a_large_vocabulary_takes_milliseconds() -> None:
    logits, where = torch.randn(1, 131072) * 3, numbers(1)
    for sampling, bound_s in ((Sampling(1.0), 0.02), (Sampling(0.7, 50, 0.9), 0.04)):
        times = []
        for _ in range(9):
            start_s = time.process_time()
            choose(logits, sampling, where, where)
            times.append(time.process_time() - start_s)
        assert min(times) < bound_s, times


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": 1e-4},
        {"temperature": 2e3},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "1"},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 2.0},
        {"top_k": True},
        {"top_k": 2**31},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": -0.5},
        {"top_p": math.nan},
        {"top_p": None},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 1.5},
        {"seed": False},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(InvalidInput) as caught:
        Sampling(**wrong)
    ((name, value),) = wrong.items()
    block = caught.value.block()
    assert name in block
    assert repr(value)[:40] in block
    assert "legal" in block
    assert caught.value.exit_code == 64


def test_values_at_the_ends_of_the_ranges_are_taken() -> None:
    for right in ({"temperature": 0}, {"temperature": 1}, {"temperature": 1e-3}, {"temperature": 1e3}, {"top_p": 1}):
        assert Sampling(**right) == Sampling(**right)
    assert choose(SMALL[None], Sampling(1, 2**31 - 1, 1, 2**64 - 1), same(0, 1), same(0, 1)).shape == (1,)
