"""The protocol's parts by simulation and by hand: intervals, planted slow-down, joint verdicts, tails, steadiness."""

import importlib.util
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from run_fixture import block, control, end, launch, make_design, verify

from headgrid.errors import InvalidInput
from headgrid.experiment import stats
from headgrid.experiment.confidence import confidence_of, of_independent, of_series
from headgrid.experiment.design import Protocol, analysis_of, declare, from_dict, hash_of, name_arms
from headgrid.experiment.multiplicity import claimed, holm, p_claim
from headgrid.experiment.records import BlockKey
from headgrid.experiment.sentinel_bands import bands, outside, readings, sentinel_bands
from headgrid.experiment.stats import summarise, t_interval
from headgrid.experiment.steady import steady_state
from headgrid.experiment.tails import order_statistics, tails
from headgrid.experiment.text import BUILTIN, identify
from headgrid.report.html import outcome, render
from headgrid.spec.model import find_model
from headgrid.spec.workload import Workload

Budget = Callable[[int, int], int]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BASE, TWIN, SLOW, GRID = "tp4", "tp4 (A/A)", "tp4 (+2 %)", "n2m2:batch"
ARMS = [
    {"label": BASE, "layout": "tp4", "role": "baseline"},
    {"label": TWIN, "layout": "tp4", "role": "aa"},
    {"label": SLOW, "layout": "tp4", "role": "planted"},
    {"label": GRID, "layout": "n2m2:batch", "role": "arm"},
    {"label": "dp4", "layout": "dp4", "role": "arm"},
]
RATE = {BASE: 1.0, TWIN: 1.0, SLOW: 1.02, GRID: 0.9, "dp4": 1.0}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    return script("coverage")


def a_run(
    *,
    launches: int = 1,
    blocks: int = 12,
    noise: float = 0.002,
    drift: float = 0.0,
    rates: dict[str, float] = RATE,
    arms: list[dict[str, str]] = ARMS,
    seed: int = 0,
    planted: float = 0.02,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Design and journal of a run whose arms take turns at random; `drift` is the machine's over a launch, in time."""
    draw = random.Random(f"{seed} {launches} {blocks}")
    workload = {"batch": 4, "seq": 64, "decode_steps": 4, "dtype": "float32"}
    design = make_design(
        arms=arms, launches=launches, blocks=blocks, ranks=4, device="cuda", workload=workload, analysis=2,
        planted=planted,
    )  # fmt: skip
    records: list[dict[str, Any]] = []
    for index in range(launches):
        records += [launch(index, design), control(index)]
        records += [verify(index, arm["label"]) for arm in arms]
        for number in range(blocks + 1):
            for place, arm in enumerate(draw.sample(arms, len(arms))):
                passed = (number * len(arms) + place) / ((blocks + 1) * len(arms))
                label = arm["label"]
                took = rates[label] * (1 + drift * passed)
                times = [took * math.exp(draw.gauss(0, noise)) for _ in range(2)]
                record = block(index, number, label, *times, warmup=number == 0)
                records.append(record | {"sentinels": sentinels(draw)})
        records.append(end(index) | {"sentinels": sentinels(draw)})
    return design, records


def sentinels(draw: random.Random) -> dict[str, list[float]]:
    usual = {"gemm_s": 2e-3, "all_reduce_s": 1e-3, "host_s": 1e-3}
    return {kind: [seconds * (1 + draw.gauss(0, 0.003)) for _ in range(4)] for kind, seconds in usual.items()}


# --- intervals -------------------------------------------------------------------------------------------------------


def test_independent_values_have_students_t() -> None:
    values = [0.3, 0.1, 0.4, 0.15, 0.92]
    ours, plain = of_independent(values), t_interval(values)
    assert ours is not None and ours.ci95 == pytest.approx(plain, abs=1e-9)
    assert ours.below(sum(values) / 5) == pytest.approx(0.5)


def test_a_known_dependence_is_generalised_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one r in the mixture: the textbook's estimate from the covariance matrix, with a gap and two launches."""
    import numpy as np
    from scipy.special import stdtrit

    from headgrid.experiment import confidence

    r, launches = 0.6, [[(1, 0.3), (2, 0.7), (5, 0.1), (6, 0.9)], [(1, 0.5), (2, 0.2), (3, 0.35)]]
    monkeypatch.setattr(confidence, "_GRID", np.array([r]))
    found = of_series(launches)
    places = [[place for place, _ in series] for series in launches]
    values = np.array([value for series in launches for _, value in series])
    covariance = np.zeros((7, 7))
    for start, group in ((0, places[0]), (4, places[1])):
        gaps = np.abs(np.subtract.outer(group, group))
        covariance[start : start + len(group), start : start + len(group)] = r**gaps
    inverse, ones = np.linalg.inv(covariance), np.ones(7)
    precision = ones @ inverse @ ones
    mean = ones @ inverse @ values / precision
    half = stdtrit(6, 0.975) * math.sqrt((values - mean) @ inverse @ (values - mean) / 6 / precision)
    assert found is not None and found.ci95 == pytest.approx((mean - half, mean + half), rel=1e-9)


def test_few_blocks_are_not_believed_to_be_independent_and_many_are() -> None:
    draw = random.Random(3)
    widths = {}
    for n in (5, 400):
        values = [draw.gauss(0, 1) for _ in range(n)]
        ours, plain = of_series([list(enumerate(values))]), t_interval(values)
        assert ours is not None and plain is not None
        widths[n] = (ours.ci95[1] - ours.ci95[0]) / (plain[1] - plain[0])
    assert widths[5] > 2.5 and 0.99 < widths[400] < 1.25


def test_equal_blocks_have_a_point_and_one_has_nothing() -> None:
    same = confidence_of({BlockKey(0, n): 0.25 for n in range(4)})
    assert same is not None and same.ci95 == (0.25, 0.25) and same.below(0.2) == 0 and same.below(0.3) == 1
    assert confidence_of({BlockKey(0, 0): 1.0}) is None and confidence_of({}) is None


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("series", ["machine", "ratio"])
def test_intervals_over_launches_cover(simulation: ModuleType, budget: Budget, series: str, rho: float) -> None:
    """Launch effects of 2 %, a drift of 30 % within each launch. The SD of 1000 runs' share is 0.7 points."""
    case = simulation.Case(5, 8, series, rho, simulation.LAUNCH_SD, simulation.DRIFT)
    assert 0.93 <= simulation.coverage(case, budget(1000, 6000)) <= 0.97


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.95])
def test_intervals_within_a_launch_of_a_hundred_blocks_cover(
    simulation: ModuleType, budget: Budget, rho: float
) -> None:
    case = simulation.Case(1, 100, "ratio", rho)
    assert 0.92 <= simulation.coverage(case, budget(400, 4000)) <= 0.985


@pytest.mark.parametrize(("series", "rho"), [("machine", 0.95), ("ratio", 0.0), ("ratio", 0.8)])
def test_intervals_of_few_blocks_cover_at_least(
    simulation: ModuleType, budget: Budget, series: str, rho: float
) -> None:
    assert simulation.coverage(simulation.Case(1, 8, series, rho), budget(500, 4000)) >= 0.92


def test_the_simulation_can_fail(simulation: ModuleType) -> None:
    """Student's t over dependent blocks, which is what runs of the former analysis have."""
    import numpy as np

    draw, hits = np.random.default_rng(5), 0
    for _ in range(300):
        logs = simulation.logs_of(simulation.Case(1, 20, "ratio", 0.8), draw)
        low, high = t_interval(list(logs.values())) or (0, 0)
        hits += low <= simulation.TRUE <= high
    assert hits / 300 < 0.7


# --- planted slow-down, drift, A/A -----------------------------------------------------------------------------------


def test_the_planted_slow_down_is_found_and_is_no_contestant() -> None:
    design, records = a_run()
    summary = summarise(design, records)
    for row in summary["resolution"]["phases"]:
        assert row["excludes_zero"] and row["holds_planted"]
        assert row["ci95"][0] < row["recovered"] < row["ci95"][1]
        assert 0 < row["smallest_detectable"] < 0.01
    assert not any(SLOW in (row["a"], row["b"]) for row in summary["comparisons"])
    assert not any("planted" in warning for warning in summary["warnings"])
    assert SLOW not in outcome(summary, design["margin"])
    page = render(design, {"cpu_count": 2}, records, summary | {"run": "x"})
    assert "smallest detectable" in page and "Steady state" in page


def test_a_slow_down_that_is_not_found_is_a_warning() -> None:
    summary = summarise(*a_run(noise=0.05))
    assert sum("invisible in this run" in warning for warning in summary["warnings"]) == 2
    assert not any(row["excludes_zero"] for row in summary["resolution"]["phases"])


def test_a_slow_down_of_another_size_is_a_warning() -> None:
    summary = summarise(*a_run(rates=RATE | {SLOW: 1.08}))
    assert sum("not as large as it is" in warning for warning in summary["warnings"]) == 2


def test_a_run_without_a_planted_slow_down_says_so() -> None:
    arms = [arm for arm in ARMS if arm["role"] != "planted"]
    summary = summarise(*a_run(arms=arms, planted=0.0))
    assert summary["resolution"] is None
    assert any("No slow-down was planted" in warning for warning in summary["warnings"])


def test_drift_that_all_arms_share_is_no_difference_but_is_told(budget: Budget) -> None:
    """30 % over the launch; without interleaving every arm would differ from every other."""
    called = total = 0
    for seed in range(budget(30, 300)):
        design, records = a_run(blocks=8, drift=0.3, rates=dict.fromkeys(RATE, 1.0), seed=seed)
        summary = summarise(design, records)
        intervals = [row["ci95"] for row in summary["comparisons"]]
        called += sum(not low <= 1 <= high for low, high in intervals)
        total += len(intervals)
        assert all(claimed(row) not in ("faster", "slower") for row in summary["comparisons"])
        assert all(row["from_block"] is None for row in summary["steady"])
    assert called <= 0.05 * total


def test_drift_of_one_arm_is_a_difference() -> None:
    """The control of the test above: an arm that drifts alone is called slower by an interval over enough blocks."""
    design, records = a_run(blocks=100, rates=RATE | {GRID: 1.0})
    for record in records:
        if record["kind"] == "block" and record["arm"] == GRID:
            record["prefill_s"] = [seconds * (1.1 + 0.0003 * record["block"]) for seconds in record["prefill_s"]]
    rows = summarise(design, records)["comparisons"]
    (row,) = (row for row in rows if (row["a"], row["b"], row["phase"]) == (GRID, BASE, "prefill"))
    assert claimed(row) == "slower"


def test_design_with_a_planted_arm_is_declared_and_hashed() -> None:
    def made(planted: float) -> Any:
        return declare(
            model=find_model("tiny"), workload=Workload(batch=4, seq=16, decode_steps=2, dtype="float32"),
            arms=("tp4",), ranks=4, device="cpu", text=identify(BUILTIN), protocol=Protocol(planted=planted),
        )  # fmt: skip

    design = made(0.025)
    assert [(arm.label, arm.layout, arm.role) for arm in design.arms][2] == ("tp4 (+2.5 %)", "tp4", "planted")
    assert from_dict(design.to_dict()) == design and analysis_of(design.to_dict()) == 3
    assert made(0.03).to_dict()["hash"] != design.to_dict()["hash"]
    assert [arm.role for arm in name_arms(["tp4"])] == ["baseline", "aa"]
    with pytest.raises(InvalidInput):
        Protocol(planted=0.9)


def test_older_designs_keep_their_hash_and_their_analysis() -> None:
    folder = BENCHMARKS / "2026-11-23-seed-2xh200"
    declared = json.loads((folder / "design.json").read_text())
    assert from_dict(declared).to_dict()["hash"] == declared["hash"] == hash_of(declared)
    assert analysis_of(declared) == 1
    records = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    made = summarise(declared, records)
    assert not {"resolution", "steady", "tails", "sentinels"} & set(made)
    stored = json.loads((folder / "summary.json").read_text())
    assert made["comparisons"] == stored["comparisons"]


# --- several comparisons ---------------------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    # sorted .01 .02 .03 .04: times 4 3 2 1 = .04 .06 .06 .04, none below the one before: .04 .06 .06 .06
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and holm([]) == []


@pytest.mark.parametrize("seed", range(20))
def test_p_of_a_claim_agrees_with_the_interval(seed: int) -> None:
    draw = random.Random(seed)
    shift = draw.choice([-0.02, -0.01, 0.0, 0.01, 0.02])
    made = confidence_of({BlockKey(0, n): shift + draw.gauss(0, 0.004) for n in range(30)})
    assert made is not None
    verdict = stats.verdict([math.exp(edge) for edge in made.ci95], 0.01)
    assert (p_claim(made, 0.01) <= 0.05) is (verdict != "inconclusive")


def test_of_many_comparisons_a_chance_finding_is_not_claimed() -> None:
    """Eleven equal arms and one lucky one, at a noise where its own interval would just do."""
    arms = [*ARMS[:3], *({"label": f"x{n}", "layout": f"dp{n}", "role": "arm"} for n in range(2, 14))]
    rates = {BASE: 1.0, TWIN: 1.0, SLOW: 1.02, **{arm["label"]: 1.0 for arm in arms[3:]}, "x2": 0.965}
    joint = 0
    for seed in range(8):
        summary = summarise(*a_run(launches=5, blocks=2, noise=0.015, arms=arms, rates=rates, seed=seed))
        rows = [row for row in summary["comparisons"] if row["a"] == "x2"]
        assert all(row["family"] == "primary" for row in rows)
        joint += sum(row["verdict"] == "faster" and row["verdict_holm"] == "inconclusive" for row in rows)
        assert all(row["verdict_holm"] in (row["verdict"], "inconclusive") for row in rows)
    assert joint > 0


def test_comparisons_among_other_arms_are_exploratory() -> None:
    rows = summarise(*a_run())["comparisons"]
    families = {(row["a"], row["b"]): row["family"] for row in rows}
    assert families == {
        (TWIN, BASE): "null", (GRID, BASE): "primary", ("dp4", BASE): "primary", (GRID, "dp4"): "exploratory"
    }  # fmt: skip
    assert all((row["p_holm"] is None) is (row["family"] != "primary") for row in rows)


# --- tails -----------------------------------------------------------------------------------------------------------


def test_order_statistics_by_hand() -> None:
    # n = 1000, q = 0.9: the 900th value; ranks of the interval 881 and 919, as any table of the binomial gives
    values = list(range(1, 1001))
    random.Random(1).shuffle(values)
    value, (low, high) = order_statistics(values, 0.9)
    assert value == 900 and low in (881, 882) and high in (918, 919, 920)


def test_intervals_of_quantiles_cover(budget: Budget) -> None:
    draw, hits, runs = random.Random(2), 0, budget(400, 4000)
    for _ in range(runs):
        _, (low, high) = order_statistics([draw.expovariate(1) for _ in range(150)], 0.9)
        hits += low <= math.log(10) <= high
    assert 0.93 <= hits / runs <= 0.985


def test_percentiles_of_few_blocks_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="p99 of 999 blocks"):
        order_statistics([1.0] * 999, 0.99)
    told = tails(*a_run(blocks=99))
    assert all(row["seconds"] is None and "it takes" in row["refused"] for row in told["blocks"])
    told = tails(*a_run(blocks=100, arms=ARMS[:1]))
    assert [row["quantile"] for row in told["blocks"] if row["seconds"]] == [0.9, 0.9]
    assert told["per_step"].startswith("refused")
    told = tails(*a_run(launches=2, blocks=100, arms=ARMS[:1]))
    assert all(row["refused"] for row in told["blocks"])


# --- steady state and sentinels --------------------------------------------------------------------------------------


def turns(shape: Callable[[int], float], blocks: int, noise: float, seed: int) -> list[tuple[int, float]]:
    draw = random.Random(seed)
    return [(block, shape(block) + draw.gauss(0, noise)) for block in range(blocks) for _ in range(6)]


def test_a_cold_beginning_is_cut_where_it_ends() -> None:
    told = [steady_state(turns(lambda block: 0.2 if block < 2 else 0.0, 8, 0.01, seed), 0.02) for seed in range(20)]
    places = [row["from_block"] for row in told]
    assert set(places) <= {2, 3} and places.count(2) > 10  # by chance the next block may look as if it belonged to it
    assert all(0.18 < row["change"] < 0.26 for row in told)


def test_a_lasting_trend_is_no_steady_state() -> None:
    for seed in range(20):
        assert steady_state(turns(lambda block: 0.03 * block, 8, 0.01, seed), 0.01)["from_block"] is None


def test_noise_alone_is_steady_from_the_beginning(budget: Budget) -> None:
    runs = budget(150, 1500)
    told = [steady_state(turns(lambda block: 0.0, 6, 0.03, seed), 0.01)["from_block"] for seed in range(runs)]
    assert sum(block != 0 for block in told) <= 0.04 * runs


def test_a_disturbed_reading_is_outside_its_band_and_others_are_not() -> None:
    _, records = a_run()
    assert {row["outside"] for row in sentinel_bands(records)} == {0}
    blocks = [record for record in records if record["kind"] == "block" and not record["warmup"]]
    blocks[20]["sentinels"]["all_reduce_s"][1] *= 1.3
    ((reading, kind, ratio),) = outside(list(readings(records)))
    assert (kind, reading.before, reading.after) == ("all_reduce_s", blocks[19], blocks[20]) and 1.2 < ratio < 1.4
    assert bands(list(readings(records))[:5]) == {}, "of a few readings there is no band"


def test_nothing_is_called_reproducible_from_fewer_than_five_launches() -> None:
    for launches, shown in ((4, False), (5, True)):
        design, records = a_run(launches=launches, blocks=2)
        page = render(design, {"cpu_count": 2}, records, summarise(design, records) | {"run": "x"})
        assert ("not shown: 4 of the 5 launches" in page) is not shown
        assert f"SD of the means of {launches} launches" in page
