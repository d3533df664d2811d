"""Two GPUs: every collective is found among the device's kernels, and the parts of a step make up its time."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from headgrid.experiment.breakdown.summary import CLOSED, closure
from headgrid.runtime.launch import Job, run

LAYOUTS = (
    "tp2",
    "tp2:overlapped",
    "tp2:sharded",
    "pp2",
    "dp2",
    "n1m2:batch",
    "n1m2:batch+gathered",
    "n1m2:batch+overlapped",
    "n1m2:gather+concat",
    "n1m2:sequence",
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs on this machine"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("breakdown")
    payload = {"layouts": LAYOUTS, "folder": str(folder)}
    run(Job("breakdown_gpu_work:run", payload, 2, "nccl"), log_to=folder / "logs")
    return {text: json.loads((folder / f"{k}.json").read_text()) for k, text in enumerate(LAYOUTS)} | {
        "folder": [{"folder": str(folder)}]
    }


@pytest.mark.parametrize("text", LAYOUTS)
def test_the_parts_make_up_the_step(text: str, found: dict[str, list[dict[str, Any]]]) -> None:
    assert [record["phase"] for record in found[text]] == ["prefill", "decode"]
    for record in found[text]:
        assert record["unavailable"] is None
        assert record["as_predicted"]
        for rank in record["ranks"]:
            print(text, record["phase"], rank, closure(rank))
            missed = closure(rank)
            assert missed is not None and abs(missed) <= CLOSED
            assert rank["compute_s"] > 0


@pytest.mark.parametrize("text", LAYOUTS)
def test_every_collective_is_found(text: str, found: dict[str, list[dict[str, Any]]]) -> None:
    for record in found[text]:
        assert record["unmatched"] is None
        for row in record["calls"]:
            print(text, record["phase"], {key: value for key, value in row.items() if key != "layers"})
            assert row["time_s"] > 0
            assert row["wait_s"] + row["transfer_s"] == pytest.approx(row["time_s"], rel=1e-6)
            assert row["exposed_s"] + row["hidden_s"] == pytest.approx(row["time_s"], rel=1e-6)
            assert row["bus_bytes_per_s"] < 900e9, "a link carries 450 GB/s each way"
        exposed = sum(row["exposed_s"] * row["ranks"] for row in record["calls"])
        assert sum(rank["exposed_s"] for rank in record["ranks"]) <= 1.01 * exposed + 1e-5


def test_weights_are_gathered_behind_compute(found: dict[str, list[dict[str, Any]]]) -> None:
    prefill = found["n1m2:batch+gathered"][0]
    gather = next(row for row in prefill["calls"] if row["role"] == "weight gather")
    assert gather["hidden_s"] > 0.5 * gather["time_s"]
    reduce = next(row for row in found["tp2"][0]["calls"] if row["role"] == "TP all-reduce")
    assert reduce["hidden_s"] < 0.05 * reduce["time_s"], "nothing runs beside what nothing overlaps"


def test_traces_hold_all_ranks(found: dict[str, list[dict[str, Any]]]) -> None:
    folder = Path(found["folder"][0]["folder"])
    for text in LAYOUTS:
        for record in found[text]:
            trace = json.loads(gzip.decompress((folder / record["trace"]["file"]).read_bytes()))
            bars = [event for event in trace["traceEvents"] if event["ph"] == "X"]
            assert {event["pid"] for event in bars} == {0, 1}
            assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in bars)
