"""A study of scaling: its notation, its plan, and what its figures say of runs whose truth is known."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from run_fixture import block, control, end, launch, memory, verify

from headgrid.errors import HeadgridError, InvalidInput, InvalidLayout, NotAvailable
from headgrid.experiment import budget, machine, plan, scale
from headgrid.experiment.design import Design
from headgrid.experiment.families import parse_family
from headgrid.experiment.plan import Wishes
from headgrid.experiment.scale import MODES, Study, create, from_dict, make, open_study
from headgrid.experiment.scale_stats import summarise_study
from headgrid.layout.layout import parse_layout
from headgrid.spec.model import find_model
from headgrid.spec.workload import Workload

TINY: dict[str, Any] = {"model": "tiny", "device": "cpu", "batch": 4, "seq": 16, "decode_steps": 2, "launches": 5}


@pytest.mark.parametrize(
    ("family", "members"),
    [
        ("tp", ["tp1", "tp2", "tp3", "tp4", "tp8"]),
        ("dp", ["tp1", "dp2", "dp3", "dp4", "dp8"]),
        ("tppp2", [None, "pp2", None, "tp2pp2", "tp4pp2"]),
        ("n1m:batch", ["tp1", "n1m2:batch", "n1m3:batch", "n1m4:batch", "n1m8:batch"]),
        ("n2m:batch+gathered", [None, "tp2", None, "n2m2:batch+gathered", "n2m4:batch+gathered"]),
        ("nm2:gather+concat", [None, "n1m2:gather+concat", None, "n2m2:gather+concat", "n4m2:gather+concat"]),
        ("tp:sharded", ["tp1", "tp2:sharded", "tp3:sharded", "tp4:sharded", "tp8:sharded"]),
        ("tp:dp-attention", ["tp1", *(f"tp{n}:dp-attention" for n in (2, 3, 4, 8))]),
        ("tp2pp:dp-attention", [None, "tp2:dp-attention", None, "tp2pp2:dp-attention", "tp2pp4:dp-attention"]),
        ("tp:overlapped", ["tp1", "tp2:overlapped", "tp3:overlapped", "tp4:overlapped", "tp8:overlapped"]),
        ("n1m:batch+overlapped", ["tp1", *(f"n1m{m}:batch+overlapped" for m in (2, 3, 4, 8))]),
        ("tp2pp:overlapped", [None, "tp2:overlapped", None, "tp2pp2:overlapped", "tp2pp4:overlapped"]),
        (
            "nm2:batch+gathered+overlapped",
            [None, "n1m2:batch+gathered", None, *(f"n{n}m2:batch+gathered+overlapped" for n in (2, 4))],
        ),
        ("pp:drained", ["tp1", "pp2:drained", "pp3:drained", "pp4:drained", "pp8:drained"]),
        ("tp2pp:fp8+drained", [None, "tp2:fp8", None, "tp2pp2:fp8+drained", "tp2pp4:fp8+drained"]),
    ],
)
def test_a_family_has_the_member_that_its_notation_says(family: str, members: list[str | None]) -> None:
    found = [parse_family(family).at(ranks) for ranks in (1, 2, 3, 4, 8)]
    assert [str(layout) if layout else None for layout in found] == members
    assert all(layout is None or layout.ranks == n for layout, n in zip(found, (1, 2, 3, 4, 8), strict=True))


@pytest.mark.parametrize(
    "text",
    [
        *("", "tp4", "nm:batch", "n1m", "fast", "dp:batch", "n1m:batch+scores", "tpn2:batch"),
        *("dp:overlapped", "pp:overlapped", "tp:drained", "n1m:batch+gathered+overlapped"),
        *("n1m:dp-attention", "dp:dp-attention"),
    ],
)
def test_what_is_no_family_is_refused_with_examples(text: str) -> None:
    with pytest.raises(InvalidLayout) as caught:
        parse_family(text)
    assert text in ("dp:batch",) or caught.value.legal


def study_of(**changes: Any) -> tuple[Study, list[Design]]:
    study, designs, _ = make(Wishes(**TINY | changes), (1, 2, 4), ("tp", "dp"), MODES)
    return study, designs


def test_strong_scaling_keeps_the_batch_and_weak_scaling_that_of_a_rank() -> None:
    study, designs = study_of()
    pairs = zip(study.points, designs, strict=True)
    batches = {(point.ranks, mode): design.workload.batch for point, design in pairs for mode in point.modes}
    strong = {(ranks, "strong"): 4 for ranks in (1, 2, 4)}
    assert batches == strong | {(1, "weak"): 4, (2, "weak"): 8, (4, "weak"): 16}
    assert [sorted(order) for order in study.order] == [[0, 1, 2, 3, 4]] * 5 and len(set(study.order)) > 1
    assert [design.control is None for design in designs] == [point.ranks == 1 for point in study.points]


def test_without_a_batch_every_point_gets_one_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    families = ("tp", "n1m:batch+gathered")
    layouts = [parse_layout(name) for name in ("tp2", "n1m2:batch+gathered")]
    ten = Workload(batch=10, seq=16, decode_steps=2)
    room = budget.need(find_model("tiny"), layouts, ten, "cpu").total_bytes

    def small(ranks: int | None, device: object) -> machine.Machine:
        return machine.Machine("cpu", ranks or 4, room)

    for module in (plan, scale):
        monkeypatch.setattr(module, "look", small)
    _, designs, notes = make(Wishes(**TINY | {"batch": None}), (1, 2, 4), families, MODES)
    first = designs[0].workload.batch
    assert first in (4, 8) and any(f"batch {first} on 1 ranks" in note for note in notes)
    assert [d.workload.batch for d in designs] == [first, first, 2 * first, first, 4 * first]
    with pytest.raises(NotAvailable):
        make(Wishes(**TINY | {"batch": first + 4}), (1, 2, 4), families, MODES)
    _, _, notes = make(Wishes(**TINY | {"batch": 3}), (1, 2), families, MODES)
    assert any("3 sequences do not divide among 2 ranks" in note and "0.750" in note for note in notes)
    with pytest.raises(NotAvailable) as caught:
        make(Wishes(**TINY | {"batch": 9}), (2, 4), ("tp", "n1m:batch+gathered", "dp"), ("weak",))
    told = caught.value.block()
    assert "(ranks4-weak, batch 18)" in told or "(ranks2-weak, batch 9)" in told


@pytest.mark.parametrize(
    ("counts", "families", "changes", "said"),
    [
        ((2,), ("tp",), {}, "nothing to scale over"),
        ((), ("tp",), {}, "nothing to scale over"),
        ((2, 3), ("tp",), {}, "multiple of the smallest"),
        ((1, 2), ("tp", "tp"), {}, "named twice"),
        ((1, 2), (), {}, "no family"),
        ((1, 2, 3), ("n4m:batch",), {}, "on 0 of these"),
        ((1, 2), ("tppp2",), {}, "on 1 of these"),
        ((1, 2), ("tp",), {"device": "tpu"}, "'tpu' is not known"),
        ((1, 2), ("tp",), {"dtype": "float64"}, "reference's own dtype"),
        ((1, 8), ("dp",), {}, "8 replicas share 4 sequences"),
        ((1, 2), ("tp",), {"seq": 512}, "512 + 2 positions"),
        ((1, 2), ("tp",), {"model": "gpt9"}, "no model is named"),
    ],
)
def test_what_cannot_be_scaled_is_refused(
    counts: tuple[int, ...], families: tuple[str, ...], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(HeadgridError) as caught:
        make(Wishes(**TINY | changes), counts, families, MODES)
    assert said in caught.value.block()


def test_a_study_changed_after_it_was_declared_is_refused(tmp_path: Path) -> None:
    study, designs = study_of()
    path = create(study, designs, {}, tmp_path)
    assert open_study(path)[0] == study == from_dict(json.loads((path / "scale.json").read_text()))
    data = study.to_dict()
    data["order"] = data["order"][::-1]
    with pytest.raises(InvalidInput, match="hash"):
        from_dict(json.loads(json.dumps(data)))
    other = path / study.points[1].run / "design.json"
    other.write_text((path / study.points[2].run / "design.json").read_text())
    with pytest.raises(InvalidInput, match="another design"):
        open_study(path)


PREFILL_S = {"tp1": 1.0, "tp2": 0.625, "tp4": 0.4, "dp2": 0.5, "dp4": 0.25}
"""Seconds for 4 sequences: tp has 0.8 of ideal on 2 ranks and 0.625 on 4, dp all of it."""


def runs_of(study: Study, designs: list[Design], noise: float, unverified: str = "") -> list[tuple[Design, list]]:
    """Journals in which every sequence takes equally long, rounds drift together by 30 % and launches by `noise`."""
    draw, runs = random.Random(7), []
    drift = [1 + 0.3 * number for number in range(len(study.order))]
    for design in designs:
        records: list[Any] = []
        flat = design.to_dict()
        for index in range(design.protocol.launches):
            records.append(launch(index, flat))
            records += [control(index)] if design.control else []
            labels = [arm.label for arm in design.arms]
            records += [verify(index, label, verified=not label.startswith(unverified or "?")) for label in labels]
            records += [memory(index, label, design.ranks) for label in labels]
            factor = drift[index] * (1 + draw.gauss(0, noise)) * design.workload.batch / 4
            for number in range(design.protocol.warmup_blocks + design.protocol.blocks):
                for arm in design.arms:
                    seconds = PREFILL_S[arm.layout] * factor
                    warm = number < design.protocol.warmup_blocks
                    records.append(block(index, number, arm.label, seconds, seconds / 10, warmup=warm))
            records.append(end(index))
        runs.append((design, records))
    return runs


def test_planted_efficiencies_come_out_whatever_drift_the_rounds_share() -> None:
    study, designs = study_of()
    summary = summarise_study(study, runs_of(study, designs, noise=0.01))
    found = {(row["family"], row["mode"], row["ranks"]): row for row in summary["rows"]}
    truth = {("tp", 1): 1, ("tp", 2): 0.8, ("tp", 4): 0.625, ("dp", 1): 1, ("dp", 2): 1, ("dp", 4): 1}
    assert set(found) == {(family, mode, ranks) for family, ranks in truth for mode in MODES}
    for (family, mode, ranks), row in found.items():
        for phase in ("prefill", "decode"):
            got = row[phase]
            assert got["efficiency"] == pytest.approx(truth[family, ranks], rel=0.02), (family, mode, ranks)
            assert got["speedup"] == pytest.approx(ranks * truth[family, ranks], rel=0.02)
            if ranks > 1:
                low, high = got["efficiency_ci95"]
                assert high / low < 1.06 and got["unit"] == "launch" and got["n"] == 5
                assert low / 1.01 < truth[family, ranks] < high * 1.01  # coverage itself is shown in test_stats.py
    assert summary["complete"] and summary["negative_control_rejected"] is True
    assert all(row["prefill"] is not None for row in summary["aa"])
    json.dumps(summary, allow_nan=False)


def test_a_wrong_pairing_of_rounds_would_be_seen() -> None:
    """The control of the test above: with rounds that do not belong together, shared drift widens the intervals."""
    study, designs = study_of()
    runs = runs_of(study, designs, noise=0.0)
    for _, records in runs[1:]:
        for record in records:
            record["launch"] = 4 - record["launch"]
    rows = [row for row in summarise_study(study, runs)["rows"] if row["ranks"] > 1]
    assert all(row["prefill"]["efficiency_ci95"][1] / row["prefill"]["efficiency_ci95"][0] > 1.5 for row in rows)


def test_memory_per_parameter_counts_replicas() -> None:
    study, designs = study_of()
    runs = runs_of(study, designs, noise=0.0)
    row = next(row for row in summarise_study(study, runs)["rows"] if row["layout"] == "dp4")
    held = memory(0, "dp4", 4)["per_rank"]
    count = row["memory"]["num_parameters"]
    total = sum(rank["parameters_bytes"] for rank in held)
    assert row["memory"]["per_parameter"]["parameters_bytes"] == pytest.approx(total / count)
    assert row["memory"]["fullest_rank"]["kv_cache_bytes"] == held[0]["kv_cache_bytes"]


def test_what_is_not_verified_or_not_there_has_no_efficiency() -> None:
    study, designs = study_of()
    summary = summarise_study(study, runs_of(study, designs, noise=0.0, unverified="tp2"))
    bad = [row for row in summary["rows"] if row["layout"] == "tp2"]
    assert bad and all(row["prefill"]["efficiency"] is None and not row["verified"] for row in bad)
    assert any("tp2 is not verified" in text for text in summary["warnings"])
    empty = summarise_study(study, [(design, []) for design in designs])
    assert not empty["complete"] and empty["negative_control_rejected"] is False
    assert all(row["prefill"]["efficiency"] is None and row["memory"] is None for row in empty["rows"])


def test_few_rounds_and_few_sizes_are_said() -> None:
    study, designs = study_of(launches=2)
    summary = summarise_study(study, runs_of(study, designs, noise=0.01))
    said = " ".join(summary["warnings"])
    assert "2 of the 5 rounds" in said and "Fewer than 4 sizes" in said
    assert all(row["prefill"]["unit"] != "launch" for row in summary["rows"])
