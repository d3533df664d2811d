"""The pilot: dependence of turns by simulation, the length that follows, and which blocks are run again."""

import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_fixture import block, control, end, launch, make_design, verify

from headgrid.errors import InvalidInput
from headgrid.experiment import plan
from headgrid.experiment.design import Protocol, declare, from_dict
from headgrid.experiment.pilot import PilotRule, is_shown, rule_of, settle, tau_int
from headgrid.experiment.plan import Wishes
from headgrid.experiment.records import BlockKey, block_times, done_blocks, first_tries, slowest_s
from headgrid.experiment.reruns import decisions, tries
from headgrid.experiment.sentinel_bands import readings
from headgrid.experiment.summary import summary_of
from headgrid.experiment.telemetry_series import windows
from headgrid.experiment.text import BUILTIN, identify
from headgrid.report.html import render
from headgrid.report.resolving import pilot_line, rerun_line
from headgrid.report.timeplots import _boxes
from headgrid.spec.model import find_model
from headgrid.spec.workload import Workload

Budget = Callable[[int, int], int]
RULE = PilotRule(block_s=0.2, most_block_s=0.8)
ARMS = [
    {"label": "tp4", "layout": "tp4", "role": "baseline"},
    {"label": "tp4 (A/A)", "layout": "tp4", "role": "aa"},
    {"label": "dp4", "layout": "dp4", "role": "arm"},
]


def ar1(n: int, r: float, draw: random.Random) -> list[float]:
    values = [draw.gauss(0, 1)]
    while len(values) < n:
        values.append(r * values[-1] + math.sqrt(1 - r * r) * draw.gauss(0, 1))
    return values


# --- autocorrelation time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [0.0, 0.5, 0.9])
def test_tau_of_a_long_series_is_that_of_its_process(r: float) -> None:
    """Of an AR(1) series tau = (1 + r) / (1 - r) / 2; the SD that Madras and Sokal give is 3 to 9 % of it here."""
    true = (1 + r) / (1 - r) / 2
    found = [tau_int(ar1(4000, r, random.Random(seed))) for seed in range(6)]
    assert sum(found) / 6 == pytest.approx(true, rel=0.12)


def test_tau_by_hand_and_of_what_has_none() -> None:
    # mean 0, squares 10: lag 1 is (2 + 1 - 1 - 2 ...) = 2*1 + 1*-1 + -1*-2 = 3 of 10; W = 2 < 5 tau, lag 2 is -2-2 = -4
    assert tau_int([2, 1, -1, -2]) == pytest.approx(max(0.5, 0.5 + 0.3 - 0.4))
    assert tau_int([1.0] * 9) == tau_int([]) == tau_int([3.0]) == 0.5
    assert tau_int([(-1.0) ** n for n in range(50)]) == 0.5


def test_two_dozen_turns_show_strong_dependence_only(budget: Budget) -> None:
    """2.3 % by chance, as Bartlett's SD says; a few turns show nothing at all."""
    runs, draw = budget(600, 6000), random.Random(1)
    share = {r: sum(is_shown(ar1(24, r, draw)) for _ in range(runs)) / runs for r in (0.0, 0.8)}
    assert share[0.0] <= 0.03 and share[0.8] > 0.7
    assert not is_shown(list(range(11))) and is_shown(list(range(12)))


# --- length of a block ------------------------------------------------------------------------------------------------


def settled(turn_s: float, r: float = 0.0, n: int = 24, rule: PilotRule = RULE) -> Any:
    draw = random.Random(3)
    logs = ar1(n, r, draw) if r else [0.01 * draw.gauss(0, 1) for _ in range(n)]
    return settle(rule, [0.8 * turn_s * math.exp(0.02 * x) for x in logs], [0.2 * turn_s] * n)


def test_short_turns_are_put_together_and_long_ones_are_not() -> None:
    assert settled(0.04).turns == math.ceil(0.2 / settled(0.04).turn_s)
    assert [settled(turn_s).turns for turn_s in (0.3, 2.3, 6.0)] == [1, 1, 1]
    assert settled(0.001).turns == RULE.most_turns and settled(0.001).capped


def test_dependence_makes_blocks_longer_up_to_what_they_may_take() -> None:
    found = settled(0.04, r=0.9)
    assert found.tau_shown and found.turns == min(math.ceil(10 * found.tau_int), int(0.8 / found.turn_s))
    assert found.capped is (10 * found.tau_int > 0.8 / found.turn_s)
    assert settled(0.5, r=0.9).turns == 1 and settled(0.5, r=0.9).capped
    assert not settled(0.1, r=0.9, n=8).tau_shown, "of eight turns nothing is believed"


def test_a_pilot_of_long_turns_is_short() -> None:
    assert [RULE.turns_due(first_s, 9) for first_s in (0.01, 0.5, 2.3, 60.0)] == [24, 10, 2, 2]
    assert RULE.turns_due(60.0, 3) == 4, "as many as a band needs"


def test_the_rule_is_declared_and_hashed_and_older_designs_have_none() -> None:
    def made(rule: PilotRule | None, analysis: int = 3) -> Any:
        return declare(
            model=find_model("tiny"), workload=Workload(batch=4, seq=16, decode_steps=2, dtype="float32"),
            arms=("tp4",), ranks=4, device="cpu", text=identify(BUILTIN),
            protocol=Protocol(pilot=rule, analysis=analysis),
        )  # fmt: skip

    design = made(RULE)
    data = json.loads(json.dumps(design.to_dict()))
    assert from_dict(data) == design and rule_of(data) == RULE
    assert made(dataclasses.replace(RULE, block_s=0.3)).to_dict()["hash"] != data["hash"]
    assert made(None).to_dict()["pilot"] is None and rule_of(made(None).to_dict()) is None
    older = made(None, analysis=2).to_dict()
    assert "pilot" not in older and from_dict(older).protocol.pilot is None


def test_what_the_options_declare() -> None:
    workload = Workload(batch=4, seq=16, decode_steps=2, dtype="float32")

    def rule(**wishes: Any) -> PilotRule | None:
        return plan._protocol(Wishes(**wishes), plan._DEFAULTS["cpu"], workload).pilot

    default, asked = rule(), rule(block_s=0.05)
    assert default is not None and default.block_s == 0.25 and default.most_block_s == 1.0
    assert asked is not None and asked.block_s == 0.05
    assert rule(block_s=0.0) is None and rule(protocol="seed") is None
    for odd in (math.inf, math.nan):
        with pytest.raises(InvalidInput, match="a block of"):
            rule(block_s=odd)


# --- what is run again ------------------------------------------------------------------------------------------------


def a_run(odd: set[tuple[int, int]] = frozenset(), again: tuple[int, ...] = (), blocks: int = 8) -> Any:  # type: ignore[assignment]
    """Design and journal of one launch: a sentinel is 1.5 times as slow before turn `place` of first try of `block` for
    each of `odd`; the blocks in `again` were run again, in which arm dp4 is twice as fast.
    """
    draw = random.Random(5)
    workload = {"batch": 4, "seq": 64, "decode_steps": 4, "dtype": "float32"}
    rule = dataclasses.asdict(RULE)
    design = make_design(
        arms=ARMS, launches=1, blocks=blocks, ranks=4, device="cuda", workload=workload, analysis=3, planted=0.0,
        pilot=rule,
    )  # fmt: skip
    records = [launch(0, design), control(0), *(verify(0, arm["label"]) for arm in ARMS)]
    for number in range(blocks + 1):
        for retry in range(1 + (number in again)):
            for place, arm in enumerate(ARMS):
                slow = 1.5 if (number, place) in odd and not retry else 1.0
                rate = 0.5 if retry and arm["label"] == "dp4" else 1.0
                records.append(a_turn(draw, number, retry, arm["label"], rate, slow, 2 if number else 1))
            if number in again and not retry:
                records.append({"kind": "rerun", "launch": 0, "attempt": 0, "block": number, "sentinels": read(draw)})
        if number == 0:
            records.append(a_pilot(draw))
    return design, [*records, end(0) | {"sentinels": read(draw)}]


def a_turn(
    draw: random.Random, number: int, retry: int, label: str, rate: float, slow: float, turns: int
) -> dict[str, Any]:
    times = {
        phase: [0.1 * rate * math.exp(draw.gauss(0, 0.01)) for _ in range(turns)] for phase in ("prefill_s", "decode_s")
    }
    means = [sum(values) / turns for values in times.values()]
    starts = {f"{phase}_start_s": [1000.0 * number + n for n in range(turns)] for phase in ("prefill", "decode")}
    record = block(0, number, label, *means, warmup=number == 0)
    first = {key: values[0] for key, values in starts.items()}
    return record | first | {"attempt": 0, "retry": retry, "turns": times | starts, "sentinels": read(draw, slow)}


def read(draw: random.Random, slow: float = 1.0) -> dict[str, list[float]]:
    usual = {"gemm_s": 2e-3 * slow, "all_reduce_s": 1e-3, "host_s": 1e-3}
    return {kind: [seconds * (1 + draw.gauss(0, 0.002)) for _ in range(4)] for kind, seconds in usual.items()}


def a_pilot(draw: random.Random) -> dict[str, Any]:
    times = {phase: [0.1 * math.exp(draw.gauss(0, 0.01)) for _ in range(24)] for phase in ("prefill_s", "decode_s")}
    every = [read(draw) for _ in range(25)]
    slowest = {kind: [max(each[kind]) for each in every] for kind in every[0]}
    return {"kind": "pilot", "launch": 0, "attempt": 0, "arm": "tp4", "time_s": 0.0, "sentinels": slowest, **times} | (
        settle(RULE, **times)._asdict()
    )


def told(design: dict[str, Any], records: list[dict[str, Any]]) -> list[tuple[int, bool, bool]]:
    found = decisions(RULE, design["blocks"], records)
    return [(d.tried.block, d.due, d.was) for d in found if d.due or d.was]


def test_a_sentinel_out_of_the_pilots_band_has_its_block_run_again() -> None:
    assert told(*a_run()) == []
    assert told(*a_run({(3, 1)})) == [(3, True, False)], "it was due, and was not"
    assert told(*a_run({(3, 1)}, (3,))) == [(3, True, True)]
    assert told(*a_run(set(), (3,))) == [(3, False, True)], "it was, without a cause"
    assert told(*a_run({(0, 1)})) == [], "warm-up is not"
    # a reading between two blocks speaks of both; where the first was run again, it has had its say
    assert told(*a_run({(4, 0)})) == [(3, True, False), (4, True, False)]


def test_only_a_quarter_of_the_blocks_is_run_again() -> None:
    odd = {(number, 1) for number in (2, 4, 5, 7)}
    assert told(*a_run(odd, (2, 4))) == [(2, True, True), (4, True, True)]
    assert told(*a_run(odd, (2, 4, 5))) == [(2, True, True), (4, True, True), (5, False, True)]


def test_the_second_try_counts_and_the_first_is_told_beside_it() -> None:
    design, records = a_run({(3, 1)}, (3,))
    summary = summary_of(design, records, None)
    times = block_times(records, "dp4", "prefill")
    assert len(times) == 8 and min(times.values()) == times[BlockKey(0, 3)] < 0.06
    assert all(value > 0.09 for value in block_times(first_tries(records), "dp4", "prefill").values())
    reruns = summary["reruns"]
    assert (reruns["blocks"], reruns["of_blocks"], reruns["allowed_per_launch"]) == (1, 8, 2)
    assert reruns["again"] == [{"launch": 0, "block": 3, "sentinel": "gemm", "ratio": pytest.approx(1.5, rel=0.02)}]
    (row,) = (r for r in reruns["sensitivity"] if (r["a"], r["phase"]) == ("dp4", "prefill"))
    assert row["ratio"] == pytest.approx(2 ** (1 / 8), rel=0.02) and row["first_tries"] == pytest.approx(1, rel=0.02)
    assert "1 of 8 blocks were run again" in rerun_line(summary) and "first tries" in rerun_line(summary)
    assert summary["complete"] and not any("twice" in warning for warning in summary["warnings"])
    page = render(design, {"cpu_count": 2}, records, summary | {"run": "x"})
    assert "1 of 8 blocks were run again" in page and "autocorrelation time" in page


def test_readings_of_a_first_try_are_laid_to_no_turn_that_counts() -> None:
    _, records = a_run({(3, 1)}, (3,))
    found = list(readings(records))
    kept = [
        record for record in records if record["kind"] == "block" and not (record["block"] == 3 and not record["retry"])
    ]
    assert not any(reading.seconds["gemm_s"] > 0.0025 for reading in found)
    assert [reading.after for reading in found if reading.after] == kept
    (closing,) = (r for r in found if r.before and r.before["block"] == 2 and (r.after or {}).get("block") != 2)
    assert closing.after is None, "between block 2 and the first try of block 3"
    (opening,) = (r for r in found if r.after and r.after["block"] == 3 and r.after["arm"] == "tp4")
    assert opening.before is None


def test_the_dependence_of_what_follows_is_told() -> None:
    design, records = a_run()
    summary = summary_of(design, records, None)
    (row,) = summary["pilot"]["followed"]
    assert row["turns"] == 8 * 3 * 2 and 0.5 <= row["tau_int"] < 1.5
    assert pilot_line(summary).startswith(f"{summary['pilot']['turns']} turn")
    summary = summary_of(design | {"pilot": None}, [r for r in records if r["kind"] != "pilot"], None)
    assert summary["pilot"] is None and "no pilot" in pilot_line(summary) and "none" in rerun_line(summary)


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_block_takes_the_mean_of_its_turns_slowest_ranks() -> None:
    record: dict[str, Any] = {"prefill_s": [2.0, 2.5], "turns": {"prefill_s": [3.0, 2.4]}}
    assert slowest_s(record, "prefill") == 2.7 and slowest_s({"prefill_s": [2.0, 2.5]}, "prefill") == 2.5
    assert slowest_s({"prefill_s": [2.0, None]}, "prefill") is None and slowest_s({}, "prefill") is None


def test_every_turn_has_a_window_of_its_own() -> None:
    _, records = a_run()
    assert len(windows(records)) == 8 * 3 * 2 * 2  # blocks, arms, phases, turns


def test_many_turns_are_drawn_as_one_box_for_each_arm_in_a_block() -> None:
    few = windows(a_run()[1])
    assert _boxes(few) == few
    many = [dataclasses.replace(each, start_s=1e3 * n, end_s=1e3 * n + 1) for n in range(9) for each in few]
    boxes = _boxes(many)
    assert len(boxes) == 8 * 3 and all(box.end_s == 8001 and box.start_s == 0 for box in boxes)


def test_a_block_that_was_cut_when_it_was_run_again_is_not_done() -> None:
    _, records = a_run({(3, 1)}, (3,))
    assert done_blocks(records, 0) == list(range(1, 9))
    last = next(n for n, record in enumerate(records) if record.get("retry") == 1)
    assert done_blocks(records[: last + 1], 0) == [1, 2], "one arm of the second try"
    assert done_blocks(records[:last], 0) == [1, 2], "none of it"
    assert done_blocks(records[: last - 1], 0) == [1, 2, 3], "it was not called for yet"
    assert [t.closed for t in tries(records[: last - 1])][-1] is False


def test_benchmarks_of_older_versions_have_no_pilot() -> None:
    for path in sorted((Path(__file__).parents[2] / "benchmarks").glob("*/design.json")):
        assert rule_of(json.loads(path.read_text())) is None
