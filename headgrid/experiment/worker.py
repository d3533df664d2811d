"""One launch of a comparison, as every rank runs it: build, verify, look, then time in the declared order.

Rank 0 writes the journal. Everything ranks tell each other travels as numbers or JSON in tensors, never pickled.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from headgrid.errors import InvalidInput
from headgrid.experiment.breakdown.measure import breakdown
from headgrid.experiment.design import SENSITIVE, Design, from_dict, rows_to_verify
from headgrid.experiment.journal import Journal
from headgrid.experiment.observe import CollectiveTimer, PeakMemory, Settle, StageClock, as_predicted, merge_totals
from headgrid.experiment.text import read_identified, token_rows
from headgrid.experiment.timing import Timing
from headgrid.experiment.verify import Oracle, Trace, Truth, judge, judge_control
from headgrid.experiment.weights import weights_of
from headgrid.layout.layout import Layout, Linears, parse_layout
from headgrid.layout.memory import cache_shape, predict
from headgrid.layout.placement import crossings, host_numbers
from headgrid.layout.traffic import decode_collectives, layer_collectives, prefill_collectives
from headgrid.runtime.cache import new_arena
from headgrid.runtime.collectives import Recorder, barrier
from headgrid.runtime.engine import Engine
from headgrid.runtime.hosts import host_id
from headgrid.runtime.mesh import GroupPool, Mesh


def gather_json(value: Any, device: torch.device) -> list[Any]:
    """`value` of every rank, on every rank."""
    data = torch.tensor(list(json.dumps(value, allow_nan=False).encode()), dtype=torch.uint8, device=device)
    size = torch.tensor([len(data)], device=device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    longest = int(torch.stack(sizes).max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [json.loads(bytes(part[: int(n)].tolist())) for part, n in zip(parts, sizes, strict=True)]


class Launch:
    """State of one launch on one rank."""

    def __init__(self, rank: int, design: Design, payload: dict[str, Any]) -> None:
        """Make the input, the groups and the cache arena; nothing is drawn yet. `payload` is that of `run_launch`.

        Raises InvalidInput if the text is not the declared one.
        """
        self.rank, self.design, self.index, self.attempt = rank, design, payload["launch"], payload["attempt"]
        cuda = design.device == "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self.dtype: torch.dtype = getattr(torch, design.workload.dtype)
        self.journal = Journal(Path(payload["folder"]) / "journal.jsonl") if rank == 0 else None
        self.pool = GroupPool(rank)
        self.who = gather_json(_identity(design.device), self.device)
        self.hosts = host_numbers([each["host"] for each in self.who])
        rows = token_rows(read_identified(design.text), design.workload.batch, design.workload.seq)
        self.input_sha256 = hashlib.sha256(b"".join(rows)).hexdigest()
        text = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), -1).long()
        self.prompts = text % design.model.vocab_size
        self.verified_rows = rows_to_verify(design, self.index)
        control = (parse_layout(design.control),) if design.control else ()
        elements = max(self._cache_elements(layout) for layout in (*design.layouts, *control))
        self.arena = new_arena(elements, self.dtype, self.device)
        self.weights = weights_of(design, self.pool, self.dtype, self.device)
        self.oracle = Oracle(
            design.model, self.weights.whole, self.dtype, self.device, self.prompts[self.verified_rows]
        )

    def _cache_elements(self, layout: Layout) -> int:
        return cache_shape(self.design.model, layout, self.design.workload, self.rank).elements

    def record(self, kind: str, **values: Any) -> None:
        """Append to the journal (rank 0)."""
        if self.journal is not None:
            record = {"kind": kind, "launch": self.index, "time_s": time.time(), **values}
            self.journal.append(record)

    def engine(self, layout: Layout) -> Engine:
        """The layout's groups, weights and engine; its cache shares the arena with the others'."""
        mesh, workload = Mesh(layout, self.pool), self.design.workload
        return Engine(self.design.model, layout, workload, mesh, self.weights.local(layout), self.arena)

    def agreed(self, value: Any) -> Any:
        """Rank 0's `value` on every rank: what all compute alike might still differ by a rounding between hosts."""
        return gather_json(value, self.device)[0]

    def share(self, x: Tensor) -> Tensor:
        """Sum over all ranks."""
        dist.all_reduce(x)
        return x

    def trace(self, engine: Engine) -> Trace:
        """Prefill and decode the whole batch; the verified rows' logits and tokens, on every rank."""
        workload, vocab = self.design.workload, self.design.model.vocab_size
        self.arena.fill_(float("nan"))  # keys of an earlier pass would hide one that is not written now
        engine.prefill(self.prompts)
        logits, tokens = engine.logits[None].clone(), engine.tokens[None].clone()
        decoded = engine.decode(workload.decode_steps, keep_logits=True)
        shape = (len(self.verified_rows), 1 + workload.decode_steps)
        all_logits = torch.zeros(*shape, vocab, dtype=torch.float32, device=self.device)
        all_tokens = torch.zeros(shape, dtype=torch.int64, device=self.device)
        if engine.stage.last and engine.mesh.tp.index == 0:
            assert decoded.logits is not None
            logits, tokens = torch.cat([logits, decoded.logits]), torch.cat([tokens, decoded.tokens])
            for n, row in enumerate(self.verified_rows):
                if engine.rows.start <= row < engine.rows.stop:
                    all_logits[n] = logits[:, row - engine.rows.start].float()
                    all_tokens[n] = tokens[:, row - engine.rows.start]
        return Trace(self.share(all_logits), self.share(all_tokens))

    def judged(self, engine: Engine) -> tuple[Trace, Truth]:
        """The arm's trace and the reference's logits for the same tokens; sequences are divided among ranks."""
        trace = self.trace(engine)
        return trace, self.truth(trace, engine.layout.linears)

    def truth(self, trace: Trace, linears: Linears) -> Truth:
        """The reference's logits for the tokens of a trace, and the floor of a device with such linears."""
        mine = range(self.rank, len(self.verified_rows), self.design.ranks)
        return self.oracle.truth(trace.tokens, list(mine), self.share, linears)


def run_launch(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    """Entry point of every rank. `payload`: design, folder, launch index, attempt, the blocks already done, and of the
    journal the pilot's record and the blocks of this launch that were run again.
    """
    begun = time.time()
    design = from_dict(payload["design"])
    launch = Launch(rank, design, payload)
    weights_sha256 = hashlib.sha256(launch.weights.identity.encode()).hexdigest()
    _ensure_same(launch, "input", launch.input_sha256, "the text must be the same file on every host")
    _ensure_same(launch, "weights", weights_sha256, "the checkpoint must be the same on every host")
    who = launch.who
    launch.record(
        "launch",
        design_hash=payload["design"]["hash"],
        environment_sha256=payload["environment_sha256"],
        ranks=ranks,
        attempt=launch.attempt,
        device_names=[each["device"] for each in who],
        device_uuids=[each["uuid"] for each in who],
        pids=[each["pid"] for each in who],
        hosts=list(launch.hosts),
        input_sha256=launch.input_sha256,
        weights_sha256=weights_sha256,
        start_s=begun - payload["started"],
        started_s=payload["started"],
    )
    sensitive = _run_control(launch)
    engines = {str(layout): launch.engine(layout) for layout in design.layouts}
    verified = {name: _examine(launch, engine, sensitive) for name, engine in engines.items()}
    arms = [arm for arm in design.arms if verified[arm.layout]]
    closing = Timing(launch, engines, arms, payload).run()
    if payload.get("breakdown", True):  # behind the blocks: a profiler that was once attached may leave something
        for name, engine in engines.items():
            if verified[name]:
                _break_down(launch, engine, Path(payload["folder"]))
    launch.record("end", completed=True, sentinels=closing)


def _ensure_same(launch: Launch, what: str, mine: str, why: str) -> None:
    """Raise InvalidInput on every rank if they do not all have the same."""
    found = gather_json(mine, launch.device)
    odd = [rank for rank, each in enumerate(found) if each != found[0]]
    if odd:
        numbers = f"ranks {', '.join(map(str, odd))} have another than rank 0"
        raise InvalidInput(f"ranks read different {what}", numbers=numbers, why=why)


def _identity(device: str) -> dict[str, Any]:
    """This rank's process, host and device, so that telemetry of them can be laid to it."""
    mine = {"pid": os.getpid(), "host": host_id()}
    if device != "cuda":
        return mine | {"device": "cpu", "uuid": None}
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    return mine | {"device": torch.cuda.get_device_name(), "uuid": uuid and f"GPU-{uuid}"}


def _run_control(launch: Launch) -> bool:
    """Run the softmax-per-slice control, which the floor of each kind of linears that an arm has must reject. True if
    it moves the logits enough for verification to mean something.

    One rank has no control and is trusted: whoever designs such a run has the same model in runs of more ranks.
    """
    design, proven = launch.design, True
    if design.control is None:
        return True
    trace = launch.trace(launch.engine(parse_layout(design.control)))
    kinds: set[Linears] = {"model", *(layout.linears for layout in design.layouts)}
    for linears in sorted(kinds, reverse=True):
        verdict = judge_control(trace, launch.truth(trace, linears), design.workload.dtype, design.ranks)
        launch.record("control", layout=design.control, linears=linears, **verdict)
        proven &= verdict["rejected"] and (verdict["sensitivity"] or 0) > SENSITIVE
    return proven


def _examine(launch: Launch, engine: Engine, sensitive: bool) -> bool:
    """Everything about one layout that is not timing. True if it is verified."""
    layout, design = str(engine.layout), launch.design
    labels = [arm.label for arm in design.arms if arm.layout == layout]

    def record(kind: str, values: dict[str, Any]) -> None:
        for label in labels:
            launch.record(kind, arm=label, **values)

    memory = _measure_memory(launch, engine)
    record("memory", memory)
    broken = _broken_predictions(memory)
    for phase in ("prefill", "decode"):
        traffic = _measure_traffic(launch, engine, phase)
        record("traffic", traffic)
        broken += [f"{phase} issues other collectives than predicted"] * (not traffic["as_predicted"])
    if engine.layout.pp > 1:
        record("pipeline", {"events": _measure_pipeline(launch, engine)})
    if launch.device.type == "cuda":
        engine.capture()
    trace, truth = launch.judged(engine)
    verdict = judge(trace, truth, design.workload.dtype, design.ranks, sensitive, broken)
    record("verify", {"of_sequences": design.workload.batch, **verdict})
    return verdict["verified"]


def _broken_predictions(memory: dict[str, Any]) -> list[str]:
    """What some rank holds that its layout does not predict. Activations are compared in the report: an allocator
    rounds, and on a CPU a library thread may hold a tensor a moment longer.
    """
    exact = ("parameters_bytes", "kv_cache_bytes", "communication_buffer_bytes")
    pairs = list(zip(memory["per_rank"], memory["predicted"], strict=True))
    return [f"{key} is not as predicted" for key in exact if any(a[key] != b[key] for a, b in pairs)]


def _measure_memory(launch: Launch, engine: Engine) -> dict[str, Any]:
    """A prefill under watch; figures of all ranks beside the layout's prediction."""
    meter, recorder, mesh = PeakMemory(launch.device), Recorder(), engine.mesh
    with mesh.observed(recorder):
        if launch.device.type == "cpu":
            with mesh.observed(Settle()), meter.watch():
                engine.prefill(launch.prompts)
        else:
            with meter.watch():
                engine.prefill(launch.prompts)
    mine = {
        "parameters_bytes": sum(x.numel() * x.element_size() for x in engine.stage.weights.values()),
        "kv_cache_bytes": engine.cache.size_bytes,
        "activations_peak_bytes": meter.peak_bytes,
        "communication_buffer_bytes": recorder.largest_buffer_bytes,
    }
    design = launch.design
    predicted = [asdict(predict(design.model, engine.layout, design.workload, rank)) for rank in range(design.ranks)]
    return {"per_rank": gather_json(mine, launch.device), "predicted": predicted, "measured_by": meter.measured_by}


def _measure_traffic(launch: Launch, engine: Engine, phase: str) -> dict[str, Any]:
    """One prefill, or one decode step after it, with every collective timed and counted."""
    recorder, timer, design = Recorder(), CollectiveTimer(launch.device), launch.design
    args = (design.model, engine.layout, design.workload, launch.rank)
    predicted = prefill_collectives(*args) if phase == "prefill" else decode_collectives(*args)
    if phase == "decode" and design.workload.decode_steps > 1:
        engine.decode(1)  # kernels are compiled at their first use
    barrier(launch.device)
    with engine.mesh.observed(recorder), engine.mesh.observed(timer):
        if phase == "prefill":
            engine.prefill(launch.prompts)
        else:
            engine.decode(1)
    mine = {"totals": timer.totals(layer_collectives(*args)), "as_predicted": as_predicted(recorder.issued, predicted)}
    everyone = gather_json(mine, launch.device)
    ops = merge_totals([each["totals"] for each in everyone])
    found = {"phase": phase, "ops": ops, "as_predicted": all(each["as_predicted"] for each in everyone)}
    if len(set(launch.hosts)) == 1:
        return found
    crossing = crossings(design.model, engine.layout, design.workload, launch.hosts, phase)
    return found | {"crossings": [asdict(each) for each in crossing]}


def _measure_pipeline(launch: Launch, engine: Engine) -> list[dict[str, Any]]:
    """When each stage computes which micro-batch, in a prefill and three decode steps; one rank for each stage."""
    clock = StageClock(engine.mesh.at.pp, launch.device)
    barrier(launch.device)
    if len(set(launch.hosts)) > 1:  # each host has a clock of its own: they have a common barrier
        clock.zero_s = time.monotonic()
    engine.prefill(launch.prompts, observe=clock)
    engine.decode(min(3, launch.design.workload.decode_steps), observe=clock)
    speaks = engine.mesh.tp.index == 0 and engine.mesh.at.dp == 0
    events = [event for each in gather_json(clock.events if speaks else [], launch.device) for event in each]
    begun = min(event["start_s"] for event in events)
    for event in events:
        event["start_s"] -= begun
        event["end_s"] -= begun
    return events


def _break_down(launch: Launch, engine: Engine, folder: Path) -> None:
    """Where a prefill and some decode steps spend their time, watched in a pass of their own."""
    design, layout = launch.design, str(engine.layout)
    for values in breakdown(engine, design.model, design.workload, launch.prompts, folder):
        for arm in (arm for arm in design.arms if arm.layout == layout):
            launch.record("breakdown", arm=arm.label, **values)
