"""The attention half of a layer on all ranks of a layout, and of the single-device reference, on the same weights.

Sequence i is random hidden states x[i, : length_i + steps]: a prompt, then one token for each step of a decode. What
stands behind a shorter prompt in a call is other numbers, and ten times as large.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from unittest.mock import patch

import torch
from simulated import Ranks, axes
from torch import Tensor

from headgrid.layout import shards
from headgrid.layout.batching import decode_micro_batches, owned_rows, prefill_calls
from headgrid.layout.layout import Layout
from headgrid.layout.memory import cache_shape
from headgrid.layout.shards import Shard, parameters
from headgrid.layout.span import Span, indices
from headgrid.reference import Reference
from headgrid.runtime import stage as stage_module
from headgrid.runtime.attention import Queries
from headgrid.runtime.cache import carve, new_arena
from headgrid.runtime.hidden import Hidden
from headgrid.runtime.layer import Weights, load
from headgrid.runtime.mesh import StageAxes
from headgrid.runtime.stage import Stage, StageCall, prefill_call
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

EXACT = 1e-12
Alter = Callable[[Stage], None]


@dataclass(frozen=True, slots=True)
class Case:
    """A layout, a model that suits it, a workload and the seed of all numbers."""

    model: ModelSpec
    layout: Layout
    workload: Workload
    seed: int


def is_attention(name: str) -> bool:
    return name.startswith("layers.0.attention.")


def whole_weights(case: Case) -> Weights:
    """Every tensor of the attention half, whole, with scores of a deviation of about 2, so that attention is sharp."""
    generator = torch.Generator().manual_seed(case.seed)
    weights: Weights = {}
    for name, shard in parameters(case.model, Layout(), 0).items():
        if is_attention(name):
            values = torch.randn(shard.shape, generator=generator, dtype=torch.float64)
            part, kind = name.split(".")[-2:]
            gain = 1.4 / case.model.scale**0.5 / case.model.head_dim**0.25 if part in ("q", "k") else 1.0
            gain = gain / case.model.hidden_size**0.5 if kind == "weight" and values.dim() == 2 else 0.3
            weights[name] = values * gain + ("norm" in part and kind == "weight")
    return weights


def cut(tensor: Tensor, shard: Shard) -> Tensor:
    """A rank's part of a whole tensor."""
    for dim, spans in enumerate((shard.rows, shard.cols)):
        if spans is not None and spans != (Span(0, tensor.shape[dim]),):
            tensor = tensor.index_select(dim, torch.tensor(indices(spans)))
    return tensor


def local_weights(case: Case, rank: int, whole: Weights) -> Weights:
    """The rank's part of the attention half; all other tensors are NaN."""

    def get(name: str, shard: Shard) -> Tensor:
        if name in whole:
            return cut(whole[name], shard)
        return torch.full(shard.local_shape, torch.nan, dtype=torch.float64)

    return load(case.model, case.layout, rank, get)


def hidden_states(case: Case) -> tuple[Tensor, Tensor]:
    """x [b, seq + steps, D], and the same with padding: [b, seq, D] of which sequence i has only its own length."""
    workload, generator = case.workload, torch.Generator().manual_seed(case.seed + 1)
    shape = workload.batch, workload.cache_positions, case.model.hidden_size
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    padded = x[:, : workload.seq].clone()
    for row, length in enumerate(workload.lengths):
        padded[row, length:] = 10 * torch.randn(padded[row, length:].shape, generator=generator, dtype=torch.float64)
    return x, padded


def build(case: Case, mesh: StageAxes, rank: int, weights: Weights, *, with_cache: bool) -> Stage:
    """The rank's stage, with a cache full of NaN."""
    cache = None
    if with_cache:
        shape = cache_shape(case.model, case.layout, case.workload, rank)
        cache = carve(new_arena(shape.elements, torch.float64, torch.device("cpu")), shape)
    return Stage(case.model, case.layout, mesh, weights, cache, owned_rows(case.layout, case.workload.batch, rank))


def half(stage: Stage, x: Tensor, call: StageCall) -> Tensor:
    """The attention half of x [b, s, D]: of this rank's tokens, [T_r, D]."""
    own = stage.residual.own(call.tokens)
    return stage._attention(stage.layers[0], 0, Hidden(x.flatten(0, 1)[own.start : own.stop]), call)


@contextmanager
def one_partition() -> Iterator[None]:
    """All ranks of a world look up the partition that one of them has computed: half of a small case's time."""
    with patch.object(shards, "head_shards", cache(shards.head_shards)) as found:
        with patch.object(stage_module, "head_shards", found):
            yield


def prefill(stage: Stage, case: Case, padded: Tensor) -> list[Tensor]:
    """One rank's prefill, call after call."""
    outs = []
    for call in prefill_calls(case.layout, case.workload, 0):
        x = padded[call.micro_batch.rows(), call.positions.start : call.positions.stop]
        outs.append(half(stage, x, prefill_call(case.model, case.workload, call, padded.device)))
    return outs


def decode(stage: Stage, case: Case, x: Tensor) -> list[Tensor]:
    """One rank's decode, step after step, every sequence at its own position."""
    outs, lengths = [], torch.tensor(case.workload.lengths)
    for step in range(case.workload.decode_steps):
        for mb in decode_micro_batches(case.layout, case.workload, 0):
            rows = torch.tensor(mb.rows())
            at = lengths[rows] + step
            call = StageCall(mb, Queries(1, tuple(at.tolist()), at, decoding=True), ())
            outs.append(half(stage, x[rows, at][:, None], call))
    return outs


def _assembled(case: Case, outs: Sequence[Tensor]) -> Tensor:
    """What all ranks say about a call: [P, T, D], or with a sharded residual, each rank its tokens, [1, T, D]."""
    return torch.cat(list(outs))[None] if case.layout.residual == "sharded" else torch.stack(list(outs))


def simulate(case: Case, ranks: Ranks, alter: Alter | None = None) -> tuple[Tensor, Tensor]:
    """Prefill [P, b, seq, D] and decode [P, steps, b, D] of all ranks; what no call computed is NaN."""
    whole, (x, padded) = whole_weights(case), hidden_states(case)

    def job(rank: int, mesh: StageAxes) -> tuple[list[Tensor], list[Tensor]]:
        with torch.inference_mode():
            stage = build(case, mesh, rank, local_weights(case, rank, whole), with_cache=True)
            if alter is not None:
                alter(stage)
            return prefill(stage, case, padded), decode(stage, case, x)

    jobs = [lambda r=r, mesh=mesh: job(r, mesh) for r, mesh in enumerate(axes(case.layout, ranks))]
    with one_partition():
        results = ranks.run(jobs)
    first = torch.full((1 if case.layout.residual == "sharded" else len(jobs), *padded.shape), torch.nan).double()
    for call, *outs in zip(prefill_calls(case.layout, case.workload, 0), *(r[0] for r in results), strict=True):
        rows, positions = call.micro_batch.rows(), call.positions
        out = _assembled(case, outs).view(len(first), len(rows), len(positions), -1)
        first[:, rows, positions.start : positions.stop] = out
    steps = case.workload.decode_steps
    later = torch.full((len(first), steps, case.workload.batch, x.shape[2]), torch.nan).double()
    batches = decode_micro_batches(case.layout, case.workload, 0)
    plan = [(step, mb) for step in range(steps) for mb in batches]
    for (step, mb), *outs in zip(plan, *(r[1] for r in results), strict=True):
        later[:, step, mb.rows()] = _assembled(case, outs)
    return first, later


def reference(case: Case, x: Tensor, whole: Weights, kind: type[Reference] = Reference) -> list[Tensor]:
    """The attention half of each sequence alone, unpadded: [length_i + steps, D]."""
    truth, outs = kind(case.model, whole.__getitem__, torch.float64), list(x)
    lengths = [length + case.workload.decode_steps for length in case.workload.lengths]
    for length in set(lengths):
        rows = [row for row, other in enumerate(lengths) if other == length]
        for row, out in zip(rows, truth.attention(0, x[rows, :length]), strict=True):
            outs[row] = out
    return outs


def worst(actual: Tensor, expected: Tensor) -> float:
    """The largest relative L2 error of any rank: actual [P, ...], expected [...]. Infinite for NaN."""
    error = (actual - expected).flatten(1).norm(dim=1).max() / expected.norm()
    return error.item() if error.isfinite() else float("inf")


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors of the two phases; a phase that has no tokens has none."""

    prefill: float
    decode: float

    @property
    def exact(self) -> bool:
        """Whether all ranks agree with the reference."""
        return max(self.prefill, self.decode) <= EXACT


@torch.no_grad()
def compare(case: Case, ranks: Ranks, alter: Alter | None = None) -> Errors:
    """The comparison of all tests: every token of every rank with the reference."""
    first, later = simulate(case, ranks, alter)
    expected = reference(case, hidden_states(case)[0], whole_weights(case))
    lengths, steps = case.workload.lengths, case.workload.decode_steps
    prompts = torch.cat([first[:, row, :length] for row, length in enumerate(lengths)], dim=1)
    prefill = worst(prompts, torch.cat([out[:length] for out, length in zip(expected, lengths, strict=True)]))
    if not steps:
        return Errors(prefill, 0.0)
    ends = torch.stack([out[length:] for out, length in zip(expected, lengths, strict=True)], dim=1)
    return Errors(prefill, worst(later, ends))
