"""The pass that is watched: one prefill, then some decode steps, of one arm. Not timed, and after all that is timed."""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from headgrid.experiment.breakdown import calls as calls_
from headgrid.experiment.breakdown import gpu, perfetto
from headgrid.experiment.breakdown.calls import Call
from headgrid.experiment.breakdown.perfetto import Bar
from headgrid.experiment.breakdown.watch import HostClock, Log
from headgrid.layout.layout import Layout
from headgrid.layout.traffic import Collective, decode_collectives, prefill_collectives
from headgrid.runtime.collectives import barrier
from headgrid.runtime.engine import Engine
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

DECODE_STEPS = 8
"""Watched at once: of a single step a pipeline would show little but how it fills, and stamps are microseconds off."""
DEVICE_SOURCE = "torch.profiler: kernels and copies of the device"
ACCOUNT = ("compute_s", "exposed_s", "idle_s", "hidden_s", "lead_s", "span_s")
HOST_SOURCE = "clocks of the rank's main thread: CPU time, time in run queues, waits for collectives"


@dataclass(frozen=True, slots=True)
class Watched:
    """What one rank found: JSON, so that it can be told. `bars` for the trace."""

    report: dict[str, Any]
    bars: list[Bar]


def breakdown(
    engine: Engine, model: ModelSpec, workload: Workload, prompts: Tensor, folder: Path | None
) -> list[dict[str, Any]]:
    """Watch one prefill and, where there is decode, up to `DECODE_STEPS` steps. Collective over all ranks.

    Returns the values of a record for each phase (docs/run-folder.md) on rank 0, elsewhere nothing. Traces are written
    into `folder`, the run's.
    """
    found = [_phase(engine, model, workload, "prefill", 1, lambda log: engine.prefill(prompts, observe=log), folder)]
    if workload.decode_steps:
        if workload.decode_steps > 1:
            engine.decode(1)
        steps = min(DECODE_STEPS, max(1, workload.decode_steps - 1))
        found.append(
            _phase(engine, model, workload, "decode", steps, lambda log: engine.decode(steps, observe=log), folder)
        )
    return [record for record in found if record is not None]


def _phase(
    engine: Engine,
    model: ModelSpec,
    workload: Workload,
    phase: str,
    steps: int,
    run: Callable[[Log], object],
    folder: Path | None,
) -> dict[str, Any] | None:
    layout, rank = engine.layout, engine.mesh.rank
    on_gpu = engine.device.type == "cuda"
    watched = _on_gpu(engine, model, workload, run) if on_gpu else _on_host(engine, model, workload, run)
    predicted = (prefill_collectives if phase == "prefill" else decode_collectives)(model, layout, workload, rank)
    due = {call: number * steps for call, number in predicted.items()}
    report = watched.report
    report["as_predicted"] = _as_predicted(report["calls"], due)
    bars, cut = perfetto.first_bars(watched.bars, perfetto.MAX_EVENTS // layout.ranks)
    report |= {"cut": cut, "bars": [bar.to_json() for bar in bars]}
    everyone = _gather(report, engine.device)
    if rank:
        return None
    source = DEVICE_SOURCE if on_gpu else HOST_SOURCE
    record = {"phase": phase, "steps": steps, "source": source, **_record(everyone, layout)}
    return record | {"trace": _write_trace(everyone, layout, phase, folder, source)}


def _as_predicted(listed: list[list[Any]], due: dict[Collective, int]) -> bool:
    found: dict[Collective, int] = {}
    for kind, axis, size, *_ in listed:
        call = Collective(kind, axis, size)
        found[call] = found.get(call, 0) + 1
    return found == due


def _on_gpu(engine: Engine, model: ModelSpec, workload: Workload, run: Callable[[Log], object]) -> Watched:
    log = Log(engine, model, workload, None)
    with log.watching(engine):
        pass_ = gpu.profiled(engine.device, lambda: run(log))
    step = pass_.unavailable or _device_step(pass_, log, alone=engine.layout.ranks == 1)
    report: dict[str, Any] = {"step": pass_.step, "unavailable": None, "unmatched": None, "account": None}
    report["clock"] = None, 0
    if isinstance(step, str):
        return Watched(report | {"unavailable": step, "calls": [call.to_json() for call in log.untimed()]}, [])
    whole = step.account
    values = (whole.compute, whole.exposed, whole.idle, whole.hidden, whole.lead, whole.span)
    account = dict(zip(ACCOUNT, values, strict=True))
    told = {"account": account, "unmatched": step.unmatched, "calls": [call.to_json() for call in step.calls]}
    return Watched(report | told, step.bars)


def _device_step(pass_: gpu.Profiled, log: Log, *, alone: bool) -> gpu.DeviceStep | str:
    """What a rank's events make of its step. Events of another version must not end a run: they give a reason."""
    try:
        return gpu.device_step(pass_.events, log.calls, alone=alone)
    except (LookupError, TypeError, ValueError) as error:
        return f"torch.profiler's events are not as expected ({type(error).__name__}: {error})"


def _on_host(engine: Engine, model: ModelSpec, workload: Workload, run: Callable[[Log], object]) -> Watched:
    clock = HostClock()
    log = Log(engine, model, workload, clock)
    with log.watching(engine):
        barrier(engine.device)
        start = clock.start()
        run(log)
        end = clock.enter()
    clock.close()
    idle = None if clock.without_queue else clock.queued
    account = dict(zip(ACCOUNT, (clock.ran, clock.waited, idle, None, None, None), strict=True))
    report = {"step": end - start, "unavailable": None, "unmatched": None, "account": account}
    report |= {"calls": [call.to_json() for call in log.host_calls()], "without_idle": clock.without_queue}
    report["clock"] = _boot(), start
    return Watched(report, log.host_bars(start))


def _boot() -> str | None:
    """Which start of which host: processes with the same one read the same monotonic clock. None: not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _record(everyone: list[dict[str, Any]], layout: Layout) -> dict[str, Any]:
    """What all ranks found, in seconds."""
    rows, unmatched = calls_.rows([[Call(*row) for row in each["calls"]] for each in everyone], layout)
    return {
        "unavailable": _first(each["unavailable"] for each in everyone),
        "unmatched": _first(each["unmatched"] for each in everyone) or unmatched,
        "without_idle": _first(each.get("without_idle") for each in everyone),
        "as_predicted": all(each["as_predicted"] for each in everyone),
        "ranks": [_rank(each) for each in everyone],
        "calls": rows,
    }


def _first(reasons: Iterable[str | None]) -> str | None:
    """The first rank's reason that has one."""
    return next((f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason), None)


def _rank(each: dict[str, Any]) -> dict[str, float | None]:
    account = each["account"] or dict.fromkeys(ACCOUNT)
    return {"step_s": each["step"] / 1e9} | {key: None if ns is None else ns / 1e9 for key, ns in account.items()}


def _write_trace(
    everyone: list[dict[str, Any]], layout: Layout, phase: str, folder: Path | None, source: str
) -> dict[str, Any] | None:
    """The ranks' bars as one file, and what the record says of it; None where there is nothing to draw."""
    if folder is None or not any(each["bars"] for each in everyone):
        return None
    ranks = [(_called(layout, rank), _aligned(each, everyone)) for rank, each in enumerate(everyone)]
    cut = next((each["cut"] for each in everyone if each["cut"]), None)
    about = {"layout": str(layout), "phase": phase, "source": source, "cut": cut}
    data, name = perfetto.packed(perfetto.document(ranks, about)), perfetto.file_name(str(layout), phase)
    try:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    except OSError as error:
        return {"file": None, "why": f"{name} could not be written: {error}"}
    events = sum(len(bars) for _, bars in ranks)
    return {"file": name, "sha256": hashlib.sha256(data).hexdigest(), "events": events, "cut": cut}


def _called(layout: Layout, rank: int) -> str:
    at = layout.coordinates(rank)
    sizes = (layout.dp, layout.pp, layout.num_head_groups, layout.num_dim_slices)
    places = zip(("replica", "stage", "head group", "slice"), (at.dp, at.pp, at.head_group, at.slice), strict=True)
    named = [f"{name} {place}" for (name, place), size in zip(places, sizes, strict=True) if size > 1]
    return f"rank {rank}" + (f" ({', '.join(named)})" if named else "")


def _aligned(each: dict[str, Any], everyone: list[dict[str, Any]]) -> list[Bar]:
    """A rank's bars behind the barrier; where all ranks read one clock, behind the first that left it."""
    clocks = [other["clock"] for other in everyone]
    shared = len({host for host, _ in clocks}) == 1 and clocks[0][0] is not None
    shift = each["clock"][1] - min(begun for _, begun in clocks) if shared else 0
    bars = [Bar(*row) for row in each["bars"]]
    return [replace(bar, start=bar.start + shift, end=bar.end + shift) for bar in bars]


def _gather(value: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """`value` of every rank, on rank 0; elsewhere nothing. As compressed JSON, since traces may be long."""
    data = bytearray(zlib.compress(json.dumps(value, allow_nan=False).encode(), 1))
    mine = torch.frombuffer(data, dtype=torch.uint8).to(device)
    size = torch.tensor([len(mine)], device=device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    padded = torch.zeros(int(torch.stack(sizes).max()), dtype=torch.uint8, device=device)
    padded[: len(mine)] = mine
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    if dist.get_rank():
        return []
    return [
        json.loads(zlib.decompress(part[: int(n)].cpu().numpy().tobytes()))
        for part, n in zip(parts, sizes, strict=True)
    ]
