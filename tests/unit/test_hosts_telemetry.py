"""Samples of several hosts: brought into one time, judged for the ranks of each, and told where they lack."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from telemetry_fixture import BEGIN_S, PIDS, Run
from test_isolation import BLOCKS, HERE, INJECTIONS, codes_of, found

from headgrid.experiment import across
from headgrid.experiment.environments import differences
from headgrid.experiment.isolation import CHECKS, judge
from headgrid.experiment.summary import summary_of
from headgrid.experiment.telemetry import FILE, Telemetry, read
from headgrid.experiment.telemetry_hosts import file_of, offset_s

AHEAD_S, DRIFT = 1234.5, 2e-4
SAMPLED = [code for check in CHECKS if check.telemetry for code in check.codes if code != "GPU_POWER_CAP"]


def ahead_s(right_s: float) -> float:
    """How far the second host's clock is ahead at a moment by the first one's."""
    return AHEAD_S + DRIFT * (right_s - BEGIN_S)


def on_two_hosts(first: Run, second: Run, folder: Path, *, clocks: bool = True) -> Telemetry:
    """What the folder of a run on two hosts tells; the second host's lines are by its own clock, which also drifts."""
    for record in (r for r in first.records if r["kind"] == "launch"):
        record |= {"hosts": [0] * 4 + [1] * 4, "pids": PIDS + PIDS}
    ends = [BEGIN_S, BEGIN_S + first.end_s - BEGIN_S]
    known = [{"kind": "clock", "time_s": s + ahead_s(s), "offset_s": ahead_s(s), "error_s": 1e-4} for s in ends]
    lines = [{**line, "time_s": line["time_s"] + ahead_s(line["time_s"])} for line in second.lines]
    for file, rows in ((FILE, first.lines), (file_of(1), [*lines, *known * clocks])):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    telemetry = read(folder / FILE)
    assert telemetry is not None
    return telemetry


def judged(run: Run, telemetry: Telemetry | None) -> dict[str, Any]:
    return judge(run.design, run.records, telemetry)


def test_each_code_fires_for_the_host_on_which_it_was_injected(
    tmp_path: Path, budget: Callable[[int, int], int]
) -> None:
    for code in SAMPLED[:: budget(3, 1)]:
        inject, severity, own_block = INJECTIONS[code]
        first, second = (Run(blocks=BLOCKS.get(code, 6)) for _ in range(2))
        inject(second)
        isolation = judged(first, on_two_hosts(first, second, tmp_path))
        assert found(isolation)[code] == severity, code
        assert all(row["example"].startswith("host 1: ") for row in isolation["findings"] if row["code"] == code), code
        assert code in codes_of(isolation, *HERE) or not own_block, code


def test_before_an_injection_nothing_fires_and_without_clocks_nothing_is_known(tmp_path: Path) -> None:
    first, second = Run(), Run()
    assert set(found(judged(first, on_two_hosts(first, second, tmp_path)))) == {"GPU_POWER_CAP"}
    INJECTIONS["CPU_STEAL"][0](second)
    without = on_two_hosts(first, second, tmp_path, clocks=False)
    assert without.of_hosts().keys() == {0} and "CPU_STEAL" not in found(judged(first, without))
    (tmp_path / file_of(1)).write_text('{"kind": "sta')
    assert read(tmp_path / FILE) == Telemetry(without.sessions)
    (tmp_path / FILE).write_text("")
    assert read(tmp_path / FILE) == Telemetry(())


def test_a_host_without_samples_is_unchecked_and_that_is_said(tmp_path: Path) -> None:
    run = Run()
    both = on_two_hosts(run, Run(), tmp_path)
    assert judged(run, both)["unchecked"] == []
    alone = Telemetry(both.sessions)
    isolation = judged(run, alone)
    assert {row["why"] for row in isolation["unchecked"]} == {"host 1: no telemetry was sampled"}
    assert {row["code"] for row in isolation["unchecked"]} == {*SAMPLED, "GPU_POWER_CAP"}
    for telemetry, said in ((both, 0), (alone, 1)):
        warnings = summary_of(run.design, run.records, telemetry)["warnings"]
        assert sum("no samples of host 1 with 4 of the 8 ranks" in text for text in warnings) == said


def test_figures_are_over_the_samples_of_both_hosts(tmp_path: Path) -> None:
    first, second = Run(), Run()
    for sample in (line for line in second.lines if line["kind"] == "sample"):
        sample["gpu"]["power_w"] = [500.0] * 4
    one = summary_of(first.design, first.records, first.telemetry)["telemetry"]
    two = summary_of(first.design, first.records, on_two_hosts(first, second, tmp_path))["telemetry"]

    def power(telemetry: dict[str, Any]) -> dict[str, Any]:
        return next(row for row in telemetry["arms"][0]["phases"]["prefill"] if row["counter"] == "power_w")

    assert power(one)["mean"] == pytest.approx(690.0) and power(two)["mean"] == pytest.approx(595.0, abs=1.5)
    assert power(two)["n"] == pytest.approx(2 * power(one)["n"], abs=8)
    assert "hosts" not in one and [row["host"] for row in two["hosts"]] == [0, 1]
    assert two["hosts"][1]["clock_ahead_s"][0] == pytest.approx(AHEAD_S)


def test_an_offset_is_interpolated_and_kept_beyond_the_ends() -> None:
    clocks = [{"time_s": 10.0, "offset_s": 1.0}, {"time_s": 20.0, "offset_s": 2.0}]
    assert [offset_s(clocks, time_s) for time_s in (0.0, 10.0, 15.0, 20.0, 99.0)] == [1.0, 1.0, 1.5, 2.0, 2.0]


class Far:
    """Rank 0 behind a network whose delays differ from one way to the other; time passes in it only."""

    def __init__(self, draw: random.Random, right_s: float) -> None:
        self.draw, self.right_s, self.place = draw, right_s, None

    def delay(self) -> None:
        self.right_s += self.draw.expovariate(1e3) + self.draw.choice((0.0, 0.0, 0.05))

    def put(self, value: Any, *key: object) -> None:
        self.delay()

    def awaited(self, *key: object) -> float:
        answered_s = self.right_s
        self.delay()
        return answered_s


def test_the_true_offset_is_within_the_error_whatever_the_delays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: Callable[[int, int], int]
) -> None:
    draw = random.Random(3)
    for number in range(budget(100, 5000)):
        far, true_s = Far(draw, 1e6), draw.uniform(-9e3, 9e3)
        monkeypatch.setattr(across.time, "time", lambda far=far, true_s=true_s: far.right_s + true_s)
        duties = across._Duties(far)  # type: ignore[arg-type]
        duties._path = tmp_path / f"{number}.jsonl"
        duties.clock(None, 0)
        told = json.loads(duties._path.read_text())
        assert abs(told["offset_s"] - true_s) <= told["error_s"] + 1e-6, (told, true_s)
        assert told["error_s"] < 0.06  # and it is not just any bound


def test_hosts_that_differ_are_warned_of() -> None:
    env = {"packages": {"torch": "2.13"}, "source_sha256": "a" * 64, "cpu_count": 8, "gpus": [{"name": "NVIDIA H200"}]}
    alike = {**env, "host": 1, "load_average": [9.0]}
    other = {**alike, "host": 2, "packages": {"torch": "2.12"}, "gpus": [{"name": "NVIDIA H100"}]}
    assert list(differences({**env, "hosts": [alike]})) == [] == list(differences(env)) == list(differences(None))
    (said,) = differences({**env, "hosts": [alike, other]})
    assert said == "Host 2 is not like host 0: torch 2.12 instead of 2.13; GPUs NVIDIA H100 instead of NVIDIA H200."
