"""Judges what the ranks left behind: against the single-device reference, and against what `layout` predicts."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from case import Case, upstream
from single import PerSlice, Uniform, by_length, logits, reference, run_dtype
from torch import Tensor

from headgrid.layout.batching import owned_rows, replica_rows
from headgrid.layout.flops import decode_flops, prefill_flops
from headgrid.layout.memory import cache_shape, parameters_bytes, predict
from headgrid.layout.span import balanced
from headgrid.layout.traffic import Collective, decode_collectives, prefill_collectives
from headgrid.reference import relative_error

FP64_BOUND = 1e-12
FP32_ATTENTION_BOUND = 2e-6
SENSITIVE = 0.1


class Insensitive(AssertionError):
    """The case could not tell right from wrong attention: it proves nothing, whatever the ranks computed."""


def floor_factor(case: Case) -> float:
    """How many times the error of a plain model in the same dtype is allowed."""
    return 2.0 if case.workload.element_bytes == 2 and case.ranks > 4 else 1.5


def sensitivity(case: Case, outcomes: list[dict[str, Any]]) -> float:
    """How far wrong attention moves the logits, in prefill and after it, relative to the logits."""
    kind, tokens = PerSlice if case.layout.num_dim_slices > 1 else Uniform, chosen(case, outcomes)
    return relative_error(logits(case, tokens, kind), logits(case, tokens))


def prove_sensitive(case: Case, outcomes: list[dict[str, Any]]) -> None:
    """Raise Insensitive unless wrong attention moves the logits of this very text by more than 10 %."""
    moved = sensitivity(case, outcomes)
    if not moved > SENSITIVE:
        raise Insensitive(f"wrong attention moves the logits of {case.id} by only {moved:.2%}")


def chosen(case: Case, outcomes: list[dict[str, Any]]) -> Tensor:
    """The tokens [batch, 1 + steps] of all replicas, each as the first rank of its last stage has them."""
    tokens = torch.zeros(case.workload.batch, 1 + case.steps, dtype=torch.int64)
    for replica, rows in enumerate(replica_rows(case.layout, case.workload.batch)):
        tokens[rows.start : rows.stop] = _tokens(outcomes[_ranks(case, replica, case.layout.pp - 1)[0]])
    return tokens


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
        error = relative_error(actual, expected) if actual.numel() else 0.0
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
    _judge_cache(case, outcomes, verdict)
    for rank, outcome in enumerate(outcomes):
        _judge_counts(case, rank, outcome, verdict)
    return verdict


def _half(case: Case, layer: int, dtype: torch.dtype) -> Tensor:
    """The attention half of a layer on the random hidden states: [batch, seq + 1, D], NaN where there is no token."""
    rounded = max(torch.float32, run_dtype(case), key=lambda d: d.itemsize)
    x = upstream(case).to(rounded if case.layout.residual_dtype == "fp32" else run_dtype(case)).to(dtype)
    expected, seq = torch.full_like(x, float("nan")), case.workload.seq
    for length, rows in by_length(case).items():
        at = [*range(length), *[seq] * (case.steps > 0)]
        index = torch.tensor(rows)[:, None], torch.tensor(at)
        expected[index] = reference(case, dtype=dtype).attention(layer, x[index])
    return expected


def _judge_halves(case: Case, outcomes: list[dict[str, Any]], verdict: Verdict) -> None:
    """The attention half of each stage's first layer, from random hidden states, on every rank, of its own tokens.

    In 16 bits all ranks of a stage are compared at once: of a few tokens even the floor is mostly chance.
    """
    layout, wide = case.layout, case.workload.element_bytes > 2
    tokens = torch.zeros(layout.pp, case.workload.batch, case.workload.seq + 1)
    layers = balanced(case.model.num_layers, layout.pp)
    expected = [_half(case, span.start, torch.float64) for span in layers]
    exists = ~expected[0].isnan().any(-1)
    pairs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    for rank, outcome in enumerate(outcomes):
        at = layout.coordinates(rank)
        rows = replica_rows(layout, case.workload.batch)[at.dp]
        rows, half = slice(rows.start, rows.stop), outcome["half"]
        held = exists[rows] & outcome["held"]
        tokens[at.pp, rows] += held
        pairs[at.pp].append((half[held], expected[at.pp][rows][held]))
        for phase, span in (("prefill", slice(0, -1)), ("decode", slice(-1, None))) if wide else ():
            mine, bound = held[:, span], FP64_BOUND if case.workload.dtype == "float64" else FP32_ATTENTION_BOUND
            verdict.compare(
                f"attention {phase} of rank {rank}", half[:, span][mine], expected[at.pp][rows, span][mine], bound
            )
    each = 1 if layout.residual == "sharded" else layout.tp
    verdict.equal("ranks that hold each token", (tokens[:, exists] == each).all().item(), True)
    for span, found, truth in zip(layers, pairs, expected, strict=True) if not wide else ():
        floor = relative_error(_half(case, span.start, run_dtype(case))[exists], truth[exists])
        actual, theirs = (torch.cat(parts) for parts in zip(*found, strict=True))
        verdict.compare(f"attention of layer {span.start}", actual, theirs, floor_factor(case) * floor)


def _judge_logits(case: Case, outcomes: list[dict[str, Any]], verdict: Verdict) -> None:
    """Logits of every rank of the last stage, and the tokens they led to on all stages that hold them."""
    tokens = chosen(case, outcomes)
    expected = logits(case, tokens)
    for replica, rows in enumerate(replica_rows(case.layout, case.workload.batch)):
        mine = slice(rows.start, rows.stop)
        for rank in _ranks(case, replica, case.layout.pp - 1):
            actual, choice = _logits(outcomes[rank]), _tokens(outcomes[rank]).tolist()
            verdict.equal(f"greedy tokens of rank {rank}", choice, _greedy(actual, case.stop_token))
            verdict.equal(f"tokens of rank {rank}", choice, tokens[mine].tolist())
            if case.workload.dtype == "float64":
                _compare_steps(verdict, rank, actual, expected[mine])
        for rank in _ranks(case, replica, 0):
            verdict.equal(f"last tokens at rank {rank}", outcomes[rank]["last"].tolist(), tokens[mine, -1].tolist())
    if case.workload.dtype != "float64":
        _compare_with_floor(verdict, case, outcomes, tokens, expected)


def _compare_steps(verdict: Verdict, rank: int, actual: Tensor, expected: Tensor) -> None:
    verdict.compare(f"prefill logits of rank {rank}", actual[:, 0], expected[:, 0], FP64_BOUND)
    for step in range(1, actual.shape[1]):
        verdict.compare(f"decode logits of rank {rank}, step {step}", actual[:, step], expected[:, step], FP64_BOUND)


def _compare_with_floor(verdict: Verdict, case: Case, outcomes: list[dict], tokens: Tensor, expected: Tensor) -> None:
    """One figure for all steps and replicas: of a few tokens even the floor is mostly chance."""
    bound = floor_factor(case) * relative_error(logits(case, tokens, dtype=run_dtype(case)), expected)
    ends = [_ranks(case, replica, case.layout.pp - 1) for replica in range(case.layout.dp)]
    for ranks in zip(*ends, strict=True):
        actual = torch.cat([_logits(outcomes[rank]) for rank in ranks])
        verdict.compare(f"logits of ranks {ranks}", actual, expected, bound)


def _logits(outcome: dict[str, Any]) -> Tensor:
    """What a rank of the last stage computed: [rows, 1 + steps, vocab]."""
    return torch.cat([outcome["prefill"][:, None], outcome["decode"].transpose(0, 1)], dim=1)


def _tokens(outcome: dict[str, Any]) -> Tensor:
    """What a rank of the last stage chose: [rows, 1 + steps]."""
    return torch.cat([outcome["first"][None], outcome["tokens"]]).t()


def _ranks(case: Case, replica: int, stage: int) -> list[int]:
    places = [case.layout.coordinates(rank) for rank in range(case.ranks)]
    return [rank for rank, at in enumerate(places) if (at.dp, at.pp) == (replica, stage)]


def _greedy(actual: Tensor, stop_token: int | None) -> list[list[int]]:
    """The tokens that these logits [rows, 1 + steps, vocab] choose; after the stop token only more of it."""
    chosen = actual.argmax(-1).tolist()
    for row in chosen:
        if stop_token in row:
            end = row.index(stop_token)
            row[end:] = [stop_token] * (len(row) - end)
    return chosen


def _judge_cache(case: Case, outcomes: list[dict[str, Any]], verdict: Verdict) -> None:
    """All caches together are the model's, once; every slot of a token is written, and no other is."""
    model, workload, layout = case.model, case.workload, case.layout
    once = model.num_layers * workload.batch * workload.cache_positions * model.num_kv_heads * model.head_dim
    cut = layout.attention == "cut"
    copies = max(1, layout.num_head_groups // model.num_kv_heads) if cut else 1  # tp beyond the KV heads
    keys = layout.num_dim_slices if layout.exchange == "gather" else 1  # whole in the head group
    held = sum(outcome["cache_bytes"] for outcome in outcomes)
    verdict.equal("bytes of all caches", held, (keys + 1) * copies * once * workload.element_bytes)
    for rank, outcome in enumerate(outcomes):
        shape = cache_shape(model, layout, workload, rank)
        verdict.equal(f"cache bytes of rank {rank}", outcome["cache_bytes"], shape.elements * workload.element_bytes)
        positions = torch.arange(workload.cache_positions)
        if layout.exchange == "sequence":
            positions = positions[layout.coordinates(rank).slice :: layout.num_dim_slices]
        owned = owned_rows(layout, workload.batch, rank)
        ends = torch.tensor(workload.lengths)[owned.start : owned.stop] + case.steps
        for name, written in zip(("keys", "values"), outcome["written"], strict=True):
            right = torch.equal(written, positions < ends[:, None])
            verdict.equal(f"{name} of rank {rank} written where they should be", right, True)


def _judge_counts(case: Case, rank: int, outcome: dict[str, Any], verdict: Verdict) -> None:
    """What was issued, computed and stored, against the predictions."""
    args = (case.model, case.layout, case.workload, rank)
    decode = Counter(
        {call: count * case.steps for call, count in decode_collectives(*args).items()} if case.steps else {}
    )
    _same_calls(verdict, f"prefill of rank {rank}", outcome["prefill_issued"], prefill_collectives(*args))
    _same_calls(verdict, f"decode of rank {rank}", outcome["decode_issued"], decode)
    steps = sum(decode_flops(*args, step) for step in range(case.steps))
    verdict.equal(f"prefill FLOPs of rank {rank}", outcome["prefill_flops"], prefill_flops(*args))
    verdict.equal(f"decode FLOPs of rank {rank}", outcome["decode_flops"], steps)
    e = case.workload.element_bytes
    verdict.equal(f"weight bytes of rank {rank}", outcome["weight_elements"] * e, parameters_bytes(*args[:2], rank, e))
    verdict.equal(f"largest buffer of rank {rank}", outcome["buffer_bytes"], predict(*args).communication_buffer_bytes)


def _same_calls(verdict: Verdict, what: str, issued: list[tuple], predicted: Counter[Collective]) -> None:
    actual = Counter(Collective(*call) for call in issued)
    if actual != predicted:
        verdict.complaints.append(f"{what}: issued but not predicted {actual - predicted}, else {predicted - actual}")
