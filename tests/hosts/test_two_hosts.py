"""The lab under `torchrun --nnodes 2`: two hosts with names, addresses and a cable of their own, on this machine."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from crossing_work import MODEL, WORKLOAD
from lost_work import SILENCE_S
from two_hosts import CABLES, Host, Refused, Started, two_hosts

from headgrid.layout.layout import parse_layout
from headgrid.layout.placement import across_bytes
from headgrid.layout.traffic import prefill_collectives

HERE = Path(__file__).parent
SMALL = (
    "--model",
    "tiny",
    "--batch",
    "4",
    "--seq",
    "16",
    "--decode-steps",
    "2",
    "--device",
    "cpu",
    "--block-seconds",
    "0.02",
)
HOSTS_OF_RANKS = (0, 0, 1, 1)
LIMIT_S = 240
"""For whatever must end: many times what it takes on an idle machine."""


@dataclass
class Cluster:
    """Both hosts, with a folder each."""

    hosts: tuple[Host, Host]
    folders: tuple[Path, Path]

    def torchrun(self, *command: str, ranks: int = 2, port: int, only: Sequence[int] = (0, 1)) -> list[Started]:
        """The same command on each host, by static rendezvous at the first one's address."""
        first = ("--master-addr", self.hosts[0].address, "--master-port", str(port))
        return [self.start(index, "--nproc-per-node", str(ranks), *first, *command) for index in only]

    def start(self, index: int, *command: str) -> Started:
        """torchrun on one host."""
        head = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(index))
        environment = {key: value for key, value in os.environ.items() if key != "GLOO_SOCKET_IFNAME"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent.parent}:{HERE}"}
        return self.hosts[index].start([*head, *command], self.folders[index], environment)

    def left(self) -> list[int]:
        """Processes on either host."""
        return [pid for host in self.hosts for pid in host.processes()]

    def settled(self) -> bool:
        """Whether nothing runs any more; waits a moment for what is about to end."""
        return eventually(lambda: not self.left(), 20)


def eventually(happened: Callable[[], object], timeout_s: float = LIMIT_S) -> bool:
    deadline = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def ended(started: Sequence[Started]) -> list[int]:
    """Exit codes, once all have ended."""
    return [each.process.wait(LIMIT_S) for each in started]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    try:
        with two_hosts(tmp_path_factory.mktemp("names")) as pair:
            yield pair
    except Refused as refused:
        pytest.skip(f"no second host can be made on this machine: {refused}")


@pytest.fixture
def cluster(hosts: tuple[Host, Host], tmp_path: Path) -> Iterator[Cluster]:
    folders = tmp_path / "first", tmp_path / "second"
    for folder in folders:
        folder.mkdir()
    yield Cluster(hosts, folders)
    for host in hosts:
        host.clear()


def journal(folder: Path) -> list[dict]:
    path = next(iter(folder.glob("runs/*/journal.jsonl")), None)
    lines = path.read_text().splitlines(keepends=True) if path is not None else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def check(run: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "headgrid", "check", str(run)], capture_output=True, text=True)


def rank_process(host: Host, rank: int) -> int:
    """The process of a rank."""
    return next(
        pid for pid in host.processes() if f"\0RANK={rank}\0" in f"\0{Path(f'/proc/{pid}/environ').read_text()}"
    )


def test_a_comparison_that_lost_a_rank_is_complete_when_resumed(cluster: Cluster) -> None:
    first, second = cluster.folders
    command = ("-m", "headgrid", "compare", *SMALL, "--arms", "n2m2:batch,n1m4:batch", "--blocks", "2", "--json")
    started = cluster.torchrun(*command, port=29601)
    assert eventually(lambda: any(each["kind"] == "launch" for each in journal(first)))
    os.kill(rank_process(cluster.hosts[1], 3), signal.SIGKILL)
    assert 0 not in ended(started) and cluster.settled()
    said = ("has lost another rank", "was ended by a signal")  # by whether it was in a collective or about to begin one
    assert started[0].err.count("error: ") == 1 and any(each in started[0].err for each in said), started[0].err[-3000:]
    assert "Signal 9 (SIGKILL)" in started[1].err  # torchrun's words for its own rank

    run = next(first.glob("runs/*"))
    resumed = ("-m", "headgrid", "compare", "--device", "cpu", "--resume", str(run), "--json")
    started = cluster.torchrun(*resumed, port=29602)
    assert ended(started) == [0, 0], started[0].err[-3000:] + started[1].err[-3000:]
    assert not list(second.iterdir()) or not (second / "runs").exists()
    answers = [line for each in started for line in each.out.splitlines() if line.startswith("{")]
    summary = json.loads(answers[0])
    assert len(answers) == 1 and summary["complete"] and all(arm["verified"] for arm in summary["arms"])
    _is_placed(run, summary)
    done = check(run)
    assert done.returncode == 0, done.stdout + done.stderr
    _tampered_crossings_are_found(run)


def _is_placed(run: Path, summary: dict) -> None:
    """Each rank's host is in the journal, without its name; only n1m4 has its slices apart."""
    text = (run / "journal.jsonl").read_text() + json.dumps(summary)
    assert "first-host" not in text and "second-host" not in text
    records = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    assert all(each["hosts"] == list(HOSTS_OF_RANKS) for each in records if each["kind"] == "launch")
    apart = [each for each in summary["warnings"] if each.startswith("The slice axis of")]
    assert len(apart) == 1 and "n1m4:batch spans hosts: 4 slices of every head, and hosts of 2 ranks" in apart[0]
    assert any("2 of the 4 ranks: the others are unchecked" in each for each in summary["warnings"])
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
    command = ("-m", "headgrid", "compare", *SMALL, "--arms", "tp2,n1m2:batch", "--text", "input.txt")
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
