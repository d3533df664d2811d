"""`check` on breakdowns: accepts one as 4 GPUs leave it, and rejects every change to its parts, rows or traces."""

import dataclasses
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import honest_run
import pytest
import tamperings
from tamperings import Documents

from headgrid.experiment.breakdown import measure
from headgrid.experiment.breakdown.calls import Call
from headgrid.experiment.breakdown.intervals import account
from headgrid.experiment.breakdown.perfetto import STEP, Bar
from headgrid.experiment.check.check import check_run
from headgrid.experiment.design import Design, Protocol, declare, from_dict
from headgrid.experiment.text import BUILTIN, identify
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.traffic import decode_collectives, layer_collectives, prefill_collectives
from headgrid.spec.model import find_model
from headgrid.spec.workload import Workload

Record = dict[str, Any]
LEAD, TAIL_S = 90_000, 15e-6


def _rank(design: Any, layout: Layout, phase: str, steps: int, rank: int) -> Record:
    """What a rank reports that computes, calls a collective, computes, ...; each rank waits a little longer."""
    args = (design.model, layout, design.workload, rank)
    predicted = prefill_collectives(*args) if phase == "prefill" else decode_collectives(*args)
    of_layers = layer_collectives(*args)
    issued = [call for _ in range(steps) for call, count in predicted.items() for _ in range(count)]
    timed = honest_run.PREFILL_S if phase == "prefill" else honest_run.DECODE_S
    whole = round(1e9 * timed[str(layout)] * (1 if phase == "prefill" else steps / design.workload.decode_steps))
    times = [round(call.bytes / 300) + 9_700 + 1_000 * rank for call in issued]
    piece = (whole - sum(times)) // (len(times) + 1)
    assert piece > 0
    bars: list[Bar] = []
    at = LEAD
    for number in range(len(times) + 1):
        bars.append(Bar("stream 7", "gemm", at, at + piece, "compute", {}))
        at += piece + 500
        if number < len(times):
            bars.append(Bar("stream 7", "nccl", at, at + times[number], "communication", {}))
            at += times[number]
    spans = {cat: [(b.start, b.end) for b in bars if b.category == cat] for cat in ("compute", "communication")}
    begun = 3_000
    parts = account(begun, spans["compute"], spans["communication"])
    values = (parts.compute, parts.exposed, parts.idle, parts.hidden, parts.lead, parts.span)
    bars.append(Bar(STEP, STEP, begun, begun + parts.span, "phase", {}))
    calls = [
        Call(c.kind, c.axis, c.bytes, 0 if c in of_layers else None, False, ns, ns, 0)
        for c, ns in zip(issued, times, strict=True)
    ]
    report = {"step": parts.span + round(TAIL_S * 1e9), "unavailable": None, "unmatched": None, "as_predicted": True}
    report |= {"account": dict(zip(measure.ACCOUNT, values, strict=True)), "clock": (None, 0), "cut": None}
    return report | {"calls": [call.to_json() for call in calls], "bars": [bar.to_json() for bar in bars]}


def watched(folder: Path, found: Documents) -> Iterator[Record]:
    """The records of each layout and phase, and their traces in the folder."""
    design = from_dict(found.design)
    for layout in design.layouts:
        for phase, steps in (("prefill", 1), ("decode", 8)):
            ranks = [_rank(design, layout, phase, steps, rank) for rank in range(layout.ranks)]
            record = {"phase": phase, "steps": steps, "source": measure.DEVICE_SOURCE}
            record |= measure._record(ranks, layout)
            record["trace"] = measure._write_trace(ranks, layout, phase, folder, measure.DEVICE_SOURCE)
            for arm in (arm for arm in design.arms if arm.layout == str(layout)):
                yield {"kind": "breakdown", "arm": arm.label, **record}


def smaller() -> Design:
    """Few enough calls for a test."""
    return declare(
        model=find_model("seed"),
        workload=Workload(batch=16, seq=2_000, decode_steps=32, dtype="float16"),
        arms=tuple(honest_run.PREFILL_S),
        ranks=4,
        device="cuda",
        text=identify(BUILTIN),
        protocol=Protocol(launches=1, blocks=4),
    )


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untouched run with breakdowns behind its blocks."""
    folder = tmp_path_factory.mktemp("runs") / "watched"
    made = dataclasses.replace(smaller(), created=honest_run.design().created)
    with patch.object(honest_run, "design", lambda: made):
        honest_run.write_run(folder)

    def insert(found: Documents) -> None:
        end = found.records[-1]
        records = [{"launch": end["launch"], "time_s": end["time_s"], **each} for each in watched(folder, found)]
        found.records[-1:-1] = json.loads(json.dumps(records))

    tamperings.forge(folder, insert)
    return folder


@pytest.fixture
def run(complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    folder = tmp_path / "run"
    for path in (path for path in complete.rglob("*") if path.is_file()):
        target = folder / path.relative_to(complete)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folder


def reasons(folder: Path) -> tuple[str, ...]:
    return check_run(folder, source_sha256=honest_run.SOURCE).reasons


def test_accepts_what_was_written_and_tells_it_in_the_summary(complete: Path) -> None:
    verdict = check_run(complete, source_sha256=honest_run.SOURCE)
    assert verdict.findings == () and verdict.notes == ()
    summary = json.loads((complete / "summary.json").read_text())
    rows = {(row["label"], row["phase"]): row for row in summary["breakdown"]}
    assert len(rows) == 8, "four layouts, the twin left out"
    prefill, decode = rows["tp2pp2", "prefill"], rows["tp2pp2", "decode"]
    assert prefill["slow_down"] == pytest.approx(1, abs=0.02) and decode["slow_down"] == pytest.approx(1, abs=0.06)
    assert abs(decode["closure"]) < 0.01
    parts = prefill["compute_s"] + prefill["exposed_s"] + prefill["idle_s"]
    assert parts == pytest.approx(prefill["mean_step_s"], rel=1e-4)


def of(arm: str, phase: str, change: Callable[[Record], None]) -> Callable[[Documents], None]:
    def apply(found: Documents) -> None:
        for record in found.of("breakdown"):
            if record["phase"] == phase and parse_layout(record["arm"].split(" ")[0]) == parse_layout(arm):
                change(record)

    return apply


def scaled(record: Record, factor: float, *keys: str) -> None:
    for rank in record["ranks"]:
        for key in keys:
            rank[key] *= factor


def row(record: Record, change: Callable[[Record], None], collective: str = "all_reduce") -> None:
    change(next(row for row in record["calls"] if row["collective"] == collective and row["layers"]))


def moved(row: Record) -> None:
    """From waiting to transfer, with a bandwidth to suit."""
    row["transfer_s"] += row["wait_s"] / 2
    row["bus_bytes_per_s"] = round(row["bytes"] / row["ranks"] / row["transfer_s"])


def hidden(row: Record) -> None:
    row["hidden_s"], row["exposed_s"] = row["exposed_s"] / 2, row["exposed_s"] / 2


def heavier(row: Record) -> None:
    row["bytes"] *= 2
    row["bus_bytes_per_s"] = round(row["bytes"] / row["ranks"] / row["transfer_s"])


def quicker(record: Record) -> None:
    """Compute that was exposed communication; the sum stays what it was."""
    for rank in record["ranks"]:
        rank["compute_s"], rank["exposed_s"] = rank["compute_s"] + rank["exposed_s"] / 2, rank["exposed_s"] / 2


def early(found: Documents) -> None:
    record = found.records.pop(next(k for k, r in enumerate(found.records) if r["kind"] == "breakdown"))
    place = next(k for k, r in enumerate(found.records) if r["kind"] == "block" and r["launch"] == record["launch"])
    record["time_s"] = found.records[place - 1]["time_s"]
    found.records.insert(place, record)


def twice(found: Documents) -> None:
    found.records.insert(-1, dict(found.of("breakdown")[-1]))


FORGED: dict[str, tuple[Callable[[Documents], None], str]] = {
    "a part grows": (of("tp4", "prefill", lambda r: scaled(r, 1.01, "compute_s")), "breakdown.parts"),
    "a part is below nothing": (of("tp4", "decode", lambda r: scaled(r, -1, "idle_s")), "breakdown.parts"),
    "all parts shrink": (
        of("tp4", "prefill", lambda r: scaled(r, 0.8, "compute_s", "exposed_s", "idle_s", "span_s")),
        "breakdown.closure",
    ),
    "step and parts shrink": (
        of("tp4", "prefill", lambda r: scaled(r, 0.5, "compute_s", "exposed_s", "idle_s", "span_s", "step_s")),
        "breakdown.closure",
    ),
    "a rank is left out": (of("tp4", "decode", lambda r: r["ranks"].pop()), "breakdown.parts"),
    "waiting becomes transfer": (of("n2m2:batch", "prefill", lambda r: row(r, moved)), "breakdown.calls"),
    "exposed becomes hidden": (of("n2m2:batch", "decode", lambda r: row(r, hidden)), "breakdown.calls"),
    "a bandwidth grows": (
        of("tp4", "decode", lambda r: row(r, lambda c: c.update(bus_bytes_per_s=2 * c["bus_bytes_per_s"]))),
        "breakdown.calls",
    ),
    "bytes double": (of("n2m2:batch", "prefill", lambda r: row(r, heavier, "all_to_all")), "breakdown.bytes"),
    "a kind of call is left out": (of("tp4", "decode", lambda r: r["calls"].pop(0)), "breakdown.bytes"),
    "more steps are stated": (of("dp4", "decode", lambda r: r.update(steps=9)), "breakdown.none"),
    "fewer steps are stated": (of("tp4", "decode", lambda r: r.update(steps=4)), "breakdown.bytes"),
    "not as predicted": (of("tp4", "decode", lambda r: r.update(as_predicted=False)), "breakdown.bytes"),
    "exposed is called compute": (of("tp2pp2", "prefill", quicker), "breakdown.trace"),
    "another trace's hash": (
        of("tp4", "prefill", lambda r: r["trace"].update(file="traces/dp4-prefill.json.gz")),
        "breakdown.trace",
    ),
    "watched before it was timed": (early, "journal.sequence"),
    "a record comes twice": (twice, "journal.counts"),
    "the twin differs": (
        lambda found: found.of("breakdown")[0].update(source="another pass"),
        "twins.records",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_rejects_forged_breakdowns(run: Path, name: str) -> None:
    change, reason = FORGED[name]
    tamperings.forge(run, change)
    if reason == "breakdown.none":  # what no check can detect: of an arm that sends nothing, steps are not counted
        assert reasons(run) == ()
    else:
        assert reason in reasons(run)


def test_rejects_an_edited_trace_and_misses_a_lost_one(run: Path) -> None:
    path = run / "traces" / "tp4-decode.json.gz"
    trace = json.loads(gzip.decompress(path.read_bytes()))
    path.write_bytes(gzip.compress(json.dumps(trace).encode(), mtime=1))
    assert reasons(run) == ("breakdown.trace",)
    path.unlink()
    verdict = check_run(run, source_sha256=honest_run.SOURCE)
    assert verdict.accepted and any("tp4-decode.json.gz is not here" in note for note in verdict.notes)
