"""What one device computes for a case: the reference, and controls that are wrong on purpose.

Results are kept for as long as a test may ask again: cases that differ in their layout alone have the same truth.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from case import Case, prompts
from torch import Tensor

from headgrid.layout.layout import Layout
from headgrid.layout.shards import parameters, qk_channels
from headgrid.layout.span import balanced, indices
from headgrid.reference import Reference
from headgrid.runtime.weights import draw
from headgrid.spec.model import ModelSpec


class Uniform(Reference):
    """The same model with attention that weighs all positions it sees alike."""

    def _head(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return super()._head(torch.zeros_like(q), k, v, window)


class PerSlice(Reference):
    """The same model with a softmax per slice and no exchange: the wrong reading of the partition."""

    num_slices = 1

    def _head(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        qk = [indices(spans) for spans in qk_channels(self.model, self.num_slices)]
        u = balanced(self.model.head_dim, self.num_slices)
        parts = [(q[..., c], k[..., c], v[..., s.start : s.stop]) for c, s in zip(qk, u, strict=True)]
        return torch.cat([super(PerSlice, self)._head(*part, window) for part in parts], dim=-1)


@lru_cache(maxsize=4)
def _weights(model: ModelSpec, seed: int, dtype: torch.dtype) -> Callable[[str], Tensor]:
    """Whole weights as the run draws them, in its dtype."""
    whole = parameters(model, Layout(), 0)
    return lru_cache(maxsize=None)(lambda name: draw(model, seed, name, whole[name], dtype=dtype))


def run_dtype(case: Case) -> torch.dtype:
    return getattr(torch, case.workload.dtype)


def reference(
    case: Case, kind: type[Reference] = Reference, dtype: torch.dtype = torch.float64, *, fp8: bool = False
) -> Reference:
    """A single-device model on the very weights of the run (drawn in the run's dtype); with `fp8` its linears too."""
    found = kind(case.model, _weights(case.model, case.seed, run_dtype(case)), dtype, fp8_linears=fp8)
    if isinstance(found, PerSlice):
        found.num_slices = case.layout.num_dim_slices
    return found


def by_length(case: Case) -> dict[int, list[int]]:
    """Rows of the batch by the length of their prompt."""
    found: dict[int, list[int]] = {}
    for row, length in enumerate(case.workload.lengths):
        found.setdefault(length, []).append(row)
    return found


def logits(
    case: Case,
    chosen: Tensor,
    kind: type[Reference] = Reference,
    dtype: torch.dtype = torch.float64,
    *,
    fp8: bool = False,
) -> Tensor:
    """Logits [batch, k, vocab] that lead to the tokens `chosen` [batch, k], each given the prompt and those before."""
    whole, k = prompts(case), chosen.shape[1]
    expected = torch.empty(*chosen.shape, case.model.vocab_size, dtype=dtype)
    slices = case.layout.num_dim_slices if kind is PerSlice else 1
    for length, rows in by_length(case).items():
        text = torch.cat([whole[rows, :length], chosen[rows, : k - 1]], dim=1)
        key = tuple(map(tuple, text.tolist()))
        of = _Hashed(case, (case.model, case.seed, run_dtype(case), slices))
        expected[rows] = _logits(of, kind, dtype, fp8, key, k)
    return expected


class _Hashed:
    """A case that equals another one where `key` does."""

    def __init__(self, case: Case, key: tuple) -> None:
        self.case, self.key = case, key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@lru_cache(maxsize=512)
def _logits(of: _Hashed, kind: type[Reference], dtype: torch.dtype, fp8: bool, text: tuple, last: int) -> Tensor:
    return reference(of.case, kind, dtype, fp8=fp8).logits(torch.tensor(text), last)


def greedy(case: Case) -> Tensor:
    """What the reference chooses: tokens [batch, 1 + steps]."""
    chosen = torch.zeros(case.workload.batch, 0, dtype=torch.int64)
    for _ in range(1 + case.steps):
        longer = torch.cat([chosen, chosen.new_zeros(len(chosen), 1)], dim=1)
        chosen = torch.cat([chosen, logits(case, longer)[:, -1:].argmax(-1)], dim=1)
    return chosen


def token_to_stop_at(case: Case) -> int:
    """One that ends some sequence early: the first or second token of the middle row."""
    return int(greedy(case)[case.workload.batch // 2, min(1, case.steps)])
