"""Gradients of the attention half on all ranks of a layout, beside those of the single-device reference.

Upstream values are random. With a replicated residual all ranks pass the same, with a sharded one those of their own
tokens; tokens behind a shorter prompt get 0, and so must not count.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from halves import (
    Alter,
    Case,
    build,
    hidden_states,
    is_attention,
    local_weights,
    one_partition,
    reference,
    whole_weights,
)
from simulated import Ranks, axes
from torch import Tensor

from headgrid.layout.batching import prefill_calls
from headgrid.layout.span import balanced
from headgrid.runtime.hidden import Hidden
from headgrid.runtime.layer import Weights
from headgrid.runtime.mesh import StageAxes
from headgrid.runtime.stage import prefill_call

EXACT = 1e-11
HALF = "layers.0.attention."
COPIED = (f"{HALF}norm.weight", f"{HALF}norm.bias", f"{HALF}o.bias")
"""Tensors that every rank holds whole, W_O's bias but where W_O is owned by output columns."""
PER_HEAD = (f"{HALF}q_norm.weight", f"{HALF}k_norm.weight")


def trainable(case: Case, **options: str) -> Case:
    """A case like this one, whose gradients are all there: one call, no copies of KV heads, at least two keys."""
    model, workload, n = case.model, case.workload, case.layout.num_head_groups
    if model.num_kv_heads % n:
        model = replace(model, num_heads=2 * n, num_kv_heads=n)
    seq = max(3, workload.seq)
    window = max(2, model.sliding_window) if model.sliding_window else 0
    model = replace(model, sliding_window=window, max_positions=seq)
    lengths = tuple(max(2, length) for length in workload.prompt_lengths)
    sizes = {"seq": seq, "decode_steps": 0, "chunk_positions": 0, "chunk_tokens": 16_384, "prompt_lengths": lengths}
    layout = replace(case.layout, **({"output": "reduce", "residual": "replicated"} | options))
    return Case(model, layout, replace(workload, **sizes), case.seed)


@dataclass(frozen=True, slots=True)
class Numbers:
    """Whole tensors: the attention half's weights, its input and its upstream gradient, both [b, s, D]."""

    weights: Weights
    x: Tensor
    upstream: Tensor


def numbers(case: Case) -> Numbers:
    """Those of a case."""
    _, padded = hidden_states(case)
    upstream = torch.randn(padded.shape, generator=torch.Generator().manual_seed(case.seed + 2), dtype=torch.float64)
    for row, length in enumerate(case.workload.lengths):
        upstream[row, length:] = 0
    return Numbers(whole_weights(case), padded, upstream)


def simulate(case: Case, given: Numbers, ranks: Ranks, alter: Alter | None = None) -> tuple[float, list[Weights]]:
    """The inner product of output and upstream, and each rank's gradients by local name; the input's is "x"."""
    (call,) = prefill_calls(case.layout, case.workload, 0)

    def job(rank: int, mesh: StageAxes) -> tuple[float, Weights]:
        local = {name: tensor.clone() for name, tensor in local_weights(case, rank, given.weights).items()}
        stage = build(case, mesh, rank, local, with_cache=False)
        if alter is not None:
            alter(stage)
        stage_call = prefill_call(case.model, case.workload, call, given.x.device)
        own, rows = stage.residual.own(stage_call.tokens), call.micro_batch.rows()
        x, upstream = (each[rows].flatten(0, 1)[own.start : own.stop].clone() for each in (given.x, given.upstream))
        leaves = {name: tensor.requires_grad_() for name, tensor in local.items() if is_attention(name)}
        leaves["x"] = x.requires_grad_()
        out = stage.attention_half(stage.layers[0], 0, Hidden(x), stage_call)
        grads = torch.autograd.grad(out, list(leaves.values()), upstream)
        return (out.detach() * upstream).sum().item(), dict(zip(leaves, grads, strict=True))

    with one_partition():
        found = ranks.run([lambda r=r, mesh=mesh: job(r, mesh) for r, mesh in enumerate(axes(case.layout, ranks))])
    products, gradients = zip(*found, strict=True)
    return sum(products) if case.layout.residual == "sharded" else products[0], list(gradients)


def expected(case: Case, given: Numbers) -> Weights:
    """The reference's gradients, whole, by global name; the input's is "x"."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.weights.items()}
    leaves["x"] = given.x.clone().requires_grad_()
    outs = reference(case, leaves["x"], leaves)
    upstream = [given.upstream[row, :length] for row, length in enumerate(case.workload.lengths)]
    return dict(zip(leaves, torch.autograd.grad(outs, list(leaves.values()), upstream), strict=True))


def owned(case: Case, whole: Weights, rank: int) -> Weights:
    """What a rank holds of whole tensors, by local name."""
    local = local_weights(case, rank, {name: tensor for name, tensor in whole.items() if name != "x"})
    tokens = whole["x"].flatten(0, 1)
    if case.layout.residual == "sharded":
        own = balanced(len(tokens), case.layout.tp)[rank]
        tokens = tokens[own.start : own.stop]
    return {name: tensor for name, tensor in local.items() if is_attention(name)} | {"x": tokens}


def shared(case: Case, name: str) -> Callable[[int], list[int]] | None:
    """Whose gradients of this tensor must be added up to the whole one (which a rank then holds a part of)."""
    n, m = case.layout.num_head_groups, case.layout.num_dim_slices
    if name in PER_HEAD:
        return lambda rank: [i * m + rank % m for i in range(n)]
    if case.layout.residual == "sharded" and name in COPIED:
        return lambda rank: list(range(n * m))
    return None


def compare(case: Case, ranks: Ranks, alter: Alter | None = None) -> dict[str, float]:
    """The largest relative L2 error of any rank, of every gradient; infinite for NaN."""
    given = numbers(case)
    _, actual = simulate(case, given, ranks, alter)
    truth, errors = expected(case, given), dict.fromkeys(actual[0], 0.0)
    for rank in range(case.layout.ranks):
        for name, grad in owned(case, truth, rank).items():
            group = shared(case, name)
            mine = sum(actual[r][name] for r in group(rank)) if group else actual[rank][name]
            size = truth["x"].norm() if name == "x" else grad.norm()  # a rank's own tokens may all be padding
            error = ((mine - grad).norm() / size).nan_to_num(torch.inf).item()
            errors[name] = max(errors[name], error)
    return errors


def predicted_slope(case: Case, gradients: list[Weights], direction: Weights) -> float:
    """The change of the inner product along a direction in all whole tensors at once, by the ranks' gradients."""
    slope = 0.0
    for rank, grads in enumerate(gradients):
        for name, along in owned(case, direction, rank).items():
            copied = name == "x" or (name in COPIED and not (name == COPIED[2] and case.layout.output == "concat"))
            if rank == 0 or not copied or case.layout.residual == "sharded":
                slope += (grads[name] * along).sum().item()
    return slope
