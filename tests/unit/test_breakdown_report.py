"""The breakdown in summary and report: figures of one step, what watching cost, what is not known and why."""

import copy
from statistics import median
from typing import Any

import pytest
from run_fixture import make_design, make_env, make_records

from headgrid.experiment.breakdown.summary import closure, summarise_breakdown
from headgrid.experiment.records import block_times
from headgrid.experiment.summary import summary_of
from headgrid.report import breakdown, costs
from headgrid.report.html import render

Record = dict[str, Any]
STEPS = 4
NUMBERS = {arm["label"]: number for number, arm in enumerate(make_design()["arms"])}


def watched(arm: str, phase: str, *, missed: float = 0.0, **changes: Any) -> Record:
    """Two ranks whose parts make up their steps but for a share `missed`."""
    step, steps = (0.6, 1) if phase == "prefill" else (0.05, STEPS)
    ranks = [
        {
            "step_s": scale * step,
            "compute_s": scale * step * (0.5 - missed),
            "exposed_s": scale * step * 0.3,
            "idle_s": scale * step * 0.2,
            "hidden_s": scale * step * 0.1,
            "lead_s": 1e-6,
            "span_s": scale * step * (1 - missed),
        }
        for scale in (1.0, 0.98)
    ]
    row = {"role": "TP all-reduce", "collective": "all_reduce", "axis": "tp", "ranks": 2, "calls": 16 * steps}
    row |= {"bytes": 4096 * steps, "time_s": 0.4 * step, "wait_s": 0.3 * step, "transfer_s": 0.1 * step}
    row |= {"exposed_s": 0.3 * step, "hidden_s": 0.1 * step, "bus_bytes_per_s": round(2048 * steps / (0.1 * step))}
    row["layers"] = {
        "count": 4,
        "time_s": {"median": 0.1 * step, "max": 0.12 * step, "max_layer": 3},
        "exposed_s": {"median": 0.075 * step, "max": 0.09 * step, "max_layer": 3},
    }
    record = {"kind": "breakdown", "launch": 4, "time_s": 1_795_352_700.0, "arm": arm, "phase": phase, "steps": steps}
    record |= {"source": "torch.profiler", "unavailable": None, "unmatched": None, "without_idle": None}
    record |= {"as_predicted": True, "ranks": ranks, "calls": [row], "trace": None}
    return record | changes


def records(design: Record, **changes: Any) -> list[Record]:
    found = make_records(design)
    labels = [arm["label"] for arm in design["arms"]]
    rows = [watched(label, phase, **changes) for label in labels for phase in ("prefill", "decode")]
    return [*found[:-1], *rows, found[-1]]


def test_figures_are_of_one_step_and_one_rank() -> None:
    design = make_design()
    found = records(design)
    rows = {(row["label"], row["phase"]): row for row in summarise_breakdown(design, found)}
    assert len(rows) == 2 * (len(design["arms"]) - 1), "the twin is the baseline's engine"
    row = rows["n4m4:batch", "decode"]
    timed = median(block_times(found, "n4m4:batch", "decode").values()) / design["workload"]["decode_steps"]
    assert row["step_s"] == pytest.approx(0.05 / STEPS)
    assert row["slow_down"] == pytest.approx(0.05 / STEPS / timed)
    assert row["compute_s"] + row["exposed_s"] + row["idle_s"] == pytest.approx(row["mean_step_s"])
    assert row["closure"] == pytest.approx(0, abs=1e-12)
    (call,) = row["calls"]
    assert (call["calls"], call["bytes"]) == (8, 2048)
    assert call["wait_s"] + call["transfer_s"] == pytest.approx(call["time_s"]) == pytest.approx(0.02 / STEPS)
    assert call["layers"]["exposed_s"] == {"median": 0.00375 / STEPS, "max": 0.0045 / STEPS, "max_layer": 3}


def test_an_older_journal_and_an_arm_that_failed_have_none() -> None:
    design = make_design()
    assert "breakdown" not in summary_of(design, make_records(design), None)
    found = records(design)
    for record in found:
        if record["kind"] == "verify" and record["arm"] == "tp16":
            record["verified"] = False
    assert "tp16" not in {row["label"] for row in summarise_breakdown(design, found)}


@pytest.mark.parametrize(("missed", "warned"), [(0.019, False), (0.021, True), (-0.021, True)])
def test_parts_that_miss_the_step_are_warned_of(missed: float, warned: bool) -> None:
    design = make_design()
    summary = summary_of(design, records(design, missed=missed), None)
    assert any(text.startswith("Breakdown: compute") for text in summary["warnings"]) is warned
    assert summary["breakdown"][0]["closure"] == pytest.approx(-missed)


def test_an_unknown_part_is_no_zero_and_has_its_reason() -> None:
    design = make_design()
    found = records(design)
    for record in (record for record in found if record["kind"] == "breakdown"):
        record["without_idle"] = "rank 0: this kernel does not count time in run queues"
        for rank in record["ranks"]:
            rank["idle_s"] = rank["hidden_s"] = None
    summary = summary_of(design, found, None)
    assert all(row["closure"] is None and row["idle_s"] is None for row in summary["breakdown"])
    assert closure(found[-2]["ranks"][0]) is None
    assert breakdown.bars("b", summary, "prefill", NUMBERS) is None
    page = render(design, make_env(), found, summary)
    assert "does not count time in run queues" in page and "Where a prefill step" not in page


def test_the_page_shows_parts_rows_and_bars() -> None:
    design = make_design()
    summary = summary_of(design, records(design), None)
    parts, prefill, decode = breakdown.tables(summary, {"tp8pp2": 2})
    assert len(parts.rows) == 8 and len(prefill.rows) == len(decode.rows) == 4
    texts = [cell.text.replace("\N{NO-BREAK SPACE}", " ") for cell in parts.rows[0]]
    assert texts[:5] == ["tp8pp2", "prefill", "600 ms", "297 ms (50 %)", "178 ms (30 %)"]
    assert {len(row) + (number % 2) for number, row in enumerate(parts.rows)} == {len(parts.head)}
    assert all(len(row) == len(prefill.head) for row in prefill.rows)
    page = render(design, make_env(), records(design), summary)
    assert "Where a decode step" in page and page.count(">Communication breakdown: prefill</h3>") == 1
    assert "Where a step&#39;s time goes" in page and "separate, untimed pass" not in page
    cells = dict(zip(prefill.head, prefill.rows[0], strict=True))
    assert cells["Bytes per layer"].text.split() == ["1.00", "KiB"] and cells["As predicted"].text == "yes"
    drawn = breakdown.bars("b", summary, "decode", NUMBERS)
    assert drawn is not None and "exposed communication 3.71" in drawn
    without = {key: value for key, value in summary.items() if key != "breakdown"}
    assert breakdown.tables(without, {}) == []
    older = render(design, make_env(), make_records(design), without)
    assert "Where a decode step" not in older and "separate, untimed pass" in older
    assert older.count(">Communication breakdown: prefill</h3>") == 1


def test_what_was_not_watched_keeps_the_older_table() -> None:
    design = make_design()
    summary = summary_of(design, records(design), None)
    assert costs.traffic(summary, "prefill", {}) is None
    whole = summary["breakdown"]
    untimed = [
        {**row, "calls": [{**call, "time_s": None} for call in row["calls"]]} if row["label"] == "tp16" else row
        for row in whole
    ]
    for kept in ([row for row in whole if row["label"] != "tp16"], untimed):
        table = costs.traffic({**summary, "breakdown": kept}, "decode", {})
        assert (
            table is not None
            and table.title == "Communication breakdown: decode, arms whose calls were not watched and timed"
        )
        assert {label for arms, _ in table.groups for label in arms} == {"tp16"}


@pytest.mark.parametrize(("stated", "shown"), [(True, "yes"), (False, "NO"), (None, "NO")])
def test_a_call_that_was_not_predicted_is_seen(stated: bool | None, shown: str) -> None:
    """One op of several suffices; the other phase and other axes are not touched."""
    design = make_design()
    summary = summary_of(design, records(design), None)
    op = {"phase": "prefill", "collective": "all_reduce", "axis": "tp", "as_predicted": True}
    summary["arms"][0]["traffic"] = [op, op | {"as_predicted": stated}, op | {"axis": "pp", "as_predicted": False}]
    _, prefill, decode = breakdown.tables(summary, {})
    texts = [dict(zip(t.head, t.rows[0], strict=True))["As predicted"].text for t in (prefill, decode)]
    assert texts == [shown, "not measured"]


def test_labels_are_inert() -> None:
    design, label = make_design(), "<script>alert(1)</script>"
    summary = copy.deepcopy(summary_of(design, records(design), None))
    summary["arms"][0]["label"] = summary["breakdown"][0]["label"] = summary["breakdown"][1]["label"] = label
    summary["breakdown"][0]["calls"][0]["role"] = label
    assert label not in str(breakdown.bars("b", summary, "prefill", NUMBERS | {label: 0}))
    assert all(
        isinstance(cell.text, str) for table in breakdown.tables(summary, {}) for row in table.rows for cell in row
    )
