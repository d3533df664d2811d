"""The command: a real run is accepted, its page and its journal may not be edited, anyone's file is judged."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEED = ROOT / "tests" / "check" / "seed_experiment.json"


def headgrid(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "headgrid", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, env=environment)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small comparison on this machine's CPU."""
    folder = tmp_path_factory.mktemp("check")
    sizes = ["--ranks", "2", "--batch", "4", "--seq", "24", "--decode-steps", "4", "--blocks", "3"]
    sizes += ["--block-seconds", "0.02"]
    done = headgrid("compare", "--model", "tiny", "--arms", "pp2,n1m2:batch", *sizes, "--device", "cpu", cwd=folder)
    assert done.returncode == 0, done.stderr
    return next((folder / "runs").iterdir())


def test_accepts_a_real_run_and_ends_with_one_json_line(real: Path) -> None:
    done = headgrid("check", real.name, "--json", cwd=real.parent)
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    unforeseen = [note for note in verdict["notes"] if "the breakdown's parts miss" not in note]  # on a busy host
    assert verdict["accepted"] is True and verdict["findings"] == [] and unforeseen == []
    assert verdict["examined"]["block"] == 4 * 4  # two layouts, the A/A twin and the planted one; a warm-up block


def test_rejects_it_when_page_and_journal_were_edited(real: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(real, tmp_path / "run"))
    page = (folder / "report.html").read_text()
    edited = re.sub(r'(<td class="number">)\d', r"\g<1>9", page, count=3)
    assert edited != page
    (folder / "report.html").write_text(edited)
    journal = (folder / "journal.jsonl").read_text()
    (folder / "journal.jsonl").write_text(journal.replace('"warmup": true', '"warmup": false', 1))
    done = headgrid("check", "run", "--json", cwd=tmp_path)
    assert done.returncode == 65
    verdict = json.loads(done.stdout.splitlines()[-1])
    assert {"report.figures", "journal.chain", "blocks.counts"} <= set(verdict["reasons"])
    assert "rejected for" in done.stderr and "Traceback" not in done.stderr


def test_judges_a_file_and_says_why(tmp_path: Path) -> None:
    done = headgrid("check", str(SEED), cwd=tmp_path)
    assert done.returncode == 65
    assert "1.2e+06 x TPOT 0.35 ms = 420 sequences, the batch has 128" in done.stdout
    assert "rejected for 13 reasons" in done.stderr


def test_a_resume_with_nothing_left_changes_nothing(real: Path) -> None:
    before = {path.name: path.read_bytes() for path in real.iterdir() if path.is_file()}
    done = headgrid("compare", "--resume", f"runs/{real.name}", cwd=real.parent.parent)  # as the run names itself
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in real.iterdir() if path.is_file()} == before
    assert headgrid("check", real.name, cwd=real.parent).returncode == 0


def test_a_folder_of_runs_is_refused_with_their_names(real: Path) -> None:
    done = headgrid("check", str(real.parent), cwd=real.parent)
    assert done.returncode == 64 and f"headgrid check {real}" in done.stderr


@pytest.mark.parametrize("subject", ["nothing.json", "."])
def test_bad_input_is_refused_in_one_block(tmp_path: Path, subject: str) -> None:
    done = headgrid("check", subject, "--json", cwd=tmp_path)
    assert done.returncode == 64 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "legal" in done.stderr and "Traceback" not in done.stderr


def test_help_shows_examples(tmp_path: Path) -> None:
    done = headgrid("check", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "headgrid check runs/" in done.stdout and "--published" in done.stdout
