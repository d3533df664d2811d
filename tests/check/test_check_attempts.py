"""`check` where a launch was begun again: what is counted belongs to its own attempt, what was cut is no forgery."""

import dataclasses
import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headgrid.experiment.check import breakdown, predictions
from headgrid.experiment.check.finding import Finding, Note
from headgrid.experiment.check.run import Run
from headgrid.experiment.journal import Seal
from headgrid.layout.layout import parse_layout
from headgrid.layout.placement import crossings
from headgrid.spec.model import find_model
from headgrid.spec.workload import Workload

MODEL, WORKLOAD = find_model("seed-small"), Workload(batch=8, seq=32, decode_steps=2, dtype="float32")
ARM = "n1m4:batch"
PAIRS, ONE_AND_THREE = [0, 0, 1, 1], [0, 1, 1, 1]
Record = dict[str, Any]


def a_run(folder: Path, records: list[Record], device: str = "cpu") -> Run:
    design = {"device": device, "arms": [{"label": ARM, "layout": ARM, "role": "arm"}]}
    return Run(folder, design, {}, "", records, Seal(0, "", 0, ()), None, None, MODEL, WORKLOAD, same_version=True)


def attempt(placed: list[int] | None, counted: list[int] | None) -> list[Record]:
    """A launch whose ranks are on these hosts, and its traffic as it would be counted on those."""
    made = crossings(MODEL, parse_layout(ARM), WORKLOAD, counted, "prefill") if counted else None
    launched = {"kind": "launch", "launch": 0, "ranks": 4} | ({"hosts": placed} if placed else {})
    traffic = {"kind": "traffic", "launch": 0, "arm": ARM, "phase": "prefill", "as_predicted": None, "ops": []}
    return [launched, traffic | {"crossings": made and [dataclasses.asdict(each) for each in made]}]


@pytest.mark.parametrize(
    ("first", "second", "wrong"),
    [
        ((PAIRS, PAIRS), (ONE_AND_THREE, ONE_AND_THREE), []),
        ((PAIRS, PAIRS), (None, None), []),
        ((PAIRS, ONE_AND_THREE), (ONE_AND_THREE, ONE_AND_THREE), ["launch 0"]),
        ((PAIRS, PAIRS), (ONE_AND_THREE, PAIRS), ["launch 0, attempt 1"]),
        ((PAIRS, PAIRS), (None, PAIRS), ["launch 0, attempt 1"]),
    ],
    ids=["each its own", "then one host", "the first counted as the second", "the second as the first", "one as two"],
)
def test_crossings_are_those_of_their_attempt(tmp_path: Path, first: tuple, second: tuple, wrong: list[str]) -> None:
    found = list(predictions.traffic(a_run(tmp_path, [*attempt(*first), *attempt(*second)])))
    assert [(each.gate, each.where) for each in found if isinstance(each, Finding)] == [
        ("traffic.crossings", f"{where}, {ARM}, prefill") for where in wrong
    ]


@pytest.mark.parametrize(
    ("behind", "kind"), [([], Finding), ([{"kind": "end"}], Finding), ([{"kind": "launch", "launch": 0}], Note)]
)
def test_a_trace_that_a_later_attempt_may_have_written_is_noted(
    tmp_path: Path, behind: list[Record], kind: type
) -> None:
    """And is a finding where none began behind its record."""
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "a.json.gz").write_bytes(b"another")
    trace = {"file": "traces/a.json.gz", "sha256": hashlib.sha256(b"mine").hexdigest(), "cut": None}
    record = {"kind": "breakdown", "arm": ARM, "phase": "prefill", "trace": trace}
    run = a_run(tmp_path, [{"kind": "launch", "launch": 0}, record, *behind])
    assert [type(each) for each in breakdown._trace(run, record, "here")] == [kind]


def drawn_on(rank: int, compute_ns: int) -> list[Record]:
    """What a trace shows of a rank: a step, and in it one kernel."""
    step = {"ph": "X", "pid": rank, "tid": 0, "cat": "phase", "name": breakdown.STEP, "ts": 0, "dur": 20}
    return [step, step | {"tid": 1, "cat": "compute", "name": "gemm", "ts": 5, "dur": compute_ns / 1e3}]


def of_rank(found: Callable[[str], float | None]) -> Record:
    return {name: found(name) for name in breakdown.PARTS}


def test_a_rank_of_which_the_profiler_gave_nothing_is_not_looked_for_in_the_trace(tmp_path: Path) -> None:
    """And the others still are."""
    folder = tmp_path / "traces"
    folder.mkdir()
    data = gzip.compress(json.dumps({"traceEvents": drawn_on(0, 8_000)}).encode())
    (folder / "a.json.gz").write_bytes(data)
    trace = {"file": "traces/a.json.gz", "sha256": hashlib.sha256(data).hexdigest(), "cut": None}
    right = {"compute_s": 8e-6, "exposed_s": 0.0, "idle_s": 5e-6}

    def found(compute_s: float) -> list[Any]:
        ranks = [of_rank({**right, "compute_s": compute_s}.__getitem__), of_rank(lambda name: None)]
        record = {"kind": "breakdown", "arm": ARM, "phase": "prefill", "trace": trace, "ranks": ranks}
        return list(breakdown._trace(a_run(tmp_path, [record], "cuda"), record, "here"))

    assert found(8e-6) == []
    assert [type(each) for each in found(9e-6)] == [Finding]
