"""The watchers see what is there: floating-point operations as torch's own counter, and every new tensor."""

from dataclasses import replace

import pytest
import torch
from case import Case, prompts
from cases import TINY
from watch import Allocations, Flops
from worker import build

from headgrid.layout.layout import Layout
from headgrid.runtime.engine import Engine
from headgrid.runtime.mesh import GroupPool, Mesh
from headgrid.runtime.meter import flop_counter
from headgrid.spec.workload import Workload

WORKLOAD = Workload(batch=3, seq=8, decode_steps=2, dtype="float32")
RUNS = {
    "plain": (TINY, WORKLOAD),
    "window, cap": (replace(TINY, sliding_window=3, attn_logit_softcapping=3.0), WORKLOAD),
    "gelu_tanh, biases": (replace(TINY, activation="gelu_tanh", linear_bias=("qkv", "o", "mlp")), WORKLOAD),
    "ragged chunks": (TINY, replace(WORKLOAD, chunk_positions=3, prompt_lengths=(8, 1, 5))),
    "bidirectional": (replace(TINY, is_causal=False), replace(WORKLOAD, decode_steps=0)),
}


def _run(engine: Engine, case: Case) -> None:
    engine.prefill(prompts(case))
    if case.steps:
        engine.decode(case.steps)


@pytest.mark.parametrize("name", RUNS)
def test_operations_are_counted_as_torch_counts_them(name: str) -> None:
    case = Case(name, RUNS[name][0], Layout(), RUNS[name][1], seed=1)
    engine = build(case, Mesh(case.layout, GroupPool(0)))
    with flop_counter() as theirs:
        _run(engine, case)
    with Flops() as ours:
        _run(engine, case)
    assert ours.total == theirs.get_total_flops() > 0


def test_new_storages_are_seen_and_views_are_not() -> None:
    x = torch.zeros(5, 4)
    with Allocations() as watch:
        x.view(20).add_(1)[:3].t()
    assert (watch.largest, watch.seen) == (0, 0)
    with Allocations() as watch, torch.inference_mode():
        (x @ x.t())[:1].clone()
    assert (watch.largest, watch.seen) == (25, 2)
