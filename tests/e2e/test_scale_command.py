"""Scaling as a user measures it: real ranks, Ctrl-C in the middle, and the rest of it afterwards."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headgrid.cli import main
from headgrid.runtime import launch

SMALL = ("--model", "tiny", "--device", "cpu", "--seq", "16", "--decode-steps", "2", "--blocks", "2")
COMMAND = [sys.executable, "-m", "headgrid", "scale"]


def test_an_interrupted_study_keeps_what_there_is_and_is_finished_by_resume(tmp_path: Path) -> None:
    wanted = (*SMALL, "--batch", "2", "--ranks", "1,2", "--layouts", "tp,n1m:batch+gathered", "--rounds", "2")
    wanted += ("--mode", "weak")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    first = subprocess.Popen([*COMMAND, *wanted], cwd=tmp_path, text=True, **pipes)
    deadline = time.monotonic() + 120
    while not (found := [p for p in tmp_path.glob("runs/*/*/journal.jsonl") if '"block"' in p.read_text()]):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    said, errors = first.communicate(timeout=60)
    study = found[0].parent.parent
    assert first.returncode == 130 and "--resume" in errors and "Traceback" not in errors
    assert "incomplete" in said and json.loads((study / "summary.json").read_text())["complete"] is False
    kept = {path: path.read_bytes() for path in study.glob("*/journal.jsonl")}

    done = subprocess.run(
        [*COMMAND, "--resume", str(study), "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert all(path.read_bytes().startswith(before) for path, before in kept.items())
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["complete"] and summary["negative_control_rejected"] is True
    rows = {(row["family"], row["mode"], row["ranks"]): row for row in summary["rows"]}
    assert len(rows) == 4 and all(row["verified"] for row in rows.values())
    assert rows["n1m:batch+gathered", "weak", 2]["batch"] == 4 and rows["tp", "weak", 1]["batch"] == 2
    for (_, _, ranks), row in rows.items():
        assert row["prefill"]["efficiency"] == 1 if ranks == 1 else row["prefill"]["efficiency_ci95"]
        assert row["decode"]["efficiency"] > 0 and row["decode_tpot_s"]["mean"] > 0
        assert 4 <= row["memory"]["per_parameter"]["parameters_bytes"] < 4.1  # fp32, stored once, small copies


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--mode", "sideways"), "'sideways' is not known"),
        (("--ranks", "1,two"), "is not a list of numbers"),
        (("--ranks", "4"), "nothing to scale over"),
        (("--layouts", "tp4"), "leaves 0 sizes out"),
        (("--resume", "nowhere"), "is not the folder of a study"),
        (("--batch", "60000", "--seq", "500"), "GiB"),
        (("--out", "/proc/nowhere"), "cannot write"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: tuple[str, ...],
    said: str,
) -> None:
    def no_process(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["headgrid", "scale", *SMALL, "--batch", "4", *args])
    monkeypatch.setattr(launch, "run", no_process)
    with pytest.raises(SystemExit) as ended:
        main()
    errors = capsys.readouterr().err
    assert ended.value.code in (64, 69) and said in errors, errors
    assert "Traceback" not in errors and len(errors.strip().splitlines()) <= 12
    assert list(tmp_path.iterdir()) == []
