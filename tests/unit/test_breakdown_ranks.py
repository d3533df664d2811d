"""Four gloo ranks that are watched: parts make up steps, bytes are those predicted, faults show where they are."""

import gzip
import json
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import breakdown_work
import pytest
from breakdown_work import FAULT_LAYER, FAULT_RANK, MODEL, PLANTED_S, WORKLOAD
from test_perfetto import faults

from headgrid.experiment.breakdown.summary import CLOSED, closure
from headgrid.experiment.breakdown.watch import decode_sequence
from headgrid.layout.batching import decode_micro_batches
from headgrid.layout.layout import parse_layout
from headgrid.layout.traffic import decode_collectives, prefill_collectives
from headgrid.runtime.launch import Job, run

LAYOUTS = (
    "tp2pp2",
    "tp4:overlapped",
    "tp4:sharded",
    "dp4",
    "n2m2:gather+concat",
    "n2m2:batch+gathered",
    "n2m2:batch+gathered+overlapped",
    "n1m4:scores",
)
CASES = [*((text, None) for text in LAYOUTS), ("tp4", "computes"), ("tp4", "sleeps"), ("tp4", None)]
Found = dict[tuple[str, str | None], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("breakdown")
    payload = {"cases": CASES, "folder": str(found)}
    run(Job("breakdown_work:run", payload, 4, "gloo"), log_to=found / "logs")
    return found


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    return {case: json.loads((folder / f"{k}.json").read_text()) for k, case in enumerate(CASES)}


def test_parts_of_every_step_make_it_up(found: Found) -> None:
    """Each part has a clock of its own; a rank that is preempted between two of them misses a little."""
    missed: list[float] = []
    for (_, fault), records in found.items():
        for record in records:
            assert record["unavailable"] is None and record["without_idle"] is None
            if fault != "sleeps":
                missed += [abs(miss) for rank in record["ranks"] if (miss := closure(rank)) is not None]
    assert len(missed) == 4 * 2 * (len(CASES) - 1)
    assert median(missed) <= CLOSED / 4
    assert sum(miss <= CLOSED for miss in missed) >= 0.9 * len(missed), sorted(missed)[-10:]


@pytest.mark.parametrize("text", LAYOUTS)
def test_collectives_are_the_predicted_ones(text: str, found: Found) -> None:
    layout = parse_layout(text)
    for record, predict in zip(found[text, None], (prefill_collectives, decode_collectives), strict=True):
        assert record["as_predicted"] and record["unmatched"] is None
        due: Counter[tuple[str, str]] = Counter()
        for rank in range(4):
            for call, count in predict(MODEL, layout, WORKLOAD, rank).items():
                due[call.kind, call.axis] += count * call.bytes * record["steps"]
        sent: Counter[tuple[str, str]] = Counter()
        for row in record["calls"]:
            sent[row["collective"], row["axis"]] += row["bytes"]
            if row["time_s"] is not None:
                assert row["wait_s"] + row["transfer_s"] == pytest.approx(row["time_s"])
        assert sent == due


@pytest.mark.parametrize("text", LAYOUTS)
def test_the_order_in_decode_is_the_predicted_one(text: str) -> None:
    layout = parse_layout(text)
    for rank in range(4):
        listed = Counter(
            call
            for micro_batch in decode_micro_batches(layout, WORKLOAD, layout.coordinates(rank).dp)
            for _, call in decode_sequence(MODEL, layout, WORKLOAD, rank, micro_batch)
        )
        messages = {"pp", "pp_back"}
        due = decode_collectives(MODEL, layout, WORKLOAD, rank)
        assert listed == Counter({call: n for call, n in due.items() if call.axis not in messages})


def _rows(records: list[dict[str, Any]], phase: str) -> dict[str, Any]:
    record = next(record for record in records if record["phase"] == phase)
    return {row["role"]: row for row in record["calls"] if row["collective"] not in ("send",)}


def test_every_layer_has_its_calls_and_roles(found: Found) -> None:
    for phase in ("prefill", "decode"):
        concat = _rows(found["n2m2:gather+concat", None], phase)
        assert {"intra-group exchange", "inter-group concatenation", "inter-group reduce"} <= concat.keys()
        assert all(concat[role]["layers"]["count"] == 4 for role in ("intra-group exchange", "inter-group reduce"))
        stages = _rows(found["tp2pp2", None], phase)
        assert stages["TP all-reduce"]["layers"]["count"] == 4, "layers of both stages, by their number in the model"
        assert {"hidden states between stages", "tokens back to the first stage"} <= stages.keys()
    for text in ("n2m2:batch+gathered", "n2m2:batch+gathered+overlapped"):
        gather = _rows(found[text, None], "prefill")["weight gather"]
        assert gather["layers"]["count"] == 4 and gather["time_s"] is None and gather["exposed_s"] is not None
        assert "weight gather" not in _rows(found[text, None], "decode")


def test_a_rank_that_computes_longer_makes_the_others_wait_in_that_layer(found: Found) -> None:
    plain, slow = found["tp4", None][0], found["tp4", "computes"][0]
    assert slow["ranks"][FAULT_RANK]["compute_s"] - plain["ranks"][FAULT_RANK]["compute_s"] > 0.9 * PLANTED_S
    others = [rank for rank in range(4) if rank != FAULT_RANK]
    assert all(slow["ranks"][rank]["exposed_s"] > 0.9 * PLANTED_S for rank in others)
    assert all(slow["ranks"][rank]["compute_s"] < 0.5 * PLANTED_S for rank in others)
    row = _rows(found["tp4", "computes"], "prefill")["TP all-reduce"]
    assert row["wait_s"] > 0.9 * PLANTED_S * 3 / 4, "of four ranks three wait"
    assert row["layers"]["exposed_s"]["max_layer"] == FAULT_LAYER


def test_time_that_no_clock_tells_of_is_missed_and_not_made_up(found: Found) -> None:
    """A rank that sleeps neither computes nor waits for others nor for a core: idle is no remainder."""
    slept = found["tp4", "sleeps"][0]["ranks"][FAULT_RANK]
    miss = closure(slept)
    assert miss is not None
    assert -miss * slept["step_s"] == pytest.approx(PLANTED_S, rel=0.1)


def test_traces_open_and_hold_every_rank(folder: Path, found: Found) -> None:
    for (_, _), records in found.items():
        for record in records:
            trace = json.loads(gzip.decompress((folder / record["trace"]["file"]).read_bytes()))
            assert faults(trace) == []
            bars = [event for event in trace["traceEvents"] if event["ph"] == "X"]
            assert {event["pid"] for event in bars} == {0, 1, 2, 3}
            if record["trace"]["file"] in ("traces/tp2pp2-prefill.json.gz",):
                assert {f"layer {k}" for k in range(4)} <= {event["name"] for event in bars}
    assert breakdown_work.PLANTED_S == PLANTED_S
