"""Tokens chosen from logits: greedily, or drawn, the same ones however the batch is cut and wherever it runs.

A drawn token is the argmax of logits / temperature + g, each g an independent Gumbel variable: this draws from the
softmax (Gumbel 1954; Maddison, Tarlow, Minka 2014). g is made from a hash of (seed, row of the batch, step, token), so
it depends neither on ranks, devices or micro-batches nor on what was drawn before. Logits that differ by rounding, as
those of two layouts do, give the same token unless two candidates are as close as that: the rule of greedy tokens.

R rows, V tokens of the vocabulary. No shape depends on data and the host waits for nothing, so all of this can be
recorded in a CUDA graph.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headgrid.errors import InvalidInput
from headgrid.runtime.hashing import key_of, mixed, unit

_ELEMENTS = 1 << 22  # logits worked on at a time: bounds the temporaries of 8 bytes to some hundred MB
_MASS_BITS = 41  # the largest mass is 2^41, so a row's masses sum to less than 2^63 for vocabularies up to 2^21
_TEMPERATURES = (1e-3, 1e3)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. `temperature` 0: the largest logit. Otherwise drawn, after temperature, then `top_k`, then
    `top_p`, in this order; `top_k` 0 and `top_p` 1 leave every token in.

    Raises InvalidInput for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        low, high = _TEMPERATURES
        hot = _is_number(self.temperature) and (self.temperature == 0 or low <= self.temperature <= high)
        _check(hot, "temperature", self.temperature, f"0 (greedy), or {low:g} to {high:g}")
        _check(
            _is_whole(self.top_k) and 0 <= self.top_k < 2**31, "top_k", self.top_k, "0 (all tokens), or 1 to 2^31 - 1"
        )
        _check(
            _is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "more than 0, at most 1 (all tokens)"
        )
        _check(_is_whole(self.seed) and 0 <= self.seed < 2**64, "seed", self.seed, "0 to 2^64 - 1")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or _is_whole(value)


def _check(right: bool, name: str, value: object, legal: str) -> None:
    if not right:
        raise InvalidInput(f"{name} is out of range", numbers=f"{name} = {value!r:.40}", legal=(legal,))


def choose(logits: Tensor, sampling: Sampling, rows: Tensor, steps: Tensor) -> Tensor:
    """One token per row: int64 [R], of logits [R, V] of any floating dtype.

    `rows` int64 [R] are the rows' places in the whole batch, `steps` int64 [R] count the tokens of each sequence (its
    positions, say): together they number the draw. Ties go to the smaller token.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    size = max(1, _ELEMENTS // logits.shape[-1])
    pieces = zip(logits.split(size), rows.split(size), steps.split(size), strict=True)
    return torch.cat([_draw(*piece, sampling) for piece in pieces])


def _draw(logits: Tensor, rows: Tensor, steps: Tensor, sampling: Sampling) -> Tensor:
    scores = scaled(logits, sampling.temperature)
    noise = gumbel(sampling.seed, rows, steps, logits.shape[-1])
    return torch.where(candidates(scores, sampling), scores + noise, -torch.inf).argmax(-1)


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits [R, V] over the temperature, as float32, each row moved to have its maximum at 0."""
    wide = logits.float()
    return (wide - wide.amax(-1, keepdim=True)) * (1 / temperature)


def gumbel(seed: int, rows: Tensor, steps: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel variables, float32 [R, V], in [-3.6, 36.8].

    The logarithms are taken in float64: devices differ in their last bits, which float32 then no longer shows.
    """
    key = key_of(seed, "sampling")
    streams = mixed(mixed(rows + (key - (1 << 63))) + steps)  # int64, as well mixed as the key itself
    tokens = torch.arange(vocab_size, device=rows.device)
    return unit(tokens, streams[:, None]).log_().neg_().log_().neg_().float()


def candidates(scores: Tensor, sampling: Sampling) -> Tensor:
    """Which tokens may be drawn: bool [R, V] of `scores` float32 [R, V] as from `scaled`.

    With top_k, all that are no smaller than the k-th largest (more than k if several equal it). Of these, with top_p,
    the smallest set whose share of their probability reaches p: the most probable ones, of equal ones the smaller
    tokens.
    """
    kept = torch.ones_like(scores, dtype=torch.bool)
    if 0 < sampling.top_k < scores.shape[-1]:
        kept = scores >= scores.topk(sampling.top_k).values[:, -1:]
    if sampling.top_p == 1:
        return kept
    # Whole numbers: their sums do not depend on the order, nor on how many rows are summed at once.
    mass = torch.where(kept, scores.exp() * 2.0**_MASS_BITS, 0).to(torch.int64)
    total = mass.sum(-1, keepdim=True)
    goal = total.double().mul_(sampling.top_p).ceil_().to(torch.int64)
    return _heaviest(mass, total - torch.minimum(goal, total))  # a double may round a total up


def _heaviest(mass: Tensor, spare: Tensor) -> Tensor:
    """The fewest elements of each row that leave out no more than `spare`: bool [R, V] of `mass` int64 [R, V] and
    `spare` int64 [R, 1], in [0, the row's sum). Of equal elements the first ones.
    """
    ascending = mass.sort(dim=-1).values
    dropped = (ascending.cumsum(-1) <= spare).sum(-1, keepdim=True)
    # Both clamps change nothing but where logits are not numbers, whose masses are none: no index or divisor is wrong.
    lightest = ascending.gather(-1, dropped.clamp_max_(mass.shape[-1] - 1)).clamp_min_(1)
    outside = torch.where(mass < lightest, mass, 0).sum(-1, keepdim=True)
    ties = mass == lightest
    left_out = (spare - outside) // lightest  # of the ties
    return (mass > lightest) | (ties & (ties.cumsum(-1) <= ties.sum(-1, keepdim=True) - left_out))
