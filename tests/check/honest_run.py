"""A run folder as an untouched run leaves it: predictions from the layouts, times near those of 4 H200, two clocks."""

import dataclasses
import hashlib
import json
import random
from pathlib import Path
from typing import Any

from headgrid.experiment.design import Design, Protocol, allowed_multiple, declare, rows_to_verify
from headgrid.experiment.folder import write_json
from headgrid.experiment.journal import Journal, seal
from headgrid.experiment.pilot import PilotRule, settle
from headgrid.experiment.summary import summary_of
from headgrid.experiment.text import BUILTIN, identify, read_identified, token_rows
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.memory import predict
from headgrid.layout.traffic import decode_collectives, layer_collectives, prefill_collectives
from headgrid.spec.model import find_model
from headgrid.spec.workload import Workload

Record = dict[str, Any]
SOURCE = "5a" * 32
"""The hash of the source that made the run, and that checks it."""
PREFILL_S = {"tp2pp2": 5.12, "tp4": 6.09, "dp4": 4.21, "n2m2:batch": 6.38}
DECODE_S = {"tp2pp2": 0.691, "tp4": 0.675, "dp4": 0.684, "n2m2:batch": 0.699}
RULE = PilotRule(block_s=15.0, most_block_s=60.0, least_turns=4)
"""Three turns a block."""
RERUN = 1, 3
"""Launch and block that were run again."""
CREATED = 1_795_355_400.0


def design() -> Design:
    """Four layouts and the twin on 4 GPUs, two launches of four blocks, with a pilot."""
    workload = Workload(batch=128, seq=10_000, decode_steps=32, dtype="float16")
    made = declare(
        model=find_model("seed"),
        workload=workload,
        arms=tuple(PREFILL_S),
        ranks=4,
        device="cuda",
        text=identify(BUILTIN),
        protocol=Protocol(launches=2, blocks=4, pilot=RULE),
    )
    return dataclasses.replace(made, created="2026-11-22T13:50:00Z")


def environment() -> dict[str, Any]:
    gpu = {"name": "NVIDIA H200", "driver": "580.159.04", "memory_total_bytes": 150_754_820_096}
    return {"cpu_count": 64, "gpus": [dict(gpu) for _ in range(4)], "source_sha256": SOURCE}


def traffic(plan: Design, layout: Layout, phase: str) -> list[Record]:
    """Each row as the first rank that has it issues it, with times at 300 GB/s; messages between stages have none."""
    rows: dict[Any, list[int]] = {}
    for rank in range(layout.ranks):
        args = (plan.model, layout, plan.workload, rank)
        issued = prefill_collectives(*args) if phase == "prefill" else decode_collectives(*args)
        of_layers, mine = layer_collectives(*args), {}
        for each, count in issued.items():
            row = mine.setdefault((each.kind, each.axis, each in of_layers), [0, 0])
            row[0] += count
            row[1] += count * each.bytes
        rows = mine | rows
    found = []
    for (kind, axis, per_layer), (calls, size) in sorted(rows.items()):
        taken = None if kind in ("send", "recv") else size / 3e11 + 9.73e-6 * calls
        row = {"collective": kind, "axis": axis, "per_layer": per_layer, "calls": calls, "bytes_per_rank": size}
        found.append(row | {"time_s": taken})
    return found


def phase_errors(draw: random.Random, tokens: int) -> Record:
    floor = draw.uniform(1.9e-3, 2.1e-3)
    error = floor * draw.uniform(0.97, 1.03)
    bound = allowed_multiple("float16", 4) * floor
    return {
        "tokens": tokens,
        "relative_error": error,
        "max_abs_error": 0.011,
        "floor": floor,
        "bound": bound,
        "passed": True,
    }


class Clock:
    """The wall clock of the journal."""

    def __init__(self) -> None:
        self.now = CREATED + 31.4

    def after(self, seconds: float) -> float:
        self.now += seconds
        return round(self.now, 6)


def records(plan: Design, env_sha256: str) -> list[Record]:
    """All of an untouched run's records, in order."""
    draw, clock, found = random.Random(7), Clock(), []
    declared = plan.to_dict()
    rows = token_rows(read_identified(plan.text), plan.workload.batch, plan.workload.seq)
    hashes = {"input_sha256": hashlib.sha256(b"".join(rows)).hexdigest()}
    named = json.dumps([declared["model"], declared["seed"]], sort_keys=True)
    hashes["weights_sha256"] = hashlib.sha256(named.encode()).hexdigest()
    for launch in range(plan.protocol.launches):

        def record(kind: str, after_s: float, launch: int = launch, **values: Any) -> None:
            found.append({"kind": kind, "launch": launch, "time_s": clock.after(after_s), **values})

        record(
            "launch", 9.9, design_hash=declared["hash"], environment_sha256=env_sha256, ranks=4, attempt=0,
            device_names=["NVIDIA H200"] * 4, **hashes, started_s=clock.now + 0.4, start_s=8.7,
        )  # fmt: skip
        moved = draw.uniform(0.24, 0.25)
        moves = {"relative_error": moved, "rejected": True, "sensitivity": moved}
        record("control", 15, layout=plan.control, linears="model", **moves)
        for layout in plan.layouts:
            examine(plan, draw, record, layout, launch)
        for block, order in enumerate(plan.order[launch]):
            if plan.protocol.pilot and block == plan.protocol.warmup_blocks and launch == 0:
                run_pilot(plan, draw, record, [each["sentinels"] for each in found if each["kind"] == "block"])
            turns = next((each["turns"] for each in found if each["kind"] == "pilot"), 1)
            again = plan.protocol.pilot is not None and (launch, block) == RERUN
            for retry in range(1 + again):
                for position, index in enumerate(order):
                    odd = 1.3 if again and not retry and position == 2 else 1.0
                    time_block(plan, draw, clock, record, block, position, index, turns, retry, odd)
                if again and not retry:
                    record("rerun", 0.0072, block=block, attempt=0, sentinels=sentinels(draw))
        record("end", 0.0072, completed=True, sentinels=sentinels(draw))
    return found


def examine(plan: Design, draw: random.Random, record: Any, layout: Layout, launch: int) -> None:
    labels = [arm.label for arm in plan.arms if arm.layout == str(layout)]
    predicted = [dataclasses.asdict(predict(plan.model, layout, plan.workload, rank)) for rank in range(4)]
    keys = ("parameters_bytes", "kv_cache_bytes", "activations_peak_bytes", "communication_buffer_bytes")
    held = [{key: row[key] for key in keys} for row in predicted]
    for row in held:
        row["activations_peak_bytes"] = int(row["activations_peak_bytes"] * 1.02)
    for place, label in enumerate(labels):
        how = "torch.cuda.max_memory_allocated"
        record("memory", 0.003 if place else 8.0, arm=label, per_rank=held, predicted=predicted, measured_by=how)
    for phase in ("prefill", "decode"):
        ops = traffic(plan, layout, phase)
        for place, label in enumerate(labels):
            record("traffic", 0.001 if place else 5.0, arm=label, phase=phase, ops=ops, as_predicted=True)
    if layout.pp > 1:
        span = PREFILL_S[str(layout)] * draw.uniform(0.995, 1.005)
        ends = [(stage, stage * span / 9, (stage + 8) * span / 9) for stage in range(2)]
        base = {"phase": "prefill", "micro_batch": 0, "step": 0}
        events = [base | {"stage": stage, "start_s": start, "end_s": end} for stage, start, end in ends]
        for place, label in enumerate(labels):
            record("pipeline", 0.001 if place else 6.0, arm=label, events=events)
    phases = {"prefill": phase_errors(draw, 4), "decode": phase_errors(draw, 128)}
    whole = phase_errors(draw, 132)
    whole["relative_error"] = sum(phase["relative_error"] for phase in phases.values()) / 2
    sequences = len(rows_to_verify(plan, launch))
    compared = 33 * sequences
    greedy = {"compared": compared, "matched": compared - 1, "ties": 1, "mismatched": 0}
    verdict = {"verified": True, "phases": phases, "whole": whole, "sequences": sequences, "greedy": greedy}
    verdict |= {"loss_relative_error": 3.1e-5, "reason": None, "of_sequences": plan.workload.batch}
    for place, label in enumerate(labels):
        record("verify", 0.001 if place else 2.0, arm=label, **verdict)


def sentinels(draw: random.Random, odd: float = 1.0) -> Record:
    """5 ms on every rank; `odd` times as long a matrix product."""
    usual = {"gemm_s": 2.1e-3 * odd, "all_reduce_s": 1.7e-3, "host_s": 1.2e-3}
    return {kind: [round(seconds * draw.gauss(1, 2e-3), 9) for _ in range(4)] for kind, seconds in usual.items()}


def run_pilot(plan: Design, draw: random.Random, record: Any, warm: list[Record]) -> None:
    assert plan.protocol.pilot is not None
    baseline = plan.arms[0]
    times = {
        phase: [round(usual[str(parse_layout(baseline.layout))] * draw.gauss(1, 1e-3), 9) for _ in range(4)]
        for phase, usual in (("prefill_s", PREFILL_S), ("decode_s", DECODE_S))
    }
    read = [sentinels(draw) for _ in range(5)]
    slowest = {kind: [max(each[kind]) for each in (*warm[1:], *read)] for kind in read[0]}
    took = sum(map(sum, (*times.values(), *slowest.values()))) + 0.02
    outcome = settle(plan.protocol.pilot, **times)._asdict()
    record("pilot", took, attempt=0, arm=baseline.label, **times, sentinels=slowest, **outcome)


def time_block(
    plan: Design, draw: random.Random, clock: Clock, record: Any, block: int, position: int, index: int,
    turns: int, retry: int, odd: float,
) -> None:  # fmt: skip
    arm = plan.arms[index]
    factor = draw.gauss(1, 1e-3) * (1.02 if block < plan.protocol.warmup_blocks else 1)
    factor *= 1 + plan.protocol.planted if arm.role == "planted" else 1
    read = sentinels(draw, odd)
    now = clock.now + sum(map(max, read.values()))
    keys = ("prefill_start_s", "prefill_s", "decode_start_s", "decode_s")
    told: Record = {key: [] for key in keys}
    ranks: Record = {"prefill_s": [], "decode_s": []}
    for _ in range(turns):
        for phase, usual in (("prefill", PREFILL_S), ("decode", DECODE_S)):
            slowest = usual[str(parse_layout(arm.layout))] * factor * draw.gauss(1, 5e-4)
            own = [round(slowest * (1 - 3e-5 * draw.random()), 9) for _ in range(4)]
            now += draw.uniform(0.0005, 0.001)
            told[f"{phase}_start_s"].append(round(now, 6))
            told[f"{phase}_s"].append(max(own))
            ranks[f"{phase}_s"].append(own)
            now += max(own)
            now += max(own) / 1.02 if arm.role == "planted" and phase == "prefill" else 0.0  # the untimed one
    means = {key: [round(sum(rank) / turns, 9) for rank in zip(*own, strict=True)] for key, own in ranks.items()}
    starts = {key: told[key][0] for key in keys if "start" in key}
    warmup = block < plan.protocol.warmup_blocks
    values = {"block": block, "attempt": 0, "position": position, "arm": arm.label}
    record(
        "block",
        now - clock.now + 0.0009,
        **values,
        **starts,
        **means,
        decode_steps=plan.workload.decode_steps,
        warmup=warmup,
        sentinels=read,
        **({"retry": retry, "turns": told} if plan.protocol.pilot else {}),
    )


def write_journal(folder: Path, found: list[Record]) -> None:
    (folder / "journal.jsonl").unlink(missing_ok=True)
    with Journal(folder / "journal.jsonl") as journal:
        for each in found:
            journal.append(each)


def conclude(folder: Path, declared: Record, found: list[Record]) -> None:
    """summary.json, as the end of a run writes it."""
    sealed = seal(folder / "journal.jsonl")
    extra = {"run": str(folder), "journal": {"records": sealed.records, "link": sealed.link}}
    write_json(folder / "summary.json", summary_of(declared, found, None) | extra)


def write_run(folder: Path) -> None:
    """The whole folder."""
    folder.mkdir(parents=True)
    plan = design()
    write_json(folder / "design.json", plan.to_dict())
    write_json(folder / "env.json", environment())
    found = records(plan, hashlib.sha256((folder / "env.json").read_bytes()).hexdigest())
    write_journal(folder, found)
    conclude(folder, plan.to_dict(), found)
