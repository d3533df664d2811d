"""Fake designs and journals with realistic values, for the tests of statistics and report."""

import copy
import hashlib
import json
import random
from typing import Any

Record = dict[str, Any]

MODEL = {
    "name": "seed-small",
    "num_layers": 4,
    "hidden_size": 256,
    "num_heads": 32,
    "num_kv_heads": 32,
    "head_dim": 8,
    "mlp_hidden_size": 1024,
    "vocab_size": 256,
    "max_positions": 4096,
}
ARMS = [
    {"label": "tp8pp2", "layout": "tp8pp2", "role": "baseline"},
    {"label": "tp8pp2 (A/A)", "layout": "tp8pp2", "role": "aa"},
    {"label": "n4m4:batch", "layout": "n4m4:batch", "role": "arm"},
    {"label": "n4m4:gather+concat", "layout": "n4m4:gather+concat", "role": "arm"},
    {"label": "tp16", "layout": "tp16", "role": "arm"},
]
PREFILL_S = {"tp8pp2": 0.62, "n4m4:batch": 0.49, "n4m4:gather+concat": 0.71, "tp16": 0.66}
DECODE_S = {"tp8pp2": 0.088, "n4m4:batch": 0.0871, "n4m4:gather+concat": 0.124, "tp16": 0.079}
BASE_TIME = 1_795_352_400.0


def make_design(**changes: Any) -> dict[str, Any]:
    """The design of docs/run-folder.md with 5 arms, 5 launches and 6 blocks; `changes` replace its fields."""
    design: dict[str, Any] = {
        "schema": 1,
        "name": "compare",
        "created": "2026-11-22T13:00:00Z",
        "headgrid_version": "0.1.0",
        "model": dict(MODEL),
        "workload": {"batch": 16, "seq": 128, "decode_steps": 8, "dtype": "float32"},
        "arms": copy.deepcopy(ARMS),
        "control": "n4m4:independent",
        "ranks": 16,
        "device": "cpu",
        "backend": "gloo",
        "text": {"source": "pydoc_data.topics", "sha256": "5b" * 32},
        "seed": 0,
        "protocol": "default",
        "launches": 5,
        "blocks": 6,
        "warmup_blocks": 1,
        "margin": 0.01,
        "verify_sequences": 16,
    }
    design.update(changes)
    rng = random.Random(design["seed"])
    indices = range(len(design["arms"]))
    design["order"] = [
        [rng.sample(indices, len(indices)) for _ in range(design["blocks"])] for _ in range(design["launches"])
    ]
    design["hash"] = hashlib.sha256(json.dumps(design, sort_keys=True).encode()).hexdigest()
    return design


def make_env() -> dict[str, Any]:
    """An env.json of a small CPU host."""
    return {
        "hostname": "lab-1",
        "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
        "cpu": "Intel Xeon Platinum 8481C",
        "cpu_count": 2,
        "memory_total_bytes": 16_815_427_584,
        "python": "3.11.7",
        "versions": {"torch": "2.13.0", "numpy": "2.4.6", "scipy": "1.17.1"},
        "gpus": [],
        "environment": {"OMP_NUM_THREADS": "1", "NCCL_DEBUG": None},
    }


def launch(index: int, design: dict[str, Any]) -> Record:
    return {
        "kind": "launch",
        "launch": index,
        "time_s": BASE_TIME + 60 * index,
        "design_hash": design["hash"],
        "ranks": design["ranks"],
        "device_names": ["Intel Xeon Platinum 8481C"] * design["ranks"],
        "input_sha256": "ab" * 32,
        "weights_sha256": "cd" * 32,
        "start_s": 1.3,
    }


def block(
    launch: int, index: int, arm: str, prefill_s: float, decode_s: float, *, warmup: bool = False, ranks: int = 4
) -> Record:
    """A block whose slowest rank took `prefill_s` and `decode_s`; the other ranks were up to 3 % faster."""
    others = [1 - 0.01 * (rank % 4) for rank in range(1, ranks)]
    return {
        "kind": "block",
        "launch": launch,
        "time_s": BASE_TIME + 60 * launch + 5 + index,
        "block": index,
        "position": 0,
        "arm": arm,
        "prefill_s": [prefill_s * share for share in others] + [prefill_s],
        "decode_s": [decode_s] + [decode_s * share for share in others],
        "warmup": warmup,
    }


def verify(launch: int, arm: str, *, verified: bool = True, scale: float = 1.0) -> Record:
    floors = {"prefill": 4.1e-7, "decode": 4.6e-7}
    phases = {
        phase: {
            "relative_error": (1.1 if verified else 1.9e6) * scale * floor,
            "max_abs_error": 3.2e-6 * scale,
            "floor": floor,
            "bound": 1.5 * floor,
            "passed": verified,
        }
        for phase, floor in floors.items()
    }
    return {
        "kind": "verify",
        "launch": launch,
        "time_s": BASE_TIME + 60 * launch + 3,
        "arm": arm,
        "verified": verified,
        "phases": phases,
        "sequences": 16,
        "of_sequences": 16,
        "greedy": {"compared": 144, "matched": 143 if verified else 9, "ties": 1, "mismatched": 0 if verified else 134},
        "loss_relative_error": 3.0e-8,
        "reason": None if verified else "prefill: relative error 0.78 is above the bound 6.2e-07",
    }


def control(launch: int, *, rejected: bool = True, sensitivity: float = 0.81) -> Record:
    return {
        "kind": "control",
        "launch": launch,
        "time_s": BASE_TIME + 60 * launch + 2,
        "layout": "n4m4:independent",
        "relative_error": 0.79,
        "rejected": rejected,
        "sensitivity": sensitivity,
    }


def memory(launch: int, arm: str, ranks: int) -> Record:
    predicted = [
        {
            "parameters_bytes": 815_104 + (65_536 if rank < ranks // 2 else 0),
            "kv_cache_bytes": 1_105_920,
            "activations_peak_bytes": 6_291_456,
            "communication_buffer_bytes": 2_097_152,
        }
        for rank in range(ranks)
    ]
    per_rank = [{**rank, "activations_peak_bytes": 6_307_840 + 512 * index} for index, rank in enumerate(predicted)]
    return {
        "kind": "memory",
        "launch": launch,
        "time_s": BASE_TIME + 60 * launch + 4,
        "arm": arm,
        "per_rank": per_rank,
        "predicted": predicted,
        "measured_by": "tensor storages counted by a dispatch mode",
    }


def traffic(launch: int, arm: str, layout: str) -> list[Record]:
    kinds = [("all_reduce", "tp", True, 8, 2), ("all_gather", "tp", False, 1, 1)]
    if "pp" in layout:
        kinds.append(("send", "pp", False, 2, 1))
    if layout.startswith("n"):
        kinds.insert(0, ("all_to_all" if "batch" in layout else "all_gather", "tp_slice", True, 16, 1))
    records = []
    for phase, tokens in (("prefill", 16 * 128), ("decode", 16)):
        ops = [
            {
                "collective": name,
                "axis": axis,
                "per_layer": per_layer,
                "calls": calls,
                "bytes_per_rank": int(tokens * 256 * 4 * factor * 0.9375 * calls / 2),
                "time_s": 2.1e-4 * calls * factor * (1 if phase == "decode" else 7.3),
            }
            for name, axis, per_layer, calls, factor in kinds
        ]
        time_s = BASE_TIME + 60 * launch + 40
        records.append(
            {
                "kind": "traffic",
                "launch": launch,
                "time_s": time_s,
                "arm": arm,
                "phase": phase,
                "ops": ops,
                "as_predicted": True,
            }
        )
    return records


def pipeline(launch: int, arm: str, stages: int = 2, micro_batches: int = 4, steps: int = 3) -> Record:
    events = []
    for phase, slot, offset in (("prefill", 0.11, 0.0), ("decode", 0.004, 1.0)):
        for step in range(1 if phase == "prefill" else steps):
            for micro_batch in range(micro_batches):
                for stage in range(stages):
                    start = BASE_TIME + offset + slot * (step * micro_batches + micro_batch + stage)
                    event = {"stage": stage, "phase": phase, "micro_batch": micro_batch, "step": step}
                    events.append({**event, "start_s": start, "end_s": start + 0.93 * slot})
    return {"kind": "pipeline", "launch": launch, "time_s": BASE_TIME + 50, "arm": arm, "events": events}


def end(launch: int, completed: bool = True) -> Record:
    return {"kind": "end", "launch": launch, "time_s": BASE_TIME + 60 * launch + 59, "completed": completed}


def make_records(design: dict[str, Any], *, noise: float = 0.004, unverified: tuple[str, ...] = ()) -> list[Record]:
    """A whole journal of `design`: `noise` is the relative SD of a block; the launch's own SD is a third of it."""
    rng = random.Random(20261122)
    records: list[Record] = []
    for index in range(design["launches"]):
        records += [launch(index, design), control(index)]
        drift = {arm["label"]: rng.gauss(0, noise / 3) for arm in design["arms"]}
        for arm in design["arms"]:
            records.append(verify(index, arm["label"], verified=arm["label"] not in unverified))
            records.append(memory(index, arm["label"], design["ranks"]))
        for number in range(-design["warmup_blocks"], design["blocks"]):
            shared = 1 + 0.01 * number / 6 + rng.gauss(0, noise)
            for arm in design["arms"]:
                factor = shared * (1 + drift[arm["label"]] + rng.gauss(0, noise)) * (1.4 if number < 0 else 1)
                prefill = PREFILL_S.get(arm["layout"], 0.6) * factor
                decode = DECODE_S.get(arm["layout"], 0.09) * factor * (1 + rng.gauss(0, noise))
                position = design["order"][index][max(0, number)].index(design["arms"].index(arm))
                record = block(index, number, arm["label"], prefill, decode, warmup=number < 0, ranks=design["ranks"])
                records.append({**record, "position": position})
        for arm in design["arms"]:
            records += traffic(index, arm["label"], arm["layout"])
            if "pp" in arm["layout"]:
                records.append(pipeline(index, arm["label"]))
    return [*records, end(design["launches"] - 1)]
