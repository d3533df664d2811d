"""Judges what the ranks left behind: against the single-device reference, and against what `layout` predicts."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import STEPS, Case
from torch import Tensor
from worker import prompts, upstream

from headgrid.layout.activations import communication_buffer_bytes
from headgrid.layout.batching import replica_rows
from headgrid.layout.flops import decode_flops, prefill_flops
from headgrid.layout.layout import Layout
from headgrid.layout.memory import parameters_bytes
from headgrid.layout.shards import parameters, qk_channels
from headgrid.layout.span import balanced, indices
from headgrid.layout.traffic import Collective, decode_collectives, prefill_collectives
from headgrid.reference import Reference, relative_error
from headgrid.runtime.weights import draw

FP64_BOUND = 1e-12
FP32_ATTENTION_BOUND = 2e-6
FLOOR_FACTOR = 1.5
SENSITIVE = 0.1


class Insensitive(AssertionError):
    """The case could not tell right from wrong attention: it proves nothing, whatever the ranks computed."""


class Uniform(Reference):
    """The same model with attention that weighs all earlier positions alike."""

    def _head(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super()._head(torch.zeros_like(q), k, v)


class PerSlice(Reference):
    """The same model with a softmax per slice and no exchange: the wrong reading of the partition."""

    num_slices = 1

    def _head(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qk = [indices(spans) for spans in qk_channels(self.model, self.num_slices)]
        u = balanced(self.model.head_dim, self.num_slices)
        parts = [(q[..., c], k[..., c], v[..., s.start : s.stop]) for c, s in zip(qk, u, strict=True)]
        return torch.cat([super(PerSlice, self)._head(*part) for part in parts], dim=-1)


def reference(case: Case, kind: type[Reference] = Reference, dtype: torch.dtype = torch.float64) -> Reference:
    """A single-device model on the very weights of the run (drawn in the run's dtype)."""
    whole = parameters(case.model, Layout(), 0)
    drawn: dict[str, Tensor] = {}

    def get(name: str) -> Tensor:
        if name not in drawn:
            drawn[name] = draw(case.model, case.seed, name, whole[name], dtype=getattr(torch, case.workload.dtype))
        return drawn[name]

    return kind(case.model, get, dtype)


def prove_sensitive(case: Case) -> None:
    """Raise Insensitive unless wrong attention moves the logits by more than 10 %, in prefill and after it."""
    tokens, m = prompts(case), case.layout.num_dim_slices
    control = reference(case, PerSlice if m > 1 else Uniform)
    if isinstance(control, PerSlice):
        control.num_slices = m
    moved = relative_error(control.logits(tokens, 2), reference(case).logits(tokens, 2))
    if not moved > SENSITIVE:
        raise Insensitive(f"{type(control).__name__} attention moves the logits of {case.id} by only {moved:.2%}")


@dataclass
class Verdict:
    """What is wrong, in words, and the errors that were measured: {what: (error, bound)}."""

    complaints: list[str] = field(default_factory=list)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    def compare(self, what: str, actual: Tensor, expected: Tensor, bound: float) -> None:
        """Whole tensors, element by element: shape, and the relative L2 norm of the difference."""
        if actual.shape != expected.shape:
            self.complaints.append(f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
            return
        error = relative_error(actual, expected)
        if error > self.errors.get(what.partition(" of ")[0], (-1.0, 0.0))[0]:
            self.errors[what.partition(" of ")[0]] = error, bound
        if not error <= bound:
            self.complaints.append(f"{what}: relative error {error:.3g} over {bound:.3g}")

    def equal(self, what: str, actual: object, expected: object) -> None:
        """Equality of counts, tokens and the like."""
        if actual != expected:
            self.complaints.append(f"{what}: {actual}, not {expected}")


def judge(case: Case, outcomes: list[dict[str, Any]]) -> Verdict:
    """Every rank's results in one verdict."""
    verdict = Verdict()
    _judge_halves(case, outcomes, verdict)
    _judge_logits(case, outcomes, verdict)
    for rank, outcome in enumerate(outcomes):
        _judge_counts(case, rank, outcome, verdict)
    return verdict


def _judge_halves(case: Case, outcomes: list[dict[str, Any]], verdict: Verdict) -> None:
    """The attention half of each stage's first layer, from random hidden states, on every rank."""
    bound = FP64_BOUND if case.workload.dtype == "float64" else FP32_ATTENTION_BOUND
    x, truth = upstream(case).to(getattr(torch, case.workload.dtype)).double(), reference(case)
    layers = balanced(case.model.num_layers, case.layout.pp)
    expected = [truth.attention(span.start, x) for span in layers]
    for rank, outcome in enumerate(outcomes):
        at = case.layout.coordinates(rank)
        rows = replica_rows(case.layout, case.workload.batch)[at.dp]
        mine = expected[at.pp][rows.start : rows.stop]
        verdict.compare(f"attention prefill of rank {rank}", outcome["half_prefill"], mine[:, :-1], bound)
        verdict.compare(f"attention decode of rank {rank}", outcome["half_decode"], mine[:, -1:], bound)


def _judge_logits(case: Case, outcomes: list[dict[str, Any]], verdict: Verdict) -> None:
    """Logits of every rank of the last stage, and the tokens they led to on all stages that hold them."""
    whole = prompts(case)
    truth, plain = reference(case), reference(case, dtype=getattr(torch, case.workload.dtype))
    for replica, rows in enumerate(replica_rows(case.layout, case.workload.batch)):
        ends = [r for r in range(case.ranks) if _is(case, r, replica, case.layout.pp - 1)]
        chosen = outcomes[ends[0]]["first"], outcomes[ends[0]]["tokens"]
        text = torch.cat([whole[rows.start : rows.stop], chosen[0][:, None], chosen[1].t()], dim=1)[:, :-1]
        expected = truth.logits(text, STEPS + 1)
        bound = FP64_BOUND
        if case.workload.dtype == "float32":
            bound = FLOOR_FACTOR * relative_error(plain.logits(text, STEPS + 1), expected)
        for rank in ends:
            _compare_logits(verdict, case, rank, outcomes[rank], expected, bound)
            verdict.equal(f"first tokens of rank {rank}", outcomes[rank]["first"].tolist(), chosen[0].tolist())
            verdict.equal(f"tokens of rank {rank}", outcomes[rank]["tokens"].tolist(), chosen[1].tolist())
        for rank in (r for r in range(case.ranks) if _is(case, r, replica, 0)):
            verdict.equal(f"last tokens at rank {rank}", outcomes[rank]["last"].tolist(), chosen[1][-1].tolist())


def _is(case: Case, rank: int, replica: int, stage: int) -> bool:
    at = case.layout.coordinates(rank)
    return (at.dp, at.pp) == (replica, stage)


def _compare_logits(verdict: Verdict, case: Case, rank: int, outcome: dict, expected: Tensor, bound: float) -> None:
    actual = torch.cat([outcome["prefill"][:, None], outcome["decode"].transpose(0, 1)], dim=1)
    verdict.equal(f"greedy choice of rank {rank}", outcome["first"].tolist(), actual[:, 0].argmax(-1).tolist())
    verdict.equal(f"greedy tokens of rank {rank}", outcome["tokens"].tolist(), actual[:, 1:].argmax(-1).t().tolist())
    if case.workload.dtype == "float32":  # one figure for the run: the floor of a single step is itself mostly chance
        verdict.compare(f"logits of rank {rank}", actual, expected, bound)
        return
    verdict.compare(f"prefill logits of rank {rank}", actual[:, 0], expected[:, 0], bound)
    for step in range(1, STEPS + 1):
        verdict.compare(f"decode logits of rank {rank}, step {step}", actual[:, step], expected[:, step], bound)


def _judge_counts(case: Case, rank: int, outcome: dict[str, Any], verdict: Verdict) -> None:
    """What was issued, computed and stored, against the predictions."""
    args = (case.model, case.layout, case.workload, rank)
    decode = Counter({call: count * STEPS for call, count in decode_collectives(*args).items()})
    _same_calls(verdict, f"prefill of rank {rank}", outcome["prefill_issued"], prefill_collectives(*args))
    _same_calls(verdict, f"decode of rank {rank}", outcome["decode_issued"], decode)
    steps = sum(decode_flops(*args, keys=case.workload.seq + step + 1) for step in range(STEPS))
    verdict.equal(f"prefill FLOPs of rank {rank}", outcome["prefill_flops"], prefill_flops(*args))
    verdict.equal(f"decode FLOPs of rank {rank}", outcome["decode_flops"], steps)
    e = case.workload.element_bytes
    verdict.equal(f"weight bytes of rank {rank}", outcome["weight_elements"] * e, parameters_bytes(*args[:2], rank, e))
    verdict.equal(f"largest buffer of rank {rank}", outcome["buffer_bytes"], communication_buffer_bytes(*args))
    verdict.equal(f"cache of rank {rank} filled", outcome["cache_filled"], True)


def _same_calls(verdict: Verdict, what: str, issued: list[tuple], predicted: Counter[Collective]) -> None:
    actual = Counter(Collective(*call) for call in issued)
    if actual != predicted:
        verdict.complaints.append(f"{what}: issued but not predicted {actual - predicted}, else {predicted - actual}")
