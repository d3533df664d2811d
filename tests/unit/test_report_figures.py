"""Figures of real GPU runs that a page once showed badly: tiny bytes, tiny spreads, crowded pipelines, FP8 winners."""

import copy
import math
import re
from typing import Any

import pytest
from run_fixture import make_design, make_env, make_records

from headgrid.experiment.stats import summarise
from headgrid.report import conditions, costs, html, partition, plots
from headgrid.report import format as fmt
from headgrid.report.naming import named

SPACE = "\N{NO-BREAK SPACE}"


def counter(mean: float, sd: float | None, unit: str, ceiling: float | None = None) -> dict[str, Any]:
    row = {"counter": "c", "label": "C", "mean": mean, "sd": sd, "unit": unit, "n": 5, "derived": None}
    return row | {"ceiling": ceiling, "share_of_ceiling": ceiling and mean / ceiling}


def cells(row: dict[str, Any]) -> tuple[str, str]:
    """Name and figure as the telemetry table shows them."""
    found = {"arms": [{"label": "a", "phases": {"prefill": [row]}}], "missing": [], "hz": 10}
    name, figure = conditions.telemetry({"telemetry": found}, "prefill").rows[0]
    return name.text, figure.text


@pytest.mark.parametrize(
    ("row", "name", "figure"),
    [
        (counter(1.0100001, 1.0e-14, "of a core"), "C, of a core", "1.010 ± 0.000\nn 5"),
        (counter(0.0656, 0.000442, "of a core"), "C, of a core", "0.06560 ± 0.00044\nn 5"),
        (counter(94.0 * 2**30, 0.0, "B", 140.4 * 2**30), "C (of 140 GiB)", f"94.0 ± 0.0 GiB\n67{SPACE}%, n 5"),
        (counter(6.3 * 2**20, 656 * 2**10, "B/s"), "C", "6.30 ± 0.64 MiB/s\nn 5"),
        (counter(1520.0, 34.8, "MHz", 1980.0), "C, MHz (of 1,980)", f"1,520 ± 35\n77{SPACE}%, n 5"),
        (counter(2100.0, None, "MHz"), "C, MHz", "2,100\nn 5"),
        (counter(0.0, 0.0, "1/s"), "C, 1/s", "0 ± 0\nn 5"),
        (counter(0.0, 0.0, "B/s"), "C", "0 ± 0 B/s\nn 5"),
    ],
)
def test_mean_and_spread_share_unit_and_decimals(row: dict[str, Any], name: str, figure: str) -> None:
    assert cells(row) == (name, figure)


def test_bytes_too_small_for_the_tables_unit_have_their_own() -> None:
    design = make_design(launches=1, blocks=3)
    records = make_records(design)
    for record in records:
        for rank in [*record.get("per_rank", ()), *record.get("predicted", ())] if record["kind"] == "memory" else ():
            rank |= {"kv_cache_bytes": 60 * 2**30, "communication_buffer_bytes": 512}
    rows = costs.memory(summarise(design, records)).rows
    assert [cell.text for cell in rows[0]].count("512 B") == 1
    assert not [cell.text for row in rows for cell in row if re.search(r"0\.0000", cell.text)]


def test_a_row_without_collectives_keeps_the_columns_of_words_flush_left() -> None:
    design = make_design(launches=1, blocks=3)
    records = [r for r in make_records(design) if not (r["kind"] == "traffic" and r["arm"] == "tp16")]
    table = costs.traffic(summarise(design, records), "prefill", {})
    assert table is not None
    assert "none issued" in [cell.text for row in table.rows for cell in row]
    assert {table.head[column] for column in table.numeric} == {
        "Calls", "Bytes per rank", "Time", "Bytes per layer", "Time per layer",
    }  # fmt: skip


def micro_batches(count: int) -> list[dict[str, Any]]:
    return [
        {"stage": stage, "micro_batch": k, "step": 0, "start_s": 0.1 * (k + stage), "end_s": 0.1 * (k + stage + 1)}
        for k in range(count)
        for stage in range(2)
    ]


@pytest.mark.parametrize(("count", "every"), [(8, 1), (48, 2), (480, 15)])
def test_micro_batches_are_numbered_at_even_distances(count: int, every: int) -> None:
    """Whatever the jitter of their times: never some of a kind and others not."""
    events = micro_batches(count)
    for index, event in enumerate(events):
        event["end_s"] -= 0.002 * (index % 5)
    drawn = plots.timeline("t", events, 2)
    assert drawn is not None
    texts = re.findall(r"<text[^>]*>(\d+)</text>", str(drawn[0]))
    numbered = [k for k in range(1, count) if texts.count(str(k)) >= 2]  # once a stage; ticks stand there once
    assert numbered == list(range(every, count, every))


def with_fp8(summary: dict[str, Any], label: str) -> dict[str, Any]:
    """The summary as if this arm had FP8 linears."""
    changed = copy.deepcopy(summary)
    for arm in changed["arms"]:
        if arm["label"] == label:
            arm["fp8"], arm["relative_error"] = {"against": "tp8pp2", "error_ratio": 37.0}, 0.048
    return changed


def test_an_fp8_winner_is_not_the_only_one_named() -> None:
    design = make_design()
    summary = summarise(design, make_records(design))
    plain = html.outcome(summary, 0.01)
    assert "FP8" not in plain and "n4m4:batch handled" in plain
    told = html.outcome(with_fp8(summary, "n4m4:batch"), 0.01)
    assert "with FP8 linears within a wider bound" in told
    assert "in prefill, n4m4:batch (error 4.8" in told and "none without FP8 was shown to be faster" in told
    fast = copy.deepcopy(with_fp8(summary, "n4m4:batch"))
    for row in fast["comparisons"]:
        if (row["a"], row["b"], row["phase"]) == ("tp16", "tp8pp2", "prefill"):
            row |= {"verdict": "faster", "ratio": 1.123}
    assert f"and tp16, the fastest without FP8, 12.3{SPACE}% more" in html.outcome(fast, 0.01)
    assert fmt.TIMES in named(with_fp8(summary, "tp16")["arms"][-1])


def test_what_a_design_leaves_open_is_not_called_unmeasured() -> None:
    design = make_design()
    design["model"]["attention_scale"] = None
    env = make_env() | {"gpus": [{"name": "NVIDIA H200", "memory_total_bytes": 2**37, "ecc": True}] * 2}
    env |= {"load_average": [2.4990234375, 1.0], "cuda": None}
    facts = {f"{title} {key}": value for title, rows in html._facts(design, env, []) for key, value in rows}
    assert facts["Model attention_scale"] == "not set" and facts["Environment cuda"] == "not measured"
    assert facts["Environment gpus · memory_total"] == f"2 {fmt.TIMES} 128 GiB"
    assert facts["Environment gpus · name"] == f"2 {fmt.TIMES} NVIDIA H200"
    assert facts["Environment load_average"] == "2.49902, 1"


def test_the_last_channel_is_written_inside_the_drawing() -> None:
    (figure,) = html._partitions(html._layouts(make_design(arms=[{"label": "tp16", "layout": "tp16"}])))
    ends = re.findall(r'<text x="([\d.]+)"[^>]*text-anchor="(\w+)"[^>]*>8</text>', str(figure.drawing))
    assert ends and all(anchor == "end" and math.ceil(float(x)) < partition.WIDTH for x, anchor in ends[-1:])
