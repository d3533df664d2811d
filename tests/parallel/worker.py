"""What the ranks of one world size do: every case in turn, each rank leaving what it computed and issued in a file.

Nothing is judged here; `oracle.py` does that, in the process of the tests.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import STEPS, Case
from corruption import run_corruptions
from faults import inject
from torch import Tensor

from headgrid.experiment.observe import Settle
from headgrid.layout.memory import cache_shape
from headgrid.layout.shards import Shard
from headgrid.runtime.attention import Position
from headgrid.runtime.cache import new_arena
from headgrid.runtime.collectives import Recorder
from headgrid.runtime.engine import Engine
from headgrid.runtime.mesh import GroupPool, Mesh
from headgrid.runtime.meter import LiveBytes, flop_counter
from headgrid.runtime.stage import load
from headgrid.runtime.weights import draw


def prompts(case: Case) -> Tensor:
    """Token ids [batch, seq], the same on every rank and in the tests."""
    shape = (case.workload.batch, case.workload.seq)
    return torch.randint(0, case.model.vocab_size, shape, generator=torch.Generator().manual_seed(case.seed))


def upstream(case: Case) -> Tensor:
    """Random hidden states [batch, seq + 1, D] in fp64, as if they came from the layers before."""
    shape = (case.workload.batch, case.workload.seq + 1, case.model.hidden_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(case.seed + 1), dtype=torch.float64)


def run(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    """The job: `payload["cases"]` in turn. What rank r finds for case k is `<folder>/<k>.<r>.pt`."""
    pool = GroupPool(rank)
    for number, case in enumerate(payload["cases"]):
        try:
            with inject(case, rank) as alter:
                outcome = _run_case(case, pool, alter)
        except Exception as error:
            traceback.print_exc()
            raise RuntimeError(f"in case {case.id}: {error!r}") from error
        torch.save(outcome, Path(payload["folder"]) / f"{number}.{rank}.pt")


def _run_case(case: Case, pool: GroupPool, alter: Callable[[Engine], None]) -> dict[str, Any]:
    mesh = Mesh(case.layout, pool)
    engine = build(case, mesh)
    alter(engine)
    if case.corrupted_rank is not None:
        return run_corruptions(case, engine, prompts(case), pool.rank)
    if case.memory:
        return _peak(engine, prompts(case))
    half = _attention_halves(case, engine)
    _poison(engine)
    return half | _generate(engine, prompts(case))


def build(case: Case, mesh: Mesh) -> Engine:
    dtype, rank = getattr(torch, case.workload.dtype), mesh.rank

    def get(name: str, shard: Shard) -> Tensor:
        return draw(case.model, case.seed, name, shard, dtype=dtype)

    weights = load(case.model, case.layout, rank, get)
    elements = cache_shape(case.model, case.layout, case.workload, rank).elements
    arena = new_arena(elements, dtype, torch.device("cpu"))
    return Engine(case.model, case.layout, case.workload, mesh, weights, arena)


def _poison(engine: Engine) -> None:
    for part in (engine.stage.cache.keys, engine.stage.cache.values):
        part.fill_(float("nan"))


@torch.inference_mode()
def _attention_halves(case: Case, engine: Engine) -> dict[str, Tensor]:
    """This stage's first attention half on random hidden states: [rows, seq, D], then one position more."""
    stage, seq = engine.stage, case.workload.seq
    x = upstream(case)[engine.rows.start : engine.rows.stop].to(stage.dtype)
    whole = torch.full_like(x, float("nan"))
    for plan, where, position in (
        (engine.prefill_plan, slice(0, seq), None),
        (engine.decode_plan, slice(seq, seq + 1), Position(seq, torch.tensor([seq]))),
    ):
        for mb in plan:
            rows = torch.tensor(mb.rows()) - engine.rows.start
            whole[rows, where] = stage._attention(stage.layers[0], 0, x[rows, where], mb, position)
    return {"half_prefill": whole[:, :seq], "half_decode": whole[:, seq:]}


def _peak(engine: Engine, tokens: Tensor) -> dict[str, Any]:
    """The most bytes of new tensors that were alive at once in a prefill."""
    with engine.mesh.observed(Settle()), LiveBytes() as live:
        engine.prefill(tokens)
    return {"peak_bytes": live.peak_bytes}


def _generate(engine: Engine, tokens: Tensor) -> dict[str, Any]:
    """Prefill, then greedy decode: steps that stay in flight across tokens, then one that goes on from there."""
    recorders = Recorder(), Recorder()
    with engine.mesh.observed(recorders[0]), flop_counter() as prefill_flops:
        engine.prefill(tokens)
    first, logits = engine.tokens.clone(), engine.logits.clone()
    with engine.mesh.observed(recorders[1]), flop_counter() as decode_flops:
        decoded = [engine.decode(steps, keep_logits=True) for steps in (STEPS - 1, 1)]
    cache = engine.stage.cache
    return {
        "first": first,
        "prefill": logits,
        "decode": torch.cat([part.logits for part in decoded if part.logits is not None] or [logits[:0]]),
        "tokens": torch.cat([part.tokens for part in decoded]),
        "last": engine.tokens.clone(),
        "prefill_issued": [(i.kind, i.axis, i.bytes) for i in recorders[0].issued],
        "decode_issued": [(i.kind, i.axis, i.bytes) for i in recorders[1].issued],
        "prefill_flops": prefill_flops.get_total_flops(),
        "decode_flops": decode_flops.get_total_flops(),
        "buffer_bytes": recorders[0].largest_buffer_bytes,
        "weight_elements": sum(x.numel() for x in engine.stage.weights.values()),
        "cache_filled": bool(cache.keys.isfinite().all() and cache.values.isfinite().all()),
    }
