"""The sampler as a real process, its file, and samples laid to arms and phases."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pynvml
import pytest
from run_fixture import make_env
from telemetry_fixture import PIDS, Run

from headgrid.errors import InvalidInput
from headgrid.experiment.isolation import judge
from headgrid.experiment.isolation_evidence import Evidence
from headgrid.experiment.isolation_host import foreign_seconds
from headgrid.experiment.summary import summary_of
from headgrid.experiment.telemetry import COUNTERS, FILE, Telemetry, append_line, check_hz, read, sampling
from headgrid.experiment.telemetry_series import Timeline, Window, points
from headgrid.experiment.telemetry_summary import summarise_telemetry
from headgrid.report.html import render

SAMPLES = (
    "import sys, headgrid.experiment.telemetry_sampler, headgrid.experiment.telemetry_gpu;"
    "print([name for name in ('torch', 'numpy', 'scipy') if name in sys.modules])"
)
JUDGES = "import sys, headgrid.experiment.summary; print([n for n in ('torch', 'scipy.stats') if n in sys.modules])"
PARENT = """
import signal, sys, time
from pathlib import Path
from headgrid.experiment.telemetry import sampling
with sampling(Path(sys.argv[1]), 20.0, gpus=False) as sampler:
    print(sampler.pid, flush=True)
    time.sleep(60)
"""
BUSY = "import time\nend = time.time() + 30\nwhile time.time() < end: pass"


def sampled(folder: Path) -> Telemetry:
    found = read(folder / FILE)
    assert found is not None
    return found


def wait_for(condition: Callable[[], Any], within_s: float = 20) -> Any:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def num_samples(folder: Path) -> int:
    found = read(folder / FILE)
    return sum(len(session.samples) for session in found.sessions) if found else 0


# --- the process -----------------------------------------------------------------------------------------------------


def test_it_samples_at_its_rate_and_says_what_it_cost(tmp_path: Path) -> None:
    with sampling(tmp_path, 20.0, gpus=False) as sampler:
        assert sampler is not None
        sampler.follow([os.getpid()])
        wait_for(lambda: num_samples(tmp_path) > 3)
        assert psutil.Process(sampler.pid).nice() == 19
        first, begun_s = num_samples(tmp_path), time.monotonic()
        time.sleep(2.5)
        rate = (num_samples(tmp_path) - first) / (time.monotonic() - begun_s)
    (session,) = sampled(tmp_path).sessions
    assert 10 < rate < 22  # never faster; slower where the machine is busy, for it has the lowest priority
    assert session.events[-1]["kind"] == "stop" and session.events[-1]["samples"] == len(session.samples)
    assert 0 < session.events[-1]["cpu_s"] < 0.5
    counters = {name for sample in session.samples for place in ("host", "process") for name in sample.get(place, {})}
    host = {name for name, counter in COUNTERS.items() if counter.place != "gpu"}
    assert counters - {"pids"} == host - set(session.missing)
    assert os.getpid() in session.samples[-1]["process"]["pids"]  # the last sample has all tiers
    assert not psutil.pid_exists(sampler.pid)


def test_at_0_hz_nothing_is_sampled(tmp_path: Path) -> None:
    with sampling(tmp_path, 0, gpus=False) as sampler:
        assert sampler is None
    assert read(tmp_path / FILE) is None and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hz", [-1.0, 51.0, float("nan"), float("inf")])
def test_a_rate_beyond_reason_is_refused(hz: float) -> None:
    with pytest.raises(InvalidInput, match="telemetry samples per second"):
        check_hz(hz)
    check_hz(0), check_hz(10.0)


@pytest.mark.parametrize("program", [SAMPLES, JUDGES])
def test_what_samples_and_judges_imports_little(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    negative = program.replace("import sys,", "import sys, torch,")
    assert "torch" in subprocess.run([sys.executable, "-c", negative], capture_output=True, text=True).stdout


@pytest.mark.parametrize(("sent", "why"), [(signal.SIGKILL, "gone"), (signal.SIGINT, "ended"), (signal.SIGTERM, "")])
def test_it_never_outlives_its_parent_and_loses_nothing(tmp_path: Path, sent: signal.Signals, why: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    sampler = psutil.Process(int(parent.stdout.readline()))
    wait_for(lambda: num_samples(tmp_path) > 3)
    sampler.send_signal(signal.SIGINT)  # Ctrl-C reaches whoever it reaches: the sampler leaves it to the command
    before = num_samples(tmp_path)
    wait_for(lambda: num_samples(tmp_path) > before)
    parent.send_signal(sent)
    parent.wait()
    psutil.wait_procs([sampler], timeout=5)
    assert not sampler.is_running() or sampler.status() == psutil.STATUS_ZOMBIE
    (session,) = sampled(tmp_path).sessions
    assert session.events[-1]["kind"] == "stop" and session.events[-1]["samples"] == len(session.samples)
    assert why in session.events[-1]["why"] or "ended" in session.events[-1]["why"]
    assert (tmp_path / FILE).read_bytes().endswith(b"\n")


def test_a_sampler_that_fails_or_is_killed_says_so_and_harms_nobody(tmp_path: Path) -> None:
    with sampling(tmp_path, 20.0, gpus=False) as sampler:
        assert sampler is not None
        wait_for(lambda: num_samples(tmp_path) > 1)
        os.kill(sampler.pid, signal.SIGKILL)
        time.sleep(0.2)
        sampler.follow([1])  # its pipe is broken: no error
    assert [event["why"] for event in sampled(tmp_path).events("failed")] == ["code -9"]
    with sampling(tmp_path / "missing", 20.0, gpus=False) as sampler:
        pass_through = sampler is not None and sampler.pid
    assert pass_through


def test_without_a_driver_every_gpu_counter_is_missing_with_the_reason(tmp_path: Path) -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        pass
    else:
        pytest.skip("this host has an NVIDIA driver")
    with sampling(tmp_path, 20.0, gpus=True):
        wait_for(lambda: num_samples(tmp_path) > 1)
    (session,) = sampled(tmp_path).sessions
    gpu = {name for name, counter in COUNTERS.items() if counter.place == "gpu"}
    assert gpu <= set(session.missing) and all("NVML" in session.missing[name] for name in gpu)
    assert not any("gpu" in sample for sample in session.samples)


# --- real contamination ----------------------------------------------------------------------------------------------


def covering(telemetry: Telemetry, device: str = "cpu") -> Run:
    """A run whose one timed block lies over all of some real samples."""
    run = Run(device)
    start, samples = telemetry.sessions[0].start, telemetry.sessions[0].samples
    seconds = samples[-1]["time_s"] - start["time_s"]
    run.records = [r for r in run.records if r["kind"] != "block"]
    block = {"kind": "block", "launch": 0, "block": 1, "arm": "tp2pp2", "warmup": False, "time_s": 0.0}
    block |= {"prefill_start_s": start["time_s"], "prefill_s": [seconds / 2], "decode_s": [seconds / 2]}
    run.records.append(block | {"decode_start_s": start["time_s"] + seconds / 2})
    return run


def foreign_share(folder: Path, follow: bool) -> tuple[float, float, Telemetry]:
    """Cores that others used while a process computed, by telemetry; the cores that this process had; the samples."""
    folder.mkdir()
    with sampling(folder, 10.0, gpus=False) as sampler:
        assert sampler is not None
        busy = subprocess.Popen([sys.executable, "-c", BUSY])
        try:
            if follow:
                sampler.follow([busy.pid])
            wait_for(lambda: num_readings(folder) >= 3)
            taken_s, begun_s = sum(psutil.Process(busy.pid).cpu_times()[:2]), psutil.Process(busy.pid).create_time()
            share = taken_s / (time.time() - begun_s)
        finally:
            busy.kill()
            busy.wait()
    telemetry = sampled(folder)
    run = covering(telemetry)
    times = list(foreign_seconds(Evidence(run.design, run.records, telemetry)))[:2]
    return sum(t[3] for t in times) / sum(t[2] for t in times), share, telemetry


def test_a_busy_process_is_foreign_and_one_that_is_followed_is_not(tmp_path: Path) -> None:
    """What else runs on this host adds to both figures, so the second is compared only where the host is quiet."""
    foreign, had, telemetry = foreign_share(tmp_path / "foreign", follow=False)
    run = covering(telemetry)
    rows = {row["code"]: row for row in judge(run.design, run.records, telemetry)["findings"]}
    assert foreign > 0.7 * had and "CPU_FOREIGN_LOAD" in rows
    others = foreign - had
    own, had, _ = foreign_share(tmp_path / "own", follow=True)
    assert own < 0.5 * had or others > 0.2


def num_readings(folder: Path) -> int:
    """Samples that tell of processes."""
    samples = sampled(folder).sessions[0].samples if num_samples(folder) else ()
    return sum("process" in sample for sample in samples)


def test_a_stopped_sampler_leaves_a_gap(tmp_path: Path) -> None:
    with sampling(tmp_path, 20.0, gpus=False) as sampler:
        assert sampler is not None
        wait_for(lambda: num_samples(tmp_path) > 3)
        os.kill(sampler.pid, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(sampler.pid, signal.SIGCONT)
        before = num_samples(tmp_path)
        wait_for(lambda: num_samples(tmp_path) > before + 2)
    telemetry = sampled(tmp_path)
    run = covering(telemetry)
    rows = {row["code"]: row for row in judge(run.design, run.records, telemetry)["findings"]}
    assert rows["TELEMETRY_GAP"]["severity"] == "SUSPECT"
    summary = summarise_telemetry(run.design, run.records, telemetry)
    assert summary is not None and summary["longest_gap_s"] > 1.4 and summary["late_samples"] >= 1


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_torn_line_is_left_out_and_a_second_session_begins_on_its_own(tmp_path: Path) -> None:
    path = tmp_path / FILE
    run = Run(blocks=5)
    for line in run.lines[:5]:
        append_line(path, line)
    with path.open("a") as file:
        file.write('{"kind": "sample", "time_s": 17')
    for line in run.lines[:3]:
        append_line(path, line)
    telemetry = sampled(tmp_path)
    assert [len(session.samples) for session in telemetry.sessions] == [4, 2]
    assert read(tmp_path / "none") is None


# --- samples laid to blocks ------------------------------------------------------------------------------------------


def test_only_points_wholly_inside_a_phase_belong_to_it() -> None:
    timeline = Timeline([Window(0, 1, "a", "prefill", 10.0, 13.0), Window(0, 1, "a", "decode", 13.1, 14.0)])
    point = points(Run().telemetry, "power_w")[0]

    def inside(start_s: float, end_s: float) -> str | None:
        window = timeline.around(type(point)(start_s, end_s, 0.1, {0: 1.0}))
        return window and window.phase

    assert inside(10.0, 10.1) == "prefill" and inside(12.9, 13.0) == "prefill" and inside(13.5, 13.5) == "decode"
    assert inside(9.95, 10.05) is None and inside(12.95, 13.05) is None and inside(13.05, 13.15) is None
    assert [w.phase for w in timeline.touched(12.95, 13.2)] == ["prefill", "decode"]
    assert timeline.touched(13.05, 13.08) == [] and len(timeline.touched(0, 99)) == 2


def test_means_by_hand_over_arms_and_phases() -> None:
    run = Run()
    for sample in run.lines[1:]:
        sample["gpu"]["power_w"] = [500.0, 600.0, 700.0, 800.0]
    summary = summarise_telemetry(run.design, run.records, run.telemetry)
    assert summary is not None
    rows = {arm["label"]: {r["counter"]: r for r in arm["phases"]["prefill"]} for arm in summary["arms"]}
    power = rows["tp2pp2"]["power_w"]
    assert power["mean"] == 650 and power["sd"] == 0 and 6 * 29 <= power["n"] <= 6 * 31  # 3 s at 10 Hz
    assert (
        power["ceiling"] == 700 and power["share_of_ceiling"] == pytest.approx(650 / 700) and power["derived"] is None
    )
    assert rows["n2m2:batch"]["nvlink_tx_bytes_per_s"]["share_of_ceiling"] == pytest.approx(2 / 4.5)
    assert rows["tp2pp2"]["energy_j"]["mean"] == pytest.approx(690)  # its growth per second: watts
    assert rows["tp2pp2"]["process_cpu_s"]["mean"] == pytest.approx(0.9)  # the ranks', not the command's
    assert summary["missing"] == [] and "sent_bytes_per_s" not in rows["tp2pp2"]
    run = Run("cpu")
    summary = summarise_telemetry(run.design, run.records, run.telemetry)
    assert summary is not None
    rows = {row["counter"]: row for row in summary["arms"][0]["phases"]["decode"]}
    assert {row["counter"] for row in summary["missing"]} == {n for n, c in COUNTERS.items() if c.place == "gpu"}
    sent = sum(op["bytes_per_rank"] for r in run.records if traffic_of(r) for op in r["ops"])
    steps = run.design["workload"]["decode_steps"]
    assert rows["sent_bytes_per_s"]["mean"] == pytest.approx(sent * steps / 1.0, rel=0.01)
    assert "collectives" in rows["sent_bytes_per_s"]["derived"] and "KV" in rows["read_bytes_per_s"]["derived"]


def traffic_of(record: dict) -> bool:
    return record["kind"] == "traffic" and (record["arm"], record["phase"]) == ("tp2pp2", "decode")


def test_report_marks_what_is_not_clean_and_shows_the_reasons() -> None:
    run = Run()
    pages = {}
    for name in ("clean", "hot"):
        if name == "hot":
            run.gpu(run.block(), "throttle_reasons", 0x40)
        summary = summary_of(run.design, run.records, run.telemetry)
        json.dumps(summary, allow_nan=False)
        pages[name] = render(run.design, make_env(), run.records, summary)
    assert "‡" not in pages["clean"].split("Isolation</h3>")[0] and "nothing was found" not in pages["clean"]
    assert "CLEAN: 18 of 18 timed blocks clean" in pages["clean"] and "GPU_POWER_CAP" in pages["clean"]
    assert "‡" in pages["hot"].split("Isolation</h3>")[0] and "GPU_THERMAL_SLOWDOWN" in pages["hot"]
    assert "INVALID: 17 of 18 timed blocks clean" in pages["hot"]
    assert "Telemetry: prefill" in pages["hot"] and "Power, W (of 700)" in pages["hot"]
    assert "690 ± 0\n99\N{NO-BREAK SPACE}%, n " in pages["hot"]
    unknown = render(run.design, make_env(), run.records, summary_of(run.design, run.records, None))
    assert "no telemetry was sampled" in unknown


def test_a_run_without_samples_has_no_telemetry() -> None:
    run = Run()
    assert summarise_telemetry(run.design, run.records, None) is None
    assert summarise_telemetry(run.design, [], run.telemetry) is not None
    assert set(PIDS) == set(run.records[0]["pids"])
