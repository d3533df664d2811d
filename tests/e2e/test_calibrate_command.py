"""A calibration as a user makes and uses it: real ranks, and a run whose figures are shares of it."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import calibrated
import pytest

from headgrid.cli import main
from headgrid.experiment import machine
from headgrid.runtime import launch
from headgrid.spec.calibration import KINDS, read_calibration

TINY = ("--model", "tiny", "--device", "cpu", "--ranks", "2", "--batch", "2", "--seq", "8", "--decode-steps", "2")
BFLOAT16 = [calibrated.kernel("bfloat16", (256, 1024, 1024), calibrated.figure(4e10))]
ARMS = ("--arms", "tp2,n1m2:batch", "--blocks", "2", "--telemetry-hz", "10")


def headgrid(*args: str, cwd: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "headgrid", *args, "--json"], cwd=cwd, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_calibration_of_two_ranks_and_a_run_measured_against_it(tmp_path: Path) -> None:
    said = headgrid("calibrate", "--device", "cpu", "--seconds", "0.1", "--out", "here.json", cwd=tmp_path)
    made = read_calibration(tmp_path / "here.json")
    assert said["sha256"] == made.to_dict()["sha256"] and said["file"] == "here.json" and made.ranks == 2
    for figure in (made.product("float32").flop_per_s, made.attend("float32").flop_per_s, made.copy_bytes_per_s):
        assert 1e6 < figure.low <= figure.median <= figure.high <= figure.best < 1e14 and len(figure.per_rank) == 2
    assert [(cost.kind, cost.ranks) for cost in made.collectives] == [(kind, 2) for kind in KINDS]
    for cost in made.collectives:
        sizes = [point.size_bytes for point in cost.points]
        assert sizes == [1024 * 4**power for power in range(7)]  # what a rank sends, as the runtime counted it
        assert all(point.low_s <= point.median_s <= point.high_s and point.n >= 5 for point in cost.points)
        assert cost.time_s(0) >= 0 and math.isfinite(cost.worst_relative_error)

    summary = headgrid("compare", *TINY, *ARMS, "--block-seconds", "0", "--calibration", "here.json", cwd=tmp_path)
    rows = {(row["label"], row["kind"]): row for row in summary["ceilings"]["shares"]}
    assert summary["ceilings"]["calibration"]["sha256"] == said["sha256"] and summary["ceilings"]["data_sheet"] is None
    assert {row["of"] for row in rows.values()} == {"measured"}
    for label in ("tp2", "n1m2:batch"):
        rate = next(arm["prefill_tokens_per_s"] for arm in summary["arms"] if arm["label"] == label)
        share, least_s = rows[label, "mfu"]["share"], rows[label, "mfu"]["least_s"]
        assert share["mean"] == pytest.approx(least_s * rate["mean"] / 16) and 0 < share["mean"] < 1
    run = tmp_path / summary["run"]
    assert json.loads((run / "design.json").read_text())["calibration"]["sha256"] == said["sha256"]
    assert "Shares of ceilings" in (run / "report.html").read_text()
    sent = [row for arm in summary["telemetry"]["arms"] for row in arm["phases"]["decode"] if "sent" in row["counter"]]
    assert sent and all(row["ceiling"] == made.link_bytes_per_s and row["ceiling_measured"] for row in sent)
    assert headgrid("check", str(run), cwd=tmp_path)["accepted"] is True


def refused(args: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    def no_process(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["headgrid", *args])
    monkeypatch.setattr(launch, "run", no_process)
    with pytest.raises(SystemExit) as ended:
        main()
    errors = capsys.readouterr().err
    assert ended.value.code in (64, 69), errors
    assert "Traceback" not in errors and len(errors.strip().splitlines()) <= 12
    return errors


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--device", "tpu"), "'tpu' is not known"),
        (("--seconds", "0"), "0 seconds for each rate"),
        (("--seconds", "nan"), "nan seconds"),
        (("--seconds", "3600"), "3600 seconds"),
        (("--ranks", "0"), "Invalid value for '--ranks'"),
        (("--ranks", "900"), "free for each of 900 ranks"),
        (("--out", "."), "it exists"),
        (("--out", "/proc/nowhere/file.json"), "cannot write"),
    ],
)
def test_a_calibration_that_cannot_be_made_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, args: tuple[str, ...], said: str
) -> None:
    device = () if "--device" in args else ("--device", "cpu")
    assert said in refused(("calibrate", *device, *args), tmp_path, monkeypatch, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept.json").write_text("mine")
    said = refused(("calibrate", "--device", "cpu", "--out", "kept.json"), tmp_path, monkeypatch, capsys)
    assert "it exists" in said and (tmp_path / "kept.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (None, "cannot read a calibration"),
        ({}, "no calibration of schema"),
        (calibrated.h200().to_dict(), "the calibration is of cuda"),
        (calibrated.cpu(16).to_dict(), "of 16 ranks, the run has 2"),
        (calibrated.cpu(2, products=BFLOAT16).to_dict(), "no products in float32"),
        (calibrated.cpu(2).to_dict() | {"ranks": 4}, "changed after it was written"),
    ],
)
def test_a_calibration_that_is_not_of_this_run_is_refused_before_anything_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: dict[str, Any] | None,
    said: str,
) -> None:
    monkeypatch.setattr(machine, "_cpu_name", lambda: "Some CPU")
    if file is not None:
        (tmp_path / "file.json").write_text(json.dumps(file))
    args = ("compare", *TINY, *ARMS, "--calibration", "file.json")
    errors = refused(args, tmp_path, monkeypatch, capsys)
    assert said in errors and ("headgrid calibrate" in errors or "legal" in errors)
    assert not (tmp_path / "runs").exists()


def test_help_has_examples(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["headgrid", "calibrate", "--help"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().out
    assert "headgrid calibrate --seconds 10 --out h200.json" in said and "--json" in said
