"""`headgrid scale` under `torchrun --nnodes 2`: sizes that fill one host after the other."""

import json
import os
import signal
from pathlib import Path

from clusters import SMALL, Cluster, ended, eventually

SIZES = (1, 2, 4)


def records(study: Path, point: str) -> list[dict]:
    path = study / point / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def launches(folder: Path) -> list[dict]:
    """Of all points of the study there."""
    found = [records(path.parent.parent, path.parent.name) for path in folder.glob("runs/*/*/journal.jsonl")]
    return [each for journal in found for each in journal if each["kind"] == "launch"]


def test_a_study_over_two_hosts_goes_on_after_ctrl_c(cluster: Cluster) -> None:
    first, second = cluster.folders
    sizes = ("--ranks", ",".join(map(str, SIZES)), "--mode", "strong")
    command = ("-m", "headgrid", "scale", *SMALL, "--layouts", "tp", *sizes, "--rounds", "1", "--blocks", "1")
    started = cluster.torchrun(*command, port=29611)
    assert eventually(lambda: launches(first)), started[0].err[-3000:]
    os.kill(started[0].process.pid, signal.SIGINT)
    assert 0 not in ended(started) and cluster.settled()
    assert "interrupted" in started[0].err and "got signal: 2" in started[0].err, started[0].err[-3000:]
    said = ("was ended by a signal", "has lost another rank")  # by whether torchrun's store was still there to say it
    assert started[1].err.count("error: ") == 1 and any(each in started[1].err for each in said), started[1].err[-3000:]

    (study,) = first.glob("runs/*scale*")
    started = cluster.torchrun(
        "-m", "headgrid", "scale", "--device", "cpu", "--resume", str(study), "--json", port=29612
    )
    assert ended(started) == [0, 0], started[0].err[-3000:] + started[1].err[-3000:]
    assert cluster.settled() and not (second / "runs").exists()
    answers = [json.loads(line) for each in started for line in each.out.splitlines() if line.startswith("{")]
    assert len(answers) == 1 and answers[0]["complete"] and all(row["verified"] for row in answers[0]["rows"])
    for size in SIZES:
        point = "ranks1-strong" if size == 1 else f"ranks{size}-strong"
        found = [each for each in records(study, point) if each["kind"] == "launch"]
        assert {tuple(each["hosts"]) for each in found} == {(0, 0, 1, 1)[:size]}, (size, found)
        assert (study / point / "telemetry.jsonl").exists()
        assert (study / point / "telemetry-1.jsonl").exists() == (size > 2)  # where no rank is, nobody samples
