"""What a launch times, and in which order, on scripted sentinels: pilot, blocks, and blocks again."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from headgrid.experiment import timing
from headgrid.experiment.design import Design, Protocol, declare
from headgrid.experiment.pilot import PilotRule
from headgrid.experiment.records import done_blocks
from headgrid.experiment.reruns import decisions
from headgrid.experiment.text import BUILTIN, identify
from headgrid.spec.model import find_model
from headgrid.spec.workload import Workload

RULE = PilotRule(block_s=0.3, most_block_s=1.2)
"""Turns take 0.11 s, so three make a block."""
ARMS = 4


class Engine:
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.prefills = self.decodes = 0

    def prefill(self, prompts: Any) -> None:
        self.prefills += 1

    def decode(self, steps: int) -> None:
        self.decodes += 1


class Launch:
    """As much of a launch as timing needs, of one rank."""

    rank, device, dtype, prompts = 0, torch.device("cpu"), torch.float32, None

    def __init__(self, design: Design, index: int = 0, attempt: int = 0) -> None:
        self.design, self.index, self.attempt = design, index, attempt
        self.records: list[dict[str, Any]] = []

    def agreed(self, value: Any) -> Any:
        return value

    def record(self, kind: str, **values: Any) -> None:
        self.records.append({"kind": kind, "launch": self.index, "time_s": 0.0, **values})


def a_design(rule: PilotRule | None = RULE, blocks: int = 8) -> Design:
    return declare(
        model=find_model("tiny"), workload=Workload(batch=4, seq=16, decode_steps=2, dtype="float32"),
        arms=("tp4", "dp4"), ranks=4, device="cpu", text=identify(BUILTIN),
        protocol=Protocol(launches=2, blocks=blocks, pilot=rule),
    )  # fmt: skip


def timed_by(monkeypatch: pytest.MonkeyPatch, odd: set[int]) -> None:
    """Every reading 1 ms, those with a number in `odd` 2 ms; prefills take 0.1 s, decodes 0.01 s."""
    numbers: Iterator[int] = iter(range(10_000))

    class Sentinels:
        def __init__(self, device: Any, dtype: Any) -> None:
            pass

        def read(self) -> dict[str, list[float]]:
            return {
                kind: [2e-3 if next(numbers) // 3 in odd else 1e-3] for kind in ("gemm_s", "all_reduce_s", "host_s")
            }

    def timed(device: Any, work: Any, planted: float = 0.0) -> tuple[float, list[float]]:
        engine_of = work.__closure__
        assert engine_of is not None
        before = [cell.cell_contents.decodes for cell in engine_of if isinstance(cell.cell_contents, Engine)]
        work()
        after = [cell.cell_contents.decodes for cell in engine_of if isinstance(cell.cell_contents, Engine)]
        return 0.0, [(0.1 if before == after else 0.01) * (1 + planted)]

    monkeypatch.setattr(timing, "Sentinels", Sentinels)
    monkeypatch.setattr(timing, "timed", timed)


def carried_out(
    monkeypatch: pytest.MonkeyPatch, design: Design, odd: set[int] | None = None, index: int = 0, **payload: Any
) -> tuple[list[dict[str, Any]], dict[str, Engine]]:
    timed_by(monkeypatch, odd or set())
    launch, engines = Launch(design, index, payload.get("attempt", 0)), {str(each): Engine() for each in design.layouts}
    fields: dict[str, Any] = {"done": [], **payload}
    closing = timing.Timing(launch, engines, design.arms, fields).run()  # type: ignore[arg-type]
    launch.record("end", completed=True, sentinels=closing)
    return launch.records, engines


def shape(records: list[dict[str, Any]]) -> list[Any]:
    """Of each block's try its number, try and turns, once; other records by their kind."""
    found: list[Any] = []
    for record in records:
        block = record["kind"] == "block"
        told = (record["block"], record.get("retry"), len(record["turns"]["prefill_s"])) if block else record["kind"]
        found += [told] * (found[-1:] != [told])
    return found


def test_a_pilot_behind_warm_up_sets_the_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    records, engines = carried_out(monkeypatch, a_design())
    assert shape(records) == [(0, 0, 1), "pilot", *((block, 0, 3) for block in range(1, 9)), "end"]
    pilot = records[ARMS]
    assert (pilot["turns"], pilot["turn_s"], len(pilot["prefill_s"]), pilot["arm"]) == (3, 0.11, 24, "tp4")
    assert {len(values) for values in pilot["sentinels"].values()} == {ARMS + 24}
    # the baseline, its twin and the planted arm in 25 turns each, the last with an untimed prefill beside each turn
    assert engines["tp4"].decodes == 24 + 3 * 25 and engines["tp4"].prefills == 24 + 4 * 25
    slow = next(r for r in records if r["kind"] == "block" and r["arm"].endswith("(+2 %)") and not r["warmup"])
    assert slow["turns"]["prefill_s"] == pytest.approx([0.102] * 3) and slow["prefill_s"] == pytest.approx([0.102])


def test_later_launches_and_resumed_ones_keep_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    design = a_design()
    pilot = carried_out(monkeypatch, design)[0][ARMS]
    records, _ = carried_out(monkeypatch, design, index=1, pilot=pilot)
    assert shape(records) == [(block, 0, 3) for block in range(9)] + ["end"]
    records, _ = carried_out(monkeypatch, design, pilot=pilot, done=[1, 2, 3], attempt=1)
    assert shape(records) == [(0, 0, 3), *((block, 0, 3) for block in range(4, 9)), "end"]
    assert shape(carried_out(monkeypatch, design, index=1)[0])[1] == (1, 0, 1), "the first launch could not make one"


def test_without_a_rule_a_block_is_one_turn_and_none_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    records, engines = carried_out(monkeypatch, a_design(rule=None), odd={7, 20})
    kinds = [record["kind"] for record in records]
    assert kinds == ["block"] * (9 * ARMS) + ["end"] and engines["dp4"].decodes == 9
    assert not any("turns" in record or "retry" in record for record in records)


def test_a_block_beside_an_odd_sentinel_is_run_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings: one ahead, 4 of warm-up, 24 of the pilot, a fresh one (29), then 4 for each block."""
    first = 1 + ARMS + 24
    design = a_design()
    for odd, again in ((first, 1), (first + 1, 1), (first + ARMS, 1), (first + ARMS + 1, 2), (first + 8 * ARMS, 8)):
        records, _ = carried_out(monkeypatch, design, odd={odd})
        expected: list[Any] = [(0, 0, 1), "pilot"]
        for block in range(1, 9):
            expected += [(block, 0, 3), *(["rerun", (block, 1, 3)] if block == again else [])]
        assert shape(records) == [*expected, "end"], odd
        found = list(decisions(RULE, 8, records))
        assert all(decision.due is decision.was for decision in found) and sum(d.was for d in found) == 1


def test_a_quarter_of_the_blocks_at_most_and_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    records, _ = carried_out(monkeypatch, a_design(), odd=set(range(1 + ARMS + 24, 1000)))
    assert [record["block"] for record in records if record["kind"] == "rerun"] == [1, 2]
    assert all(decision.due is decision.was for decision in decisions(RULE, 8, records))
    few, _ = carried_out(monkeypatch, a_design(blocks=3), odd=set(range(1 + ARMS + 24, 1000)))
    assert not any(record["kind"] == "rerun" for record in few)


def test_what_was_run_again_before_a_kill_is_not_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    design, odd = a_design(), set(range(1 + ARMS + 24, 1000))
    records, _ = carried_out(monkeypatch, design, odd=odd)
    cut = records[: next(n for n, record in enumerate(records) if record.get("retry") == 1) + 2]
    verified = [{"kind": "verify", "launch": 0, "arm": arm.label, "verified": True} for arm in design.arms]
    done = done_blocks([*verified, *cut], 0)
    assert done == []
    pilot, again = cut[ARMS], [record["block"] for record in cut if record["kind"] == "rerun"]
    rest, _ = carried_out(monkeypatch, design, odd=set(range(1000)), pilot=pilot, done=done, again=again, attempt=1)
    assert [record["block"] for record in rest if record["kind"] == "rerun"] == [2]
    whole = [*verified, *cut, {"kind": "launch", "launch": 0}, *rest]
    assert all(decision.due is decision.was for decision in decisions(RULE, 8, whole))
