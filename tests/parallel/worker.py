"""What the ranks of a pool do: every case in turn, each rank leaving what it computed and issued in a file.

Nothing is judged here; `oracle.py` does that, in the process of the tests.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import standing_ranks
import torch
from case import Case, prompts, upstream
from corruption import run_corruptions
from faults import inject
from torch import Tensor
from watch import Allocations, Flops, UnderWay

from headgrid.experiment.observe import Settle
from headgrid.layout.batching import Call, MicroBatch
from headgrid.layout.memory import cache_shape
from headgrid.layout.shards import Shard
from headgrid.layout.span import Span
from headgrid.runtime.attention import Queries
from headgrid.runtime.cache import new_arena
from headgrid.runtime.collectives import Recorder
from headgrid.runtime.engine import Engine
from headgrid.runtime.hidden import Hidden
from headgrid.runtime.layer import load
from headgrid.runtime.mesh import GroupPool, Mesh
from headgrid.runtime.meter import LiveBytes
from headgrid.runtime.stage import StageCall, prefill_call
from headgrid.runtime.weights import draw, whole


def serve(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    """The job: cases, as they come."""
    pool = GroupPool(rank)

    def do(case: Case) -> dict[str, Any]:
        with inject(case, rank) as alter:
            return _run_case(case, pool, alter)

    standing_ranks.serve(rank, Path(payload["folder"]), do)


def _run_case(case: Case, pool: GroupPool, alter: Callable[[Engine], None]) -> dict[str, Any]:
    mesh = Mesh(case.layout, pool)
    if case.watched:
        return _watched(case, mesh)
    engine = build(case, mesh)
    alter(engine)
    if case.corrupted_rank is not None:
        return run_corruptions(case, engine, prompts(case), pool.rank)
    if case.memory:
        return _peak(engine, prompts(case))
    half = _attention_halves(case, engine)
    for part in (engine.stage.cache.keys, engine.stage.cache.values):
        part.fill_(float("nan"))
    return half | _generate(case, engine, prompts(case))


def get_weight(case: Case) -> Callable[[str, Shard], Tensor]:
    dtype = getattr(torch, case.workload.dtype)
    return lambda name, shard: draw(case.model, case.seed, name, shard, dtype=dtype)


def build(case: Case, mesh: Mesh, get: Callable[[str, Shard], Tensor] | None = None) -> Engine:
    model, layout, workload = case.model, case.layout, case.workload
    weights = load(model, layout, mesh.rank, get or get_weight(case))
    elements = cache_shape(model, layout, workload, mesh.rank).elements
    arena = new_arena(elements, getattr(torch, workload.dtype), torch.device("cpu"))
    stops = () if case.stop_token is None else (case.stop_token,)
    return Engine(model, layout, workload, mesh, weights, arena, stops)


@torch.inference_mode()
def _attention_halves(case: Case, engine: Engine) -> dict[str, Tensor]:
    """This stage's first attention half on random hidden states: [rows, seq + 1, D], and which tokens are held here.

    The last position is that of the first decoded token.
    """
    stage, plan = engine.stage, list(engine.prefill_plan)
    x = upstream(case)[engine.rows.start : engine.rows.stop].to(stage.residual_dtype)
    found, held = torch.zeros_like(x, dtype=stage.dtype), torch.zeros(x.shape[:2], dtype=torch.bool)
    if case.layout.weights == "gathered":  # its own prefill takes whole prompts; here the stored slices do
        plan = [Call(call.micro_batch, Span(0, case.workload.seq)) for call in plan]
    calls = [(prefill_call(case.model, case.workload, call, stage.device), call.positions) for call in plan]
    if case.steps:
        end = Span(case.workload.seq, case.workload.seq + 1)
        calls += [(_decode_call(engine, mb), end) for mb in engine.decode_plan]
    for call, positions in calls:
        rows = [row - engine.rows.start for row in call.micro_batch.rows()]
        part = x[rows, positions.start : positions.stop].flatten(0, 1)
        own = stage.residual_of(len(positions)).own(len(part))
        own, result, mine = (
            slice(own.start, own.stop),
            torch.zeros_like(part, dtype=stage.dtype),
            held.new_zeros(len(part)),
        )
        result[own], mine[own] = stage.attention_half(stage.layers[0], 0, Hidden(part[own]), call), True
        where = rows, slice(positions.start, positions.stop)
        found[where] = result.view(len(rows), len(positions), -1)
        held[where] = mine.view(len(rows), len(positions))
    return {"half": found, "held": held}


def _decode_call(engine: Engine, mb: MicroBatch) -> StageCall:
    """The first step behind the prompts."""
    starts = tuple(engine.lengths[row - engine.rows.start] for row in mb.rows())
    return StageCall(mb, Queries(1, starts, torch.tensor(starts), decoding=True), range(mb.size))


def _peak(engine: Engine, tokens: Tensor) -> dict[str, Any]:
    """The most bytes of new tensors that were alive at once in a prefill, and of one that a collective wrote."""
    recorder = Recorder()
    with engine.mesh.observed(recorder), engine.mesh.observed(Settle()), LiveBytes() as live:
        engine.prefill(tokens)
    found = {"peak_bytes": live.peak_bytes, "buffer_bytes": recorder.largest_buffer_bytes}
    if engine.workload.decode_steps:
        with engine.mesh.observed(Settle()), LiveBytes() as live:
            engine.decode(1)
        found["decode_peak_bytes"] = live.peak_bytes
    return found


def _watched(case: Case, mesh: Mesh) -> dict[str, Any]:
    """The elements of the largest tensor that comes to be while weights are loaded and used."""
    get = get_weight(case)

    def slicing(name: str, shard: Shard) -> Tensor:
        part = tuple(slice(0, size) for size in shard.local_shape)
        return get(name, whole(shard.shape))[part].clone()

    with Allocations() as watch:
        engine = build(case, mesh, slicing if case.fault else get)
        engine.prefill(prompts(case))
        if case.steps:
            engine.decode(case.steps)
    return {"largest": watch.largest, "seen": watch.seen}


def _own_positions(case: Case, engine: Engine) -> Tensor:
    """The position of each slot of this rank's cache: with `sequence` those that it owns."""
    positions = torch.arange(case.workload.cache_positions)
    by_owner = case.layout.exchange == "sequence"
    return positions[engine.mesh.at.slice :: engine.mesh.tp_slice.size] if by_owner else positions


def _forget_padding(case: Case, engine: Engine) -> None:
    """NaN in every slot behind a sequence's own prompt: whatever a prefill left there must not matter."""
    lengths = case.workload.lengths[engine.stage.owned.start : engine.stage.owned.stop]
    for row, length in enumerate(lengths):
        behind = _own_positions(case, engine) >= length
        for part in (engine.stage.cache.keys, engine.stage.cache.values):
            part[:, row, behind] = float("nan")


def _written(part: Tensor) -> Tensor:
    """Slots of a cache [layers, rows, positions, ...] that hold numbers, all and only numbers: [rows, positions]."""
    finite = part.isfinite().movedim(0, 2).flatten(2)
    return finite.all(2) & finite.any(2) if finite.numel() else torch.ones(finite.shape[:2], dtype=torch.bool)


def _generate(case: Case, engine: Engine, tokens: Tensor) -> dict[str, Any]:
    """Prefill, then greedy decode: steps that stay in flight across tokens, then one that goes on from there."""
    recorders, counters = (Recorder(), Recorder()), (Flops(), Flops())
    # gathered weights are always under way beside what the head groups reduce
    under_way = UnderWay(("tp_head",) if case.layout.weights == "gathered" else ("tp", "tp_slice"))
    with engine.mesh.observed(recorders[0]), engine.mesh.observed(under_way), counters[0]:
        engine.prefill(tokens)
    first, logits = engine.tokens.clone(), engine.logits.clone()
    _forget_padding(case, engine)
    with engine.mesh.observed(recorders[1]), counters[1]:
        parts = [steps for steps in (case.steps - 1, 1) if steps > 0] if case.steps else []
        decoded = [engine.decode(steps, keep_logits=True) for steps in parts]
    cache = engine.stage.cache
    return {
        "first": first,
        "prefill": logits,
        "decode": torch.cat([part.logits for part in decoded if part.logits is not None] or [logits[None][:0]]),
        "tokens": torch.cat([part.tokens for part in decoded] or [first[None][:0]]),
        "last": engine.tokens.clone(),
        "prefill_issued": [(i.kind, i.axis, i.bytes) for i in recorders[0].issued],
        "decode_issued": [(i.kind, i.axis, i.bytes) for i in recorders[1].issued],
        "prefill_flops": counters[0].total,
        "decode_flops": counters[1].total,
        "buffer_bytes": recorders[0].largest_buffer_bytes,
        "under_way": under_way.most,
        "weight_elements": sum(x.numel() for x in engine.stage.weights.values()),
        "cache_bytes": cache.size_bytes,
        "written": [_written(part) for part in (cache.keys, cache.values)],
    }
