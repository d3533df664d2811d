"""`check` on report pages: the page of a run with telemetry is accepted wherever it was made, an edited one is not."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_fixture import make_env
from telemetry_fixture import Run

from headgrid.experiment.check.finding import Finding, Note
from headgrid.experiment.design import hash_of
from headgrid.experiment.folder import write_json
from headgrid.experiment.journal import Journal
from headgrid.experiment.machine import source_sha256
from headgrid.report.audit import page_figures
from headgrid.report.conclude import conclude

CONCLUDE = """
import sys
from pathlib import Path
from headgrid.report.conclude import conclude
conclude(Path(sys.argv[1]))
print(*{"prefill", "decode"})
"""
ORDERS = {"0": "decode prefill", "1": "prefill decode"}
"""Hash seeds, and how a set of the two phases is ordered under them."""


def slow_clock(run: Run) -> None:
    """The clock of one arm is 10 % lower in both phases: what is told of it names one of them."""
    slow = [r for r in run.records if r["kind"] == "block" and r["arm"] == "n2m2:batch"]
    for sample in (
        sample for record in slow for phase in ("prefill", "decode") for sample in run.during(record, phase)
    ):
        sample["gpu"]["sm_clock_mhz"] = [1579] * len(sample["gpu"]["sm_clock_mhz"])


@pytest.fixture(scope="module")
def concluded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another source whose report was made by this one, in a folder given by its whole path."""
    folder = tmp_path_factory.mktemp("page") / "run"
    folder.mkdir()
    run = Run(blocks=3)
    slow_clock(run)
    write_json(folder / "design.json", run.design | {"hash": hash_of(run.design)})
    write_json(folder / "env.json", make_env() | {"source_sha256": "5a" * 32})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        with Journal(folder / "journal.jsonl") as journal:
            for record in run.records:
                journal.append(record)
    (folder / "telemetry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run.lines))
    conclude(folder)
    return folder


@pytest.fixture
def page(concluded: Path) -> str:
    return (concluded / "report.html").read_text()


def audited(folder: Path, page: str | None = None) -> list[Finding | Note]:
    """What the audit says of the folder, or of the folder with another page."""
    original = (folder / "report.html").read_text()
    try:
        (folder / "report.html").write_text(page or original)
        return list(page_figures(folder, source_sha256()))
    finally:
        (folder / "report.html").write_text(original)


def test_a_page_made_again_by_this_version_is_compared_and_accepted(concluded: Path, page: str) -> None:
    assert "Telemetry: prefill" in page and "GPU_CLOCKS_DIFFER" in page
    assert audited(concluded) == []


def test_the_folder_may_be_moved_and_named_otherwise(
    concluded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "elsewhere"
    moved.symlink_to(concluded)
    monkeypatch.chdir(tmp_path)
    assert audited(Path("elsewhere")) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("GPU_CLOCKS_DIFFER", "GPU_CLOCKS_AGREE"),  # isolation
        (">690", ">390"),  # telemetry
        ("<td", "<td>7,777</td><td"),  # a figure more
        ('"exploratory"', '"declared"'),  # the data behind the script
        ('"use strict"', '"use nothing"'),  # the script
    ],
)
def test_an_edited_page_is_rejected_and_the_place_is_quoted(
    concluded: Path, page: str, before: str, after: str
) -> None:
    assert before in page
    (finding,) = audited(concluded, page.replace(before, after, 1))
    assert isinstance(finding, Finding) and finding.gate == "report.figures"
    assert after.removeprefix("<td").removeprefix(">").partition("<")[0] in finding.what


def test_two_figures_that_change_places_are_an_edit(concluded: Path, page: str) -> None:
    """The same words in another order: tp2pp2's figures under another name."""
    one, other = ">tp2pp2</th>", ">n2m2:batch</th>"
    swapped = page.replace(one, "\0").replace(other, one).replace("\0", other)
    assert swapped != page and [type(each) for each in audited(concluded, swapped)] == [Finding]


def test_a_page_of_another_version_is_not_compared_unless_this_one_made_the_run(concluded: Path, page: str) -> None:
    other = page.replace(source_sha256(), "6b" * 32).replace("Accuracy", "Exactness")
    (note,) = audited(concluded, other)
    assert isinstance(note, Note) and "neither it nor the run is of this version" in note.what
    assert f"`headgrid report {concluded}`" in note.what
    env = concluded / "env.json"
    kept = env.read_text()
    try:
        env.write_text(kept.replace("5a" * 32, source_sha256()))
        (finding,) = audited(concluded, other)
    finally:
        env.write_text(kept)
    assert isinstance(finding, Finding)


def test_summary_and_page_are_the_same_in_every_process(concluded: Path, tmp_path: Path) -> None:
    """Strings hash anew in each process: no order of a set may reach a page."""
    made = {}
    for seed, order in ORDERS.items():
        command = [sys.executable, "-c", CONCLUDE, str(concluded)]
        done = subprocess.run(
            command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, timeout=120, check=True
        )
        assert done.stdout.strip() == order, "else this test could not fail"
        files = [(concluded / name).read_bytes() for name in ("summary.json", "report.html")]
        made[seed] = [hashlib.sha256(each).hexdigest() for each in files]
    assert made["0"] == made["1"]
