"""The lab under `torchrun --nnodes 2`: two hosts with names, addresses and a cable of their own, on this machine."""

import importlib.util
import json
import os
import shutil
import signal
import time
from pathlib import Path

from clusters import HERE, SMALL, Cluster, check, ended, eventually, journal
from crossing_work import MODEL, WORKLOAD
from lost_work import SILENCE_S
from odd_hosts import clock_ahead, own_cpu
from two_hosts import CABLES

from headgrid.experiment.telemetry import read
from headgrid.layout.layout import parse_layout
from headgrid.layout.placement import across_bytes
from headgrid.layout.traffic import prefill_collectives
from headgrid.report.conclude import documents

HOSTS_OF_RANKS = (0, 0, 1, 1)
AHEAD_S = 5000.0


def test_a_comparison_that_lost_a_rank_is_complete_when_resumed(cluster: Cluster, tmp_path: Path) -> None:
    """In two launches; the second host's clock is wrong, and it alone has others' load."""
    first, second = cluster.folders
    command = (
        "-m",
        "headgrid",
        "compare",
        *SMALL,
        "--arms",
        "n2m2:batch,n1m4:batch",
        "--blocks",
        "2",
        "--block-seconds",
        "0.02",
    )
    cluster.paths[1] = clock_ahead(tmp_path / "ahead", AHEAD_S)
    with own_cpu(tmp_path / "stat0", 0.0, 0.0) as idle, own_cpu(tmp_path / "stat1", 0.6, 0.4) as loaded:
        cluster.before = (idle, loaded)
        started = cluster.torchrun(*command, "--launches", "2", "--no-breakdown", port=29601)
        assert eventually(lambda: any(each["kind"] == "block" for each in journal(first)))
        os.kill(next(each["pids"][3] for each in journal(first) if each["kind"] == "launch"), signal.SIGKILL)
        assert 0 not in ended(started) and cluster.settled()
        for each in started:
            assert each.err.count("error: ") == 1 and "rank 3 of 4 was killed by signal 9" in each.err, each.err[-3000:]
        run = next(first.glob("runs/*"))
        cut = read(run / "telemetry.jsonl")
        assert cut is not None and cut.of_hosts().keys() == {0, 1}  # what the second host had sampled was brought

        resumed = ("-m", "headgrid", "compare", "--device", "cpu", "--no-breakdown", "--resume", str(run), "--json")
        started = cluster.torchrun(*resumed, port=29602)
        assert ended(started) == [0, 0], started[0].err[-3000:] + started[1].err[-3000:]
    assert cluster.settled() and not (second / "runs").exists()
    answers = [line for each in started for line in each.out.splitlines() if line.startswith("{")]
    summary = json.loads(answers[0])
    assert len(answers) == 1 and summary["complete"] and all(arm["verified"] for arm in summary["arms"])
    assert len({tuple(each["pids"]) for each in journal(first) if each["kind"] == "launch"}) == 3
    _is_placed(run, summary)
    _is_sampled(run, summary)
    done = check(run)
    assert done.returncode == 0, done.stdout + done.stderr
    _tampered_crossings_are_found(run)


def _is_sampled(run: Path, summary: dict) -> None:
    """Both hosts, in one time; what only the second one saw is said of it, and is gone without its samples."""
    second = summary["telemetry"]["hosts"][1]
    low_s, high_s = second["clock_ahead_s"]
    error_s = second["clock_error_s"]
    assert low_s - error_s <= AHEAD_S <= high_s + error_s and error_s < 1, second
    found = {row["code"]: row["example"] for row in summary["isolation"]["findings"]}
    assert found["CPU_STEAL"].startswith("host 1: ") and found["CPU_FOREIGN_LOAD"].startswith("host 1: "), found
    assert "no sampler ran" not in found.get("TELEMETRY_GAP", "")
    assert not any("unchecked" in each for each in summary["warnings"])

    copy = run.with_name("unshifted")
    shutil.copytree(run, copy)
    samples = copy / "telemetry-1.jsonl"
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    unshifted = [{**each, "offset_s": 0.0} if each["kind"] == "clock" else each for each in lines]
    samples.write_text("".join(json.dumps(each) + "\n" for each in unshifted))
    found = {row["code"]: row["example"] for row in documents(copy, None).summary["isolation"]["findings"]}
    assert "CPU_STEAL" not in found and "host 1: no sampler ran" in found["TELEMETRY_GAP"], found
    samples.unlink()
    summary = documents(copy, None).summary
    assert not {"CPU_STEAL", "CPU_FOREIGN_LOAD"} & {row["code"] for row in summary["isolation"]["findings"]}
    assert any("no samples of host 1 with 2 of the 4 ranks" in each for each in summary["warnings"])
    assert {row["why"] for row in summary["isolation"]["unchecked"]} >= {"host 1: no telemetry was sampled"}
    done = check(copy)  # whose summary.json still has its samples
    assert done.returncode == 65 and "summary.figures" in done.stdout, done.stdout


def _is_placed(run: Path, summary: dict) -> None:
    """Each rank's host is in the journal, without its name; only n1m4 has its slices apart."""
    text = (run / "journal.jsonl").read_text() + (run / "env.json").read_text() + json.dumps(summary)
    assert [each["host"] for each in json.loads((run / "env.json").read_text())["hosts"]] == [1]
    assert "first-host" not in text and "second-host" not in text
    records = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    assert all(each["hosts"] == list(HOSTS_OF_RANKS) for each in records if each["kind"] == "launch")
    apart = [each for each in summary["warnings"] if each.startswith("The slice axis of")]
    assert len(apart) == 1 and "n1m4:batch spans hosts: 4 slices of every head, and hosts of 2 ranks" in apart[0]
    slices = {
        each["arm"]: row["across_bytes"]
        for each in records
        if each["kind"] == "traffic" and each["phase"] == "prefill"
        for row in each["crossings"]
        if row["axis"] == "tp_slice"
    }
    assert slices["n2m2:batch"] == 0 < slices["n1m4:batch"]


def _tampered_crossings_are_found(run: Path) -> None:
    copy = run.with_name("tampered")
    shutil.copytree(run, copy)
    text = (copy / "journal.jsonl").read_text()
    (copy / "journal.jsonl").write_text(text.replace('"hosts": [0, 0, 1, 1]', '"hosts": [0, 1, 1, 1]'))
    done = check(copy)
    assert done.returncode == 65 and "traffic.crossings" in done.stdout + done.stderr, done.stdout


def _predicted_bytes(text: str, host: int) -> int:
    """What the ranks of a host send to the other one in a prefill."""
    layout = parse_layout(text)
    return sum(
        count * across_bytes(layout, HOSTS_OF_RANKS, rank, call)
        for rank in range(layout.ranks)
        if HOSTS_OF_RANKS[rank] == host
        for call, count in prefill_collectives(MODEL, layout, WORKLOAD, rank).items()
    )


def test_what_is_predicted_to_cross_goes_over_the_cable(cluster: Cluster) -> None:
    """By the kernel's count of an interface: code that knows neither collectives nor layouts."""
    layouts, times = ("n2m2:batch", "n1m4:batch", "n2m2:batch+gathered", "tp2pp2", "n1m2dp2:batch"), 3
    started = cluster.torchrun(str(HERE / "crossing_work.py"), str(times), *layouts, port=29604)
    assert ended(started) == [0, 0], started[0].err[-3000:] + started[1].err[-3000:]
    for host, each in enumerate(started):
        found = json.loads(each.out.splitlines()[-1])
        for text in layouts:
            predicted = times * _predicted_bytes(text, host)
            slack = 100_000  # acknowledgements and barriers
            assert predicted <= found[text] <= 1.03 * predicted + slack, (host, text, predicted, found[text])
        apart = times * _predicted_bytes("n1m4:batch", host)  # as if n2m2's slices were apart, too: must not fit
        assert found["n2m2:batch"] < 0.85 * apart and found["n1m2dp2:batch"] < 0.01 * apart


def test_a_refusal_on_one_host_is_said_on_both(cluster: Cluster) -> None:
    (cluster.folders[0] / "input.txt").write_text("word " * 1000)  # which the second host does not have
    command = (
        "-m",
        "headgrid",
        "compare",
        *SMALL,
        "--arms",
        "tp2,n1m2:batch",
        "--block-seconds",
        "0.02",
        "--text",
        "input.txt",
    )
    started = cluster.torchrun(*command, ranks=1, port=29605)
    assert 0 not in ended(started) and cluster.settled()
    for each in started:
        assert each.err.count("error: ") == 1 and "input.txt" in each.err, each.err[-3000:]
    assert not (cluster.folders[0] / "runs").exists()


def test_a_checkpoint_is_verified_across_hosts_that_met_by_name(cluster: Cluster, tmp_path: Path) -> None:
    """By torchrun's c10d rendezvous: the first host gives its name to the other, not its address."""
    found = importlib.util.spec_from_file_location("tiny_llama", HERE.parent / "e2e" / "tiny_llama.py")
    assert found is not None and found.loader is not None
    tiny_llama = importlib.util.module_from_spec(found)
    found.loader.exec_module(tiny_llama)
    tiny_llama.write(tmp_path / "llama", 64)
    meet = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{cluster.hosts[0].address}:29608", "--rdzv-id", "named")
    work = ("-m", "headgrid", "verify", "--model", str(tmp_path / "llama"), "--layout", "n1m2:sequence", "--json")
    started = [cluster.start(index, "--nproc-per-node", "1", *meet, *work, "--device", "cpu") for index in (0, 1)]
    assert ended(started) == [0, 0], started[0].err[-3000:] + started[1].err[-3000:]
    answers = [json.loads(line) for each in started for line in each.out.splitlines() if line.startswith("{")]
    assert len(answers) == 1 and answers[0]["verdict"] == "verified" and answers[0]["ranks"] == 2


def test_ctrl_c_on_one_host_ends_both_though_their_ranks_wait_in_a_collective(cluster: Cluster) -> None:
    started = cluster.torchrun(str(HERE / "lost_work.py"), ranks=1, port=29603)
    assert eventually(lambda: all("waiting" in each.out for each in started)), started[1].err[-3000:]
    os.kill(started[0].process.pid, signal.SIGINT)
    assert 0 not in ended(started) and cluster.settled()
    assert "got signal: 2" in started[0].err  # torchrun's words
    said = ("has lost another rank", "was ended by a signal")
    assert started[1].err.count("error: ") == 1 and any(each in started[1].err for each in said), started[1].err[-3000:]


def test_a_cut_cable_ends_both_hosts(cluster: Cluster) -> None:
    started = cluster.torchrun(str(HERE / "lost_work.py"), ranks=1, port=29606)
    assert eventually(lambda: all("waiting" in each.out for each in started)), started[1].err[-3000:]
    time.sleep(2 * SILENCE_S)
    assert [each.process.poll() for each in started] == [None, None]  # while the cable is there, both wait
    cluster.hosts[0].do("ip", "link", "set", CABLES[0], "down")
    try:
        begun = time.monotonic()
        assert eventually(lambda: all("said nothing for" in each.err for each in started)), started[1].err[-3000:]
        assert time.monotonic() - begun < 60
    finally:
        cluster.hosts[0].do("ip", "link", "set", CABLES[0], "up")


def test_a_host_that_never_comes_ends_the_other(cluster: Cluster) -> None:
    there = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{cluster.hosts[0].address}:29607", "--rdzv-id", "alone")
    waiting = ("--rdzv-conf", "join_timeout=3", "--local-addr", cluster.hosts[0].address)
    begun = time.monotonic()
    alone = cluster.start(0, "--nproc-per-node", "2", *there, *waiting, "-m", "headgrid", "compare", *SMALL)
    assert ended([alone]) != [0] and time.monotonic() - begun < 120
    assert "RendezvousTimeoutError" in alone.err and cluster.settled()
