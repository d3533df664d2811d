"""A comparison of arms with and without FP8 linears in one run, as a user runs it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ARMS = "tp2,tp2:fp8,n1m2:batch+gathered+fp8"
SIZES = ("--model", "tiny", "--batch", "4", "--seq", "24", "--decode-steps", "3", "--device", "cpu", "--blocks", "1")


def headgrid(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headgrid", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200)


def test_fp8_arms_are_verified_and_named_with_their_error(tmp_path: Path) -> None:
    done = headgrid("compare", "--ranks", "2", "--arms", ARMS, *SIZES, "--block-seconds", "0", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    arms = {arm["label"]: arm for arm in summary["arms"]}
    assert all(arm["verified"] for arm in arms.values())
    assert [arms[label]["fp8"] for label in ("tp2", "tp2 (A/A)")] == [None, None]
    stationary, gathered = arms["tp2:fp8"], arms["n1m2:batch+gathered+fp8"]
    assert stationary["fp8"]["against"] == "tp2"
    ratio = stationary["relative_error"] / arms["tp2"]["relative_error"]
    assert stationary["fp8"]["error_ratio"] == pytest.approx(ratio)
    assert gathered["fp8"]["against"] == "one device"
    assert min(stationary["fp8"]["error_ratio"], gathered["fp8"]["error_ratio"]) > 1000
    assert stationary["memory_bytes"]["parameters"] < 0.5 * arms["tp2"]["memory_bytes"]["parameters"]
    run = Path(tmp_path / summary["run"])
    records = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    controls = [record for record in records if record["kind"] == "control"]
    assert {control["linears"]: control["rejected"] for control in controls} == {"model": True, "fp8": True}
    page = (run / "report.html").read_text()
    assert page.count("tp2:fp8 (error ") > 10
    rows = re.findall(r'<th scope="row"[^>]*>([^<]*fp8[^<]*)</th>', page)
    assert len(rows) >= 8
    assert all(row.count("fp8") == row.count("(error ") for row in rows if row not in arms)
    assert [row for row in rows if row in arms] == [], "a bare name"
