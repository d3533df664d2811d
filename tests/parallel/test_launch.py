"""Starting ranks and looking after them: whatever happens, the cause is told and no process is left behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from case import Case
from cases import TINY
from pool import Pools
from standing_ranks import Launch as RankLaunch
from standing_ranks import RankFailed

from headgrid.errors import HeadgridError, InvalidInput, RankDied
from headgrid.layout.layout import Layout
from headgrid.runtime.launch import Job, run
from headgrid.spec.workload import Workload

RANKS = 4
SECONDS_TO_NOTICE = 8.0
SECONDS_TO_END = 15.0


def job(target: str, folder: Path, **payload: object) -> Job:
    return Job(f"launch_targets:{target}", {"folder": str(folder), **payload}, RANKS, "gloo")


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("*.pid")]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return done


@pytest.fixture(autouse=True)
def own_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where `run` makes the folder in which the ranks meet. Not in `tmp_path`: a socket's path has 107 characters."""
    with tempfile.TemporaryDirectory(prefix="hg-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def assert_nothing_is_left(folder: Path, temporary: Path) -> None:
    assert len(pids(folder)) == RANKS, "every rank had started"
    assert wait_until(lambda: not any(map(alive, pids(folder))), 2)
    assert list(temporary.iterdir()) == []


def test_every_rank_runs_the_target_and_its_output_is_kept(
    prepared: None, tmp_path: Path, own_temporary_folder
) -> None:
    polls: list[int] = []
    run(job("succeed", tmp_path, word="hello"), on_poll=lambda: polls.append(1), log_to=tmp_path / "logs")
    told = sorted(path.read_text() for path in (tmp_path / "logs").glob("rank*.log"))
    assert told == [f"rank {rank} of {RANKS} says hello\n" for rank in range(RANKS)]
    assert polls
    assert_nothing_is_left(tmp_path, own_temporary_folder)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("raise_in_rank_1", ["rank 1 of 4", "ZeroDivisionError: the cause that must be told"]),
        ("kill_rank_2", ["rank 2 of 4 was killed by signal 9"]),
        ("exit_in_rank_0", ["rank 0 of 4 ended with code 0 before its work was done"]),
    ],
)
def test_a_rank_that_dies_is_named_and_ends_the_others(
    prepared: None, target: str, words: list[str], tmp_path: Path, own_temporary_folder: Path
) -> None:
    noticed: list[float] = []

    def watch() -> None:
        if not noticed and len(pids(tmp_path)) == RANKS:
            noticed.append(time.monotonic())

    with pytest.raises(RankDied) as caught:
        run(job(target, tmp_path), on_poll=watch)
    assert not noticed or time.monotonic() - noticed[0] < SECONDS_TO_NOTICE
    assert all(word in caught.value.block() for word in words), caught.value.block()
    assert caught.value.exit_code == RankDied.exit_code
    assert_nothing_is_left(tmp_path, own_temporary_folder)


def test_an_expected_error_of_a_rank_arrives_as_the_rank_worded_it(
    prepared: None, tmp_path: Path, own_temporary_folder: Path
) -> None:
    with pytest.raises(HeadgridError) as caught:
        run(job("refuse_in_rank_1", tmp_path))
    told = InvalidInput("the flux is off", numbers="88 < 1.21", legal=("on",))
    assert caught.value.block() == told.block()
    assert caught.value.exit_code == told.exit_code == 64
    assert_nothing_is_left(tmp_path, own_temporary_folder)


def test_an_error_while_waiting_leaves_no_rank(prepared: None, tmp_path: Path, own_temporary_folder: Path) -> None:
    def fail_once_started() -> None:
        if len(pids(tmp_path)) == RANKS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job("wait_for_the_others", tmp_path), on_poll=fail_once_started)
    assert_nothing_is_left(tmp_path, own_temporary_folder)


SCRIPT = """
import sys
from headgrid.runtime.launch import Job, run
run(Job("launch_targets:wait_for_the_others", {"folder": sys.argv[1]}, int(sys.argv[2]), "gloo"))
"""


@pytest.fixture
def command(tmp_path: Path, own_temporary_folder: Path) -> Iterator[subprocess.Popen]:
    """A command in a session of its own whose ranks wait for ever; yielded once all of them have started."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(RANKS)],
        env=os.environ | {"PYTHONPATH": path, "TMPDIR": str(own_temporary_folder)},
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    try:
        assert wait_until(lambda: len(pids(tmp_path)) == RANKS or process.poll() is not None, 60)
        assert process.poll() is None, process.stderr and process.stderr.read()
        yield process
    finally:
        for pid in (process.pid, *pids(tmp_path)):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()


ENDS = {
    "Ctrl-C in a terminal": (signal.SIGINT, True),
    "Ctrl-C to the command": (signal.SIGINT, False),
    "terminated": (signal.SIGTERM, False),
    "killed": (signal.SIGKILL, False),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Signals to the command alone are tried on `headgrid compare` itself (e2e/test_compare.py), here with `--full`."""
    if "whole_group" in metafunc.fixturenames:
        ends = list(ENDS)[: None if metafunc.config.getoption("--full") else 1]
        metafunc.parametrize(("number", "whole_group"), [ENDS[how] for how in ends], ids=ends)


def test_a_command_that_is_ended_leaves_no_process(
    command: subprocess.Popen, number: signal.Signals, whole_group: bool
) -> None:
    family = [child.pid for child in psutil.Process(command.pid).children(recursive=True)]
    assert len(family) > RANKS, "the ranks and the fork server"
    (os.killpg if whole_group else os.kill)(command.pid, number)
    assert command.wait(SECONDS_TO_END) != 0
    assert wait_until(lambda: not any(map(alive, family)), SECONDS_TO_END)


def test_a_case_that_a_rank_cannot_run_fails_with_its_traceback_and_the_next_one_runs(
    prepared: None, tmp_path: Path, own_temporary_folder: Path
) -> None:
    workload = Workload(batch=1, seq=8, decode_steps=1, dtype="float64")
    sound = Case("a sound case", TINY, Layout(num_head_groups=2), workload, seed=0)
    broken = replace(sound, id="the case at fault", fault="no such fault")
    pools = Pools(tmp_path / "pools", ahead=[sound, broken, sound])
    try:
        before = pools.run(sound)
        with pytest.raises(RankFailed, match=r"rank [01] in case the case at fault:\nTraceback") as caught:
            pools.run(broken)
        assert "KeyError: 'no such fault'" in str(caught.value)
        after = pools.run(sound)
    finally:
        pools.close()
    assert pools.launches.started == 2, "a failure ends the ranks of its world size, and others are started"
    assert torch.equal(after[0]["prefill"], before[0]["prefill"])
    assert list(own_temporary_folder.iterdir()) == [], "no rank is left"


def test_ranks_that_are_no_longer_needed_end(prepared: None, tmp_path: Path, own_temporary_folder: Path) -> None:
    launch = RankLaunch("worker:serve", 3, tmp_path / "ranks")
    launch.close()
    assert not launch.thread.is_alive()
    assert launch.error is None
    assert list(own_temporary_folder.iterdir()) == []


def test_ranks_that_all_die_between_two_looks_are_not_taken_for_done(
    prepared: None, tmp_path: Path, own_temporary_folder: Path
) -> None:
    """The supervisor is away (a slow disk, say) while every rank ends: none is left to wait for, and none succeeded."""

    def away() -> None:
        (tmp_path / "away").touch()
        wait_until(lambda: len(pids(tmp_path)) == RANKS and not any(map(alive, pids(tmp_path))), 30)
        time.sleep(1)  # the fork server passes the exit codes on

    with pytest.raises(RankDied, match="ended with code 3"):
        run(job("die_together", tmp_path), on_poll=away)
    assert_nothing_is_left(tmp_path, own_temporary_folder)
