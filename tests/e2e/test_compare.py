"""The main job as a user runs it: real processes, real ranks, real files."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from headgrid.cli import main
from headgrid.experiment.telemetry import read
from headgrid.experiment.telemetry_series import windows
from headgrid.runtime import launch

SMALL = (
    *("--ranks", "4", "--model", "tiny", "--batch", "4", "--seq", "16", "--decode-steps", "2", "--device", "cpu"),
    *("--block-seconds", "0"),
)
TWO_ARMS = ("--arms", "tp2pp2,n2m2:batch")  # where it is not the arms that are tested


def headgrid(*args: str, cwd: Path, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "headgrid", *args], cwd=cwd, capture_output=True, text=True, timeout=timeout
    )


def start(*args: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "headgrid", *args], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def wait_for_blocks(folder: Path, count: int, process: subprocess.Popen[str]) -> Path:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for journal in folder.glob("runs/*/journal.jsonl"):
            if journal.read_text().count('"kind": "block"') >= count:
                return journal.parent
        time.sleep(0.05)
    raise AssertionError(f"no {count} blocks appeared: {process.communicate()}")


def ended(processes: list[psutil.Process], within_s: float = 20) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    return not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("compare")
    done = headgrid("compare", *SMALL, "--block-seconds", "0.02", "--blocks", "2", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), folder


def test_json_has_what_the_documentation_promises(finished: tuple[dict, Path]) -> None:
    summary, folder = finished
    assert {arm["layout"] for arm in summary["arms"]} == {"tp2pp2", "n2m2:gather+concat", "n2m2:batch", "tp4", "dp4"}
    assert summary["device"] == "cpu" and summary["negative_control_rejected"] is True and summary["complete"]
    for arm in summary["arms"]:
        assert arm["verified"] is True
        assert 0 < arm["relative_error"] < 1e-5
        assert arm["prefill_tokens_per_s"]["mean"] > 0 and arm["decode_tpot_s"]["mean"] > 0
        assert arm["prefill_tokens_per_s"]["ci95"][0] < arm["prefill_tokens_per_s"]["mean"]
        assert arm["memory_bytes"]["parameters"] > 0
    pairs = {(row["a"], row["b"], row["phase"]) for row in summary["comparisons"]}
    assert ("tp2pp2 (A/A)", "tp2pp2", "prefill") in pairs and ("n2m2:batch", "dp4", "decode") in pairs
    assert (folder / summary["run"] / "report.html").stat().st_size > 50_000


def test_a_slow_down_is_planted_and_sentinels_are_read(finished: tuple[dict, Path]) -> None:
    """Whether 2 % are found depends on how quiet this machine is; that they are looked for does not."""
    summary, folder = finished
    assert summary["resolution"]["label"] == "tp2pp2 (+2 %)" and len(summary["resolution"]["phases"]) == 2
    assert not any("(+2 %)" in row["a"] + row["b"] for row in summary["comparisons"])
    records = [json.loads(line) for line in (folder / summary["run"] / "journal.jsonl").read_text().splitlines()]
    for record in (record for record in records if record["kind"] in ("block", "end")):
        assert all(len(times) == 4 and min(times) > 0 for times in record["sentinels"].values())
    assert len(records[-1]["sentinels"]) == 3


def test_a_pilot_sets_the_turns_of_each_block(finished: tuple[dict, Path]) -> None:
    """As many turns as it finds long enough, or dependence asks for: of a few milliseconds each, on a quiet machine."""
    summary, folder = finished
    records = [json.loads(line) for line in (folder / summary["run"] / "journal.jsonl").read_text().splitlines()]
    (place,) = (n for n, record in enumerate(records) if record["kind"] == "pilot")
    pilot, blocks = records[place], [record for record in records if record["kind"] == "block"]
    assert all(record["warmup"] is (n < place) for n, record in enumerate(records) if record["kind"] == "block")
    assert len(pilot["prefill_s"]) >= 2 and len(pilot["sentinels"]["gemm_s"]) == len(pilot["prefill_s"]) + 7
    assert pilot["turns"] * pilot["turn_s"] >= 0.02 and summary["pilot"]["turns"] == pilot["turns"]
    for record in blocks:
        assert {len(column) for column in record["turns"].values()} == {1 if record["warmup"] else pilot["turns"]}
    assert summary["reruns"]["blocks"] == 0  # of two blocks a quarter is none


def test_measured_memory_and_traffic_are_the_predicted_ones(finished: tuple[dict, Path]) -> None:
    summary, folder = finished
    records = [json.loads(line) for line in (folder / summary["run"] / "journal.jsonl").read_text().splitlines()]
    memory = [record for record in records if record["kind"] == "memory"]
    traffic = [record for record in records if record["kind"] == "traffic"]
    assert len(memory) == 7 and len(traffic) == 14
    pairs = [pair for record in memory for pair in zip(record["per_rank"], record["predicted"], strict=True)]
    assert len(pairs) == 7 * len(memory[0]["per_rank"])
    assert all(measured | {"decode_peak_bytes": 0} == predicted for measured, predicted in pairs)
    assert all(record["as_predicted"] for record in traffic)


def test_the_pipeline_really_overlaps_in_both_phases(finished: tuple[dict, Path]) -> None:
    summary, folder = finished
    records = [json.loads(line) for line in (folder / summary["run"] / "journal.jsonl").read_text().splitlines()]
    events = next(record["events"] for record in records if record["kind"] == "pipeline")
    for phase in ("prefill", "decode"):
        spans = {
            (e["stage"], e["micro_batch"], e["step"]): (e["start_s"], e["end_s"]) for e in events if e["phase"] == phase
        }
        ahead = [
            key
            for key, (start_s, end_s) in spans.items()
            if key[0] == 0
            for other, (other_start_s, other_end_s) in spans.items()
            if other[0] == 1 and other[1:] < key[1:] and start_s < other_end_s and other_start_s < end_s
        ]
        assert ahead, f"stage 0 never works ahead of stage 1 in {phase}"
    steps = {key[2] for key in spans}  # decode: a step starts on stage 0 before the last one has ended on stage 1
    assert any(spans[0, 0, step + 1][0] < max(spans[1, k, step][1] for k in (0, 1)) for step in steps - {max(steps)})


def test_each_arm_is_watched_behind_its_blocks(finished: tuple[dict, Path]) -> None:
    summary, folder = finished
    run = folder / summary["run"]
    kinds = [json.loads(line)["kind"] for line in (run / "journal.jsonl").read_text().splitlines()]
    assert kinds.count("breakdown") == 14 and "block" not in kinds[kinds.index("breakdown") :]
    assert len(summary["breakdown"]) == 10 and len(list((run / "traces").iterdir())) == 10
    for row in summary["breakdown"]:
        assert row["slow_down"] > 0 and row["unknown"] is None and row["unmatched"] is None
        assert row["compute_s"] + row["exposed_s"] + row["idle_s"] == pytest.approx(row["mean_step_s"], rel=0.2)


def test_telemetry_runs_beside_and_isolation_is_judged(finished: tuple[dict, Path]) -> None:
    summary, folder = finished
    records = [json.loads(line) for line in (folder / summary["run"] / "journal.jsonl").read_text().splitlines()]
    telemetry = read(folder / summary["run"] / "telemetry.jsonl")
    assert telemetry is not None and len(telemetry.sessions) == 1
    assert telemetry.sessions[0].events[-1]["why"] == "the run ended" and summary["telemetry"]["failures"] == []
    (ranks,) = [record["pids"] for record in records if record["kind"] == "launch"]
    seen = {pid for sample in telemetry.sessions[0].samples for pid in sample.get("process", {}).get("pids", [])}
    assert len(set(ranks)) == 4 and set(ranks) <= seen
    covered = windows(records)
    turns = summary["pilot"]["turns"]
    assert len(covered) == 2 * 7 * 2 * turns  # phases, arms with the A/A twin and the planted one, blocks
    late_s = 0.1  # ranks leave a barrier as the host lets them, and each counts from then; windows are rank 0's
    assert all(a.end_s <= b.start_s + late_s and a.start_s < b.start_s for a, b in pairwise(covered))
    first, last = telemetry.sessions[0].samples[0], telemetry.sessions[0].samples[-1]
    started_s = next(record["started_s"] for record in records if record["kind"] == "launch")
    assert first["time_s"] < started_s < covered[0].start_s and covered[-1].end_s < last["time_s"]
    assert sum(summary["isolation"]["blocks"].values()) == 14 and "RANK_SKEW" in summary["isolation"]["checked"]


def test_report_can_be_made_again_from_the_journal_alone(finished: tuple[dict, Path]) -> None:
    summary, folder = finished
    run = folder / summary["run"]
    page = (run / "report.html").read_text()
    (run / "report.html").unlink()
    (run / "summary.json").unlink()
    done = headgrid("report", summary["run"], "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["arms"] == summary["arms"]
    assert (run / "report.html").read_text() == page


def test_a_killed_run_keeps_its_records_and_resumes(tmp_path: Path) -> None:
    """The pilot among them: what it decided holds for the rest of the run."""
    process = start("compare", *SMALL, *TWO_ARMS, "--block-seconds", "0.02", "--blocks", "6", cwd=tmp_path)
    run = wait_for_blocks(tmp_path, 14, process)  # warm-up, a block, perhaps twice, and some more
    ranks = family(process)
    assert len(ranks) >= 5  # the fork server and four ranks
    process.kill()
    process.wait()
    assert ended(ranks)
    before = (run / "journal.jsonl").read_text().splitlines()
    with (run / "journal.jsonl").open("a") as journal:
        journal.write('{"kind": "block", "torn')
    done = headgrid("compare", "--resume", str(run), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    after = (run / "journal.jsonl").read_text().splitlines()
    assert after[: len(before)] == before
    records = [json.loads(line) for line in after]
    timed = [r for r in records if r["kind"] == "block" and not r["warmup"]]
    last = {block: max(r["attempt"] for r in timed if r["block"] == block) for block in {r["block"] for r in timed}}
    assert len(last) == 6 and set(last.values()) == {0, 1}
    for block, attempt in last.items():  # what counts of a block comes from one set of processes, and is all of it
        mine = [r for r in timed if (r["block"], r["attempt"]) == (block, attempt)]
        assert len([r for r in mine if r["retry"] == max(r["retry"] for r in mine)]) == 4
    (pilot,) = (r for r in records if r["kind"] == "pilot")
    assert {len(r["turns"]["decode_s"]) for r in timed} == {pilot["turns"]}
    assert len([r for r in records if r["kind"] == "block" and r["warmup"] and r["attempt"] == 1]) == 4
    assert json.loads(done.stdout.splitlines()[-1])["complete"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process(tmp_path: Path, sent: signal.Signals) -> None:
    process = start("compare", *SMALL, *TWO_ARMS, "--blocks", "500", cwd=tmp_path)
    run = wait_for_blocks(tmp_path, 2, process)
    ranks = family(process)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors and "Traceback" not in errors
    assert ended(ranks)
    assert all(json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines())


def test_a_killed_rank_ends_the_run_and_is_named(tmp_path: Path) -> None:
    process = start("compare", *SMALL, *TWO_ARMS, "--blocks", "500", cwd=tmp_path)
    wait_for_blocks(tmp_path, 2, process)
    ranks = family(process)
    victim = max(ranks, key=lambda p: p.create_time())  # ranks start after the fork server, in order
    victim.kill()
    killed = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - killed < 20
    assert process.returncode == 71
    assert "was killed by signal 9" in errors and "rank" in errors and "Traceback" not in errors
    assert len(errors.strip().splitlines()) <= 12
    assert ended(ranks)


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--arms", "tp3,dp4"), 64, ("needs 3 ranks, not 4", "n2m2:batch")),
        (("--arms", "tp16", "--ranks", "16"), 64, ("16 head groups cannot share 4 KV heads", "n4m4:batch")),
        (("--arms", "n2m2"), 64, ("need an exchange", "n2m2:gather")),
        (("--arms", "n1m8:batch", "--ranks", "8"), 64, ("8 slices of 8 channels", "n2m4:batch")),
        (("--arms", "fast"), 64, ("'fast' is not a layout", "tp8pp2")),
        (("--arms", "dp4,dp4"), 64, ("named twice",)),
        (("--arms", ""), 64, ("no arms",)),
        (("--arms", "pp4"), 64, ("4 stages for 2 layers",)),
        (("--batch", "2", "--arms", "tp4,dp4"), 64, ("4 replicas share 2 sequences",)),
        (("--batch", "0"), 64, ("--batch",)),
        (("--batch", "65000", "--seq", "500"), 69, ("GiB", "--batch")),
        (("--batch", "999999999"), 64, ("65536",)),
        (("--seq", "512"), 64, ("512 + 2 positions", "--seq 510")),
        (("--dtype", "float64"), 64, ("the reference's own dtype", "float32")),
        (("--dtype", "int8"), 64, ("'int8' is not known", "float16")),
        (("--protocol", "quick"), 64, ("'quick' is not known", "seed")),
        (("--device", "tpu"), 64, ("'tpu' is not known",)),
        (("--model", "gpt9"), 64, ("no model is named 'gpt9'", "seed-small")),
        (("--text", "missing.txt"), 64, ("cannot read text 'missing.txt'",)),
        (("--out", "/proc/nowhere"), 64, ("cannot write the run folder",)),
        (("--resume", "nowhere"), 64, ("is not a run folder",)),
        (("--ranks", "1"), 64, ("--ranks",)),
        (("--block-seconds", "-1"), 64, ("--block-seconds",)),
        (("--block-seconds", "inf"), 64, ("a block of inf s", "--block-seconds 0")),
        (("--telemetry-hz", "1000"), 64, ("1000 telemetry samples per second", "--telemetry-hz 10")),
        (("--unknown",), 64, ("--unknown",)),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: tuple[str, ...],
    code: int,
    said: tuple[str, ...],
) -> None:
    def no_process(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["headgrid", "compare", *SMALL, *args])
    monkeypatch.setattr(launch, "run", no_process)
    with pytest.raises(SystemExit) as ended_with:
        main()
    errors = capsys.readouterr().err
    assert ended_with.value.code == code, errors
    assert all(text in errors for text in said), errors
    assert "Traceback" not in errors and len(errors.strip().splitlines()) <= 12
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_from_the_shell_is_one_block_and_an_exit_code(tmp_path: Path) -> None:
    done = headgrid("compare", *SMALL, "--arms", "tp3,dp4", cwd=tmp_path, timeout=60)
    assert done.returncode == 64 and done.stdout == ""
    assert done.stderr.startswith("error: tp3: needs 3 ranks, not 4") and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_torchrun_joins_the_ranks_it_started(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "headgrid", "compare"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    options = (*SMALL[2:], "--arms", "tp2,n1m2:batch")  # without --ranks: the launcher's number counts
    done = subprocess.run(
        [*command, *options, "--blocks", "1", "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(answers) == 1 and json.loads(answers[0])["complete"]
    assert len(list(tmp_path.glob("runs/*/summary.json"))) == 1


def test_layouts_lists_memory_and_refuses_with_alternatives(tmp_path: Path) -> None:
    done = headgrid("layouts", "--model", "seed-kv2", "--ranks", "4", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["layout"]: row for row in json.loads(done.stdout.splitlines()[-1])["layouts"]}
    assert rows["tp4"]["kv_cache_bytes"] == 2 * rows["n2m2:batch"]["kv_cache_bytes"]  # tp copies its 2 KV heads
    refused = headgrid("layouts", "--model", "seed", "--ranks", "12", "--layout", "tp12", cwd=tmp_path)
    assert refused.returncode == 64
    assert "32 % 12 = 8" in refused.stderr and "n4m3:batch" in refused.stderr
