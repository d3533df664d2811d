"""What is told of a run once: by rank 0, of contestants, and in the right words."""

from types import SimpleNamespace

import pytest
from test_protocol import BASE, SLOW, a_run

from headgrid.cli import calibrate as command
from headgrid.experiment import calibrate
from headgrid.experiment.breakdown.calls import Call, role
from headgrid.experiment.cautions import warnings
from headgrid.experiment.stats import summarise
from headgrid.layout.layout import parse_layout
from headgrid.report import ceilings
from headgrid.report.html import render
from headgrid.report.resolving import tail_line
from headgrid.runtime import launch


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("tp4:dp-attention", "rows of data-parallel attention"),
        ("tp4:sharded", "sequence-parallel residual"),
        ("n2m2:gather+concat", "inter-group concatenation"),
    ],
)
def test_what_a_gather_in_a_layer_is_for(layout: str, words: str) -> None:
    assert role(Call("all_gather", "tp", 64, 0, False, 1, 1, 0), parse_layout(layout)) == words


def _on_hosts(*placements: list[int] | None) -> list[str]:
    """Warnings of a run with a launch for each placement, whose arms all send across hosts."""
    design, records = a_run(launches=len(placements))
    begun = [record for record in records if record["kind"] == "launch"]
    for record, hosts in zip(begun, placements, strict=True):
        record |= {"ranks": 4} | ({"hosts": hosts} if hosts else {})
    crossing = {"crossings": [{"axis": "tp", "inside_bytes": 1_000_000, "across_bytes": 3_000_000}], "ops": []}
    for arm in design["arms"]:
        common = {"kind": "traffic", "launch": 0, "arm": arm["label"], "phase": "prefill", "as_predicted": True}
        records.insert(-1, common | crossing)
    return warnings(design, records, summarise(design, records))


def test_a_launch_that_names_no_hosts_was_on_one() -> None:
    different = "The launches had their ranks on different hosts."
    assert different not in _on_hosts(None, [0, 0, 0, 0])
    assert different in _on_hosts(None, [0, 0, 1, 1])


def test_what_crosses_hosts_is_told_of_contestants() -> None:
    (said,) = [each for each in _on_hosts([0, 0, 1, 1]) if each.startswith("Between hosts go in a prefill")]
    assert f"{BASE} 3 of 4 MB" in said and "dp4 3 of 4 MB" in said
    assert "(+2 %)" not in said and "(A/A)" not in said


def test_tables_and_lines_leave_the_planted_arm_out() -> None:
    design, records = a_run()
    summary = summarise(design, records) | {"run": "x"}
    page = render(design, {"cpu_count": 2}, records, summary)
    assert f"{len(design['arms']) - 1} arms · " in page and f"{len(design['arms'])} arms · " not in page
    block = {"phase": "prefill", "quantile": 0.5, "seconds": 1.0, "ci95": None, "unit": "block", "refused": None}
    told = tail_line({**summary, "tails": {"per_step": "", "blocks": [block | {"label": x} for x in (BASE, SLOW)]}})
    assert f"{BASE} prefill" in told and SLOW not in told
    found = {"shares": [], "data_sheet": None, "calibration": None}
    table = ceilings.table({**summary, "ceilings": found})
    assert table is not None and [row[0].arms for row in table.rows] == [(BASE,), ("n2m2:batch",), ("dp4",)]


@pytest.mark.parametrize(("rank", "told"), [(0, True), (1, False)])
def test_notes_of_a_calibration_under_torchrun_are_rank_0_s(
    rank: int, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "joined_by_torchrun", lambda: True)
    monkeypatch.setattr(launch, "torchrun_rank", lambda: (rank, 2))
    monkeypatch.setattr(calibrate, "make", lambda *_: (SimpleNamespace(out="x"), ["fewer ranks than cores"]))
    monkeypatch.setattr(calibrate, "carry_out_joined", lambda plan: None)
    command.calibrate(None, None, None, None, False)
    said = capsys.readouterr()
    assert ("fewer ranks than cores" in said.out + said.err) == told
