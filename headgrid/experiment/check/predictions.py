"""What layouts predict against what was recorded: bytes held and bytes sent, from pure functions made again here."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from headgrid.experiment.check.finding import Finding, Note, Outcome
from headgrid.experiment.check.run import Run, segments
from headgrid.experiment.records import Record, is_verified, of_kind
from headgrid.layout.layout import Layout
from headgrid.layout.memory import predict
from headgrid.layout.placement import crossings
from headgrid.layout.traffic import decode_collectives, layer_collectives, prefill_collectives
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

STORED = ("parameters_bytes", "kv_cache_bytes")
"""What the algebra fixes, whatever version computes it."""
HELD = (*STORED, "communication_buffer_bytes")
Rows = dict[tuple[str, str, bool], set[tuple[int, int]]]
"""Calls and bytes of ranks, by kind of collective, axis, and whether layers issue them."""
PEAK_RANGE, PEAK_SLACK_BYTES = (0.7, 1.5), 256 << 20
"""Measured activation peak over the predicted one: 1.00 to 1.03 on H200s; allocators round, libraries need room."""
OVERLAPPED_LEAST = 0.5
"""The same of calls that take turns: what is predicted adds their peaks, which they need not reach together."""


def memory(run: Run) -> Outcome:
    """Each rank's bytes: predicted again, and measured as predicted where the arm is verified."""
    if run.model is None or run.workload is None:
        yield Note("the design's model or workload is of another version: predictions were not made again")
        return
    for label, layout in run.arms:
        for record in of_kind(run.records, "memory", label):
            where = f"launch {record['launch']}, {label}"
            if len(record["per_rank"]) != layout.ranks or len(record["predicted"]) != layout.ranks:
                yield Finding("memory.predicted", where, f"figures of {len(record['per_rank'])} ranks")
                continue
            yield from _memory(run, record, layout, where)


def _memory(run: Run, record: Record, layout: Layout, where: str) -> Iterator[Finding]:
    assert run.model is not None and run.workload is not None
    verified = is_verified(run.records, record["arm"])
    for rank, (held, stated) in enumerate(zip(record["per_rank"], record["predicted"], strict=True)):
        made = _predicted(run.model, layout, run.workload, rank)
        for key in stated if run.same_version else STORED:
            if stated[key] != made[key]:
                what = f"rank {rank} states {stated[key]} {key} as predicted, the layout gives {made[key]}"
                yield Finding("memory.predicted", where, what)
        for key in HELD:
            if verified and held[key] != stated[key]:
                what = f"rank {rank} holds {held[key]} {key}, predicted {stated[key]}, and yet it is verified"
                yield Finding("memory.held", where, what)
        peak, expected = held["activations_peak_bytes"], stated["activations_peak_bytes"]
        if not _least(run, layout) * expected <= peak <= PEAK_RANGE[1] * expected + PEAK_SLACK_BYTES:
            yield Finding("memory.held", where, f"rank {rank}'s activations peak at {peak} bytes, predicted {expected}")
    total = max(sum(held[key] for key in (*STORED, "activations_peak_bytes")) for held in record["per_rank"])
    installed = [gpu["memory_total_bytes"] for gpu in run.env.get("gpus", [])]
    if run.design["device"] == "cuda" and installed and total > max(installed):
        yield Finding("memory.held", where, f"a rank holds {total} bytes, a device has {max(installed)}")


def _least(run: Run, layout: Layout) -> float:
    """Of the predicted activation peak, what a rank holds at least. Of FP8 linears that is a CPU's emulation, which
    widens whole matrices; GPUs do not, so for these it is only a ceiling.
    """
    if layout.linears == "fp8" and run.design["device"] == "cuda":
        return 0.0
    return OVERLAPPED_LEAST if layout.communication == "overlapped" else PEAK_RANGE[0]


@lru_cache(maxsize=4096)  # twins and launches ask again
def _predicted(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> dict[str, int]:
    return asdict(predict(model, layout, workload, rank))


def traffic(run: Run) -> Outcome:
    """Every row of collectives is one that the layout predicts for some rank, and none is missing.

    Other versions may sort calls into other rows, so of them only calls and bytes of each kind and axis must agree.
    """
    if run.model is None or run.workload is None:
        return
    layouts = dict(run.arms)
    for segment in segments(run.records):
        for record in of_kind(segment.records, "traffic"):
            label, layout = record["arm"], layouts[record["arm"]]
            where = f"{segment.where}, {label}, {record['phase']}"
            if is_verified(run.records, label) and record["as_predicted"] is not True:
                yield Finding("traffic.predicted", where, "is not as predicted, and yet the arm is verified")
            if record["as_predicted"] is True:
                faults = _rows_differ if run.same_version else _totals_differ
                wrong = faults(record, _rows(run.model, layout, run.workload, record["phase"]))
                yield from (Finding("traffic.predicted", where, what) for what in wrong)
            yield from _crossings(run, record, layout, segment.records[0].get("hosts") or [0], where)


def _crossings(run: Run, record: Record, layout: Layout, hosts: list[int], where: str) -> Iterator[Finding]:
    """What crosses hosts, made again from the placement of ranks in that attempt of the launch."""
    assert run.model is not None and run.workload is not None
    stated = record.get("crossings")
    made = None
    if len(set(hosts)) > 1 and len(hosts) == layout.ranks:
        made = [asdict(each) for each in crossings(run.model, layout, run.workload, hosts, record["phase"])]
    if stated != made and (run.same_version or (stated is None) != (made is None)):
        yield Finding("traffic.crossings", where, "what crosses hosts is not what the layout gives for these hosts")


def _totals_differ(record: Record, expected: Rows) -> Iterator[str]:
    """By kind and axis: sums over places, which lie between those of the rank with least and the rank with most."""
    names = {(op["collective"], op["axis"]) for op in record["ops"]} | {key[:2] for key in expected}
    for kind, axis in sorted(names):
        mine = [op for op in record["ops"] if (op["collective"], op["axis"]) == (kind, axis)]
        every = [ranks for key, ranks in expected.items() if key[:2] == (kind, axis)]
        for place, field in enumerate(("calls", "bytes_per_rank")):
            found = sum(op[field] for op in mine)
            low, high = (sum(choose(row[place] for row in ranks) for ranks in every) for choose in (min, max))
            if not low <= found <= high:
                yield f"{kind} on {axis}: {found} {field}, the layout gives {low} to {high}"


def _rows_differ(record: Record, expected: Rows) -> Iterator[str]:
    for op in record["ops"]:
        key = (op["collective"], op["axis"], op["per_layer"])
        if (op["calls"], op["bytes_per_rank"]) not in expected.get(key, ()):
            yield f"{op['collective']} on {op['axis']}: {op['calls']} calls, {op['bytes_per_rank']} bytes"
    found = {(op["collective"], op["axis"], op["per_layer"]) for op in record["ops"]}
    yield from (f"no {key[0]} on {key[1]}" for key in expected if key not in found)


@lru_cache(maxsize=256)
def _rows(model: ModelSpec, layout: Layout, workload: Workload, phase: str) -> Rows:
    """Of each rank that issues such calls."""
    rows: Rows = {}
    for rank in range(layout.ranks):
        args = (model, layout, workload, rank)
        issued = prefill_collectives(*args) if phase == "prefill" else decode_collectives(*args)
        of_layers, calls, sizes = layer_collectives(*args), Counter[Any](), Counter[Any]()
        for each, count in issued.items():
            key = (each.kind, each.axis, each in of_layers)
            calls[key] += count
            sizes[key] += count * each.bytes
        for key in calls:
            rows.setdefault(key, set()).add((calls[key], sizes[key]))
    return rows
