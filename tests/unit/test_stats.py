"""Statistics against answers worked out by hand, and against simulation."""

import json
import math
import random
import subprocess
import sys
from typing import Any

import pytest
from run_fixture import block, control, end, launch, make_design, make_records, verify

from headgrid.experiment import stats
from headgrid.experiment.stats import BlockKey, summarise

TWO_ARMS = [
    {"label": "base", "layout": "tp4", "role": "baseline"},
    {"label": "grid", "layout": "n2m2:batch", "role": "arm"},
]


def two_arms(times: list[list[tuple[float, float]]], **changes: Any) -> dict[str, Any]:
    """Summary of a run with times[launch][block] = (seconds of base, of grid) in prefill; decode takes a tenth."""
    workload = {"batch": 16, "seq": 125, "decode_steps": 4, "dtype": "float32"}
    design = make_design(
        arms=TWO_ARMS, launches=len(times), blocks=len(times[0]), ranks=4, device="cuda", workload=workload, **changes
    )
    records = []
    for index, blocks in enumerate(times):
        records += [launch(index, design), control(index), verify(index, "base"), verify(index, "grid")]
        for number, pair in enumerate(blocks):
            records += [
                block(index, number, arm, seconds, seconds / 10)
                for arm, seconds in zip(("base", "grid"), pair, strict=True)
            ]
    return summarise(design, [*records, end(len(times) - 1)])


def only(summary: dict[str, Any], phase: str) -> dict[str, Any]:
    (row,) = (row for row in summary["comparisons"] if row["phase"] == phase)
    return row


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_t_interval_of_five_numbers() -> None:
    # 2 4 4 4 6: mean 4, squares 4 0 0 0 4, SD sqrt(2), t(4, 97.5 %) = 2.776 (any table), half width 1.756
    low, high = stats.t_interval([2, 4, 4, 4, 6]) or (0, 0)
    assert (low, high) == (pytest.approx(2.244, abs=1e-3), pytest.approx(5.756, abs=1e-3))
    assert stats.t_interval([3.0]) is None


def test_five_launches_interval_over_launches() -> None:
    # Base always takes exp(k/10) times as long as grid in launch k = 1..5: log ratios .1 .2 .3 .4 .5, mean .3,
    # SD .158114, half width 2.776445 * .158114 / sqrt(5) = .196324; exp(.3) = 1.349859, exp(.103676) = 1.109241,
    # exp(.496324) = 1.642671. The blocks of a launch agree, so an interval over 10 blocks would be narrower.
    summary = two_arms([[(math.exp(k / 10), 1.0)] * 2 for k in range(1, 6)])
    for phase in stats.PHASES:
        row = only(summary, phase)
        assert (row["a"], row["b"], row["n"], row["unit"]) == ("grid", "base", 5, "launch")
        assert row["ratio"] == pytest.approx(1.349859, abs=1e-6)
        assert row["ci95"] == pytest.approx([1.109241, 1.642671], abs=2e-6)
        assert row["verdict"] == "faster"


def test_few_launches_interval_over_blocks_and_says_so() -> None:
    # One launch, log ratios 0 and ln 4: mean ln 2, SD ln 4 / sqrt 2, half width 12.7062 * SD / sqrt 2 = 8.8073
    row = only(two_arms([[(1.0, 1.0), (4.0, 1.0)]]), "prefill")
    assert row["ratio"] == pytest.approx(2.0)
    assert [math.log(edge) for edge in row["ci95"]] == pytest.approx([0.6931 - 8.8073, 0.6931 + 8.8073], abs=1e-3)
    assert (row["unit"], row["n"], row["verdict"]) == ("block within this launch", 2, "inconclusive")
    summary = two_arms([[(1.0, 1.0), (4.0, 1.0)]] * 4)
    row = only(summary, "prefill")
    assert (row["unit"], row["n"]) == ("block within these launches", 8)
    assert any("4 of the 5 launches" in warning for warning in summary["warnings"])


def test_one_block_has_no_interval() -> None:
    summary = two_arms([[(2.0, 1.0)]])
    row = only(summary, "prefill")
    assert (row["ratio"], row["ci95"], row["verdict"]) == (pytest.approx(2.0), None, "inconclusive")
    assert row["seed_statistics"]["p_value"] is None and row["seed_statistics"]["cohens_d"] is None
    assert summary["arms"][0]["prefill_tokens_per_s"]["sd"] is None
    json.dumps(summary, allow_nan=False)


def test_throughputs_of_one_arm() -> None:
    # 16 x 125 = 2000 tokens; blocks of 1 s and 2 s: 2000 and 1000 tok/s, mean 1500, SD 1000/sqrt 2 = 707.107
    # decode: 0.1 s and 0.2 s for 4 steps: 25 and 50 ms a step; 16 sequences: 640 and 320 tok/s
    base = two_arms([[(1.0, 1.0), (2.0, 1.0)]])["arms"][0]
    assert base["prefill_tokens_per_s"]["mean"] == pytest.approx(1500)
    assert base["prefill_tokens_per_s"]["sd"] == pytest.approx(707.107, abs=1e-3)
    assert base["decode_tpot_s"]["mean"] == pytest.approx(0.0375)
    assert base["decode_tokens_per_s"]["mean"] == pytest.approx(480)
    # over 5 launches the unit is a launch, and its mean time of 1.5 s makes 1333 tok/s
    base = two_arms([[(1.0, 1.0), (2.0, 1.0)]] * 5)["arms"][0]
    assert base["prefill_tokens_per_s"]["mean"] == pytest.approx(2000 / 1.5)
    assert (base["prefill_tokens_per_s"]["n"], base["prefill_tokens_per_s"]["unit"]) == (5, "launch")
    assert base["prefill_tokens_per_s"]["sd"] == pytest.approx(0, abs=1e-9)


def test_block_time_is_the_slowest_rank_without_warm_up() -> None:
    records = [block(0, 0, "x", 9.0, 9.0, warmup=True), block(0, 1, "x", 2.0, 1.0)]
    records[1]["prefill_s"] = [1.0, 3.0, 2.0]
    assert stats.block_times(records, "x", "prefill") == {BlockKey(0, 1): 3.0}
    records[1]["prefill_s"] = [1.0, None, 2.0]
    assert stats.block_times(records, "x", "prefill") == {}, "a block that one rank did not time has no slowest rank"


@pytest.mark.parametrize(
    ("ci95", "expected"),
    [
        ((1.051, 1.2), "faster"),
        ((1.049, 1.2), "inconclusive"),
        ((0.8, 0.951), "slower"),  # 1 / 1.05 = 0.95238
        ((0.8, 0.953), "inconclusive"),
        ((0.953, 1.049), "equivalent"),
        ((1.01, 1.04), "equivalent"),
        ((0.9, 1.1), "inconclusive"),
        (None, "inconclusive"),
    ],
)
def test_verdict(ci95: tuple[float, float] | None, expected: str) -> None:
    assert stats.verdict(ci95, 0.05) == expected


def test_swapping_the_arms_swaps_the_verdict() -> None:
    opposite = {"faster": "slower", "slower": "faster", "equivalent": "equivalent", "inconclusive": "inconclusive"}
    for low in (0.9, 0.951, 0.953, 0.99, 1.02, 1.049, 1.06):
        for high in (low + 0.005, low + 0.2):
            assert stats.verdict((1 / high, 1 / low), 0.05) == opposite[stats.verdict((low, high), 0.05)]


def test_seed_statistics() -> None:
    # Throughputs a 5 7 9, b 4 5 6: differences 1 2 3, mean 2, SD 1, t = 2 sqrt 3 = 3.4641 with 2 degrees of freedom.
    # CDF for 2 df is 1/2 + t / (2 sqrt(2 + t^2)), so p = 1 - t / sqrt(2 + t^2) = 1 - 3.4641/3.7417 = 0.07418.
    # Means 7 and 5, SDs 2 and 1, pooled sqrt(2.5) = 1.58114, d = 2 / 1.58114 = 1.26491.
    a, b = ({BlockKey(0, k): 1 / rate for k, rate in enumerate(rates)} for rates in ((5, 7, 9), (4, 5, 6)))
    seed = stats.seed_statistics(a, b)
    assert seed["p_value"] == pytest.approx(0.07418, abs=1e-5)
    assert seed["cohens_d"] == pytest.approx(1.26491, abs=1e-5)
    assert seed["label"].startswith("as the seed computes them") and "do not trust" in seed["label"]


def test_reproducibility_is_the_spread_of_launch_means() -> None:
    # base: launch means 1 and 3 seconds: mean 2, SD sqrt 2
    summary = two_arms([[(1.0, 1.0), (1.0, 1.0)], [(2.0, 1.0), (4.0, 1.0)]])
    base, grid = summary["reproducibility"]
    assert base == {
        "label": "base", "launches": 2,
        "prefill": pytest.approx(math.sqrt(2) / 2), "decode": pytest.approx(math.sqrt(2) / 2),
    }  # fmt: skip
    assert grid["prefill"] == 0
    assert two_arms([[(1.0, 1.0)]])["reproducibility"][0]["prefill"] is None


def test_memory_total_is_one_ranks_sum() -> None:
    design = make_design()
    records = make_records(design)
    row = next(record for record in records if record["kind"] == "memory" and record["arm"] == "tp16")
    parts = [f"{part}_bytes" for part in stats.MEMORY_PARTS]
    ranks = (10**9, 10, 10, 10), (5, 10**9, 5, 5)
    row["per_rank"] = [dict(zip(parts, sizes, strict=True)) for sizes in ranks]
    arm = next(arm for arm in summarise(design, records)["arms"] if arm["label"] == "tp16")
    assert arm["memory_bytes"] == {
        "parameters": 10**9, "kv_cache": 10**9, "activations_peak": 6_315_520, "communication_buffer": 2_097_152,
        "total": 1_000_000_020,
    }  # fmt: skip
    row["per_rank"][0]["kv_cache_bytes"] = None
    arm = next(arm for arm in summarise(design, records)["arms"] if arm["label"] == "tp16")
    assert arm["memory_bytes"]["kv_cache"] is None and arm["memory_bytes"]["total"] is None
    assert arm["memory_bytes"]["parameters"] == 10**9


def test_which_arms_are_compared() -> None:
    arms = [*make_design()["arms"], {"label": "dp16", "layout": "dp16", "role": "arm"}]
    base, aa, batch, gather, tp16, dp16 = (arm["label"] for arm in arms)
    with_baseline = [(aa, base), (batch, base), (gather, base), (tp16, base), (dp16, base)]
    among = [(batch, gather), (batch, tp16), (batch, dp16), (gather, tp16), (gather, dp16)]
    assert stats.pairs(arms) == with_baseline + among


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("n4m4:batch", True),
        ("n1m12", True),
        ("dp2n2m2", True),
        ("m4", True),
        ("n8m1pp2", False),
        ("tp8pp2", False),
        ("dp16", False),
    ],
)
def test_grid_layouts(layout: str, expected: bool) -> None:
    assert stats.is_grid(layout) is expected


# --- what must not be concluded --------------------------------------------------------------------------------------


def test_unverified_arm_shows_no_time() -> None:
    design = make_design()
    summary = summarise(design, make_records(design, unverified=("n4m4:batch",)))
    arm = next(arm for arm in summary["arms"] if arm["label"] == "n4m4:batch")
    assert arm["verified"] is False
    assert arm["relative_error"] == pytest.approx(0.874, abs=1e-3)  # the larger: decode, 1.9e6 * 4.6e-7
    assert [arm[key] for key in ("prefill_tokens_per_s", "decode_tpot_s", "decode_tokens_per_s")] == [None] * 3
    assert all(row["time_s"] is None for row in arm["traffic"]) and arm["traffic"]
    rows = [row for row in summary["comparisons"] if "n4m4:batch" in (row["a"], row["b"])]
    assert rows and all(row["ratio"] is None and row["verdict"] == "inconclusive" for row in rows)
    assert all(row["seed_statistics"]["p_value"] is None for row in rows)
    assert any("n4m4:batch is not verified" in warning for warning in summary["warnings"])
    others = [row for row in summary["comparisons"] if "n4m4:batch" not in (row["a"], row["b"])]
    assert all(row["ratio"] for row in others)


def test_one_failed_launch_unverifies_the_arm() -> None:
    records = [verify(0, "x"), verify(1, "x", verified=False), verify(2, "x")]
    assert not stats.is_verified(records, "x")
    assert stats.is_verified(records[:1], "x")
    assert not stats.is_verified([], "x")


def test_aa_difference_is_called_out() -> None:
    arms = [TWO_ARMS[0], {"label": "twin", "layout": "tp4", "role": "aa"}]
    design = make_design(arms=arms, launches=5, blocks=1, ranks=4, device="cuda")
    records = [record for arm in ("base", "twin") for record in (control(0), verify(0, arm))]
    for index, wobble in enumerate((1.000, 1.001, 1.002, 1.001, 1.000)):
        records += [block(index, 0, "base", 1.0, 1.0), block(index, 0, "twin", 1.03 * wobble, wobble)]
    warnings = summarise(design, [*records, end(4)])["warnings"]
    assert sum("two copies of the same arm different" in warning for warning in warnings) == 1
    assert any("In prefill this machine called two copies" in warning for warning in warnings)


def test_quiet_complete_run_has_no_warning() -> None:
    assert summarise(*good_run())["warnings"] == []
    assert summarise(*good_run())["complete"] is True


def good_run() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    design = make_design(device="cuda")
    return design, make_records(design, noise=0.001)


def drop_end(records: list) -> None:
    del records[-1]


def drop_block(records: list) -> None:
    records.remove(next(record for record in records if record["kind"] == "block" and not record["warmup"]))


def pass_control(records: list) -> None:
    records[1].update(rejected=False)


def dull_control(records: list) -> None:
    records[1].update(sensitivity=0.02)


def no_control(records: list) -> None:
    records[:] = [record for record in records if record["kind"] != "control"]


def other_design(records: list) -> None:
    records[0]["design_hash"] = "0"


def other_input(records: list) -> None:
    records[0]["input_sha256"] = "0"


def twice(records: list) -> None:
    found = next(record for record in records if record["kind"] == "block" and not record["warmup"])
    records.insert(-1, {**found, "prefill_s": [99.0]})


def wrong_bytes(records: list) -> None:
    next(record for record in reversed(records) if record["kind"] == "traffic").update(as_predicted=False)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_end, "incomplete."),
        (drop_block, "1 of 150 timed blocks"),
        (pass_control, "negative control passed"),
        (dull_control, "not sensitive"),
        (no_control, "No negative control"),
        (other_design, "another design"),
        (other_input, "different inputs"),
        (twice, "twice"),
        (wrong_bytes, "other bytes"),
    ],
)
def test_each_defect_has_its_warning(damage: Any, words: str) -> None:
    design, records = good_run()
    damage(records)
    summary = summarise(design, records)
    assert [warning for warning in summary["warnings"] if words in warning], summary["warnings"]
    assert len(summary["warnings"]) == 1
    assert summary["complete"] is ("complete" not in summary["warnings"][0] and "missing" not in summary["warnings"][0])


def test_cpu_results_say_so() -> None:
    design = make_design()
    assert summarise(design, make_records(design))["warnings"][0].startswith("Times of 16 ranks on this host's cores")


def test_negative_control_at_its_weakest() -> None:
    design, records = good_run()
    summary = summarise(design, records)
    assert (summary["negative_control_rejected"], summary["control"]["relative_error"]) == (True, 0.79)
    next(record for record in records if record["kind"] == "control").update(rejected=False, relative_error=1e-9)
    summary = summarise(design, records)
    assert (summary["negative_control_rejected"], summary["control"]["relative_error"]) == (False, 1e-9)


def test_empty_journal_is_summarised() -> None:
    summary = summarise(make_design(), [])
    assert summary["complete"] is False and summary["negative_control_rejected"] is None
    assert all(not arm["verified"] and arm["memory_bytes"] is None for arm in summary["arms"])
    json.dumps(summary, allow_nan=False)


# --- by simulation ---------------------------------------------------------------------------------------------------


def coverage(launches: int, blocks: int, *, launch_sd: float, drift: float = 0.0, runs: int = 2000) -> float:
    """Share of simulated comparisons whose interval holds the true ratio 1.02.

    Both arms share the drift of the machine, as they run in the same block; each launch favours one of them at random.
    """
    rng = random.Random(f"{launches} {blocks} {launch_sd} {drift}")
    hits = 0
    for _ in range(runs):
        a, b = {}, {}
        for index in range(launches):
            effect = rng.gauss(0, launch_sd)
            for number in range(blocks):
                common = 1 + drift * number / blocks
                key = BlockKey(index, number)
                a[key] = common * math.exp(rng.gauss(0, 0.01))
                b[key] = common * 1.02 * math.exp(effect + rng.gauss(0, 0.01))
        low, high = (stats.throughput_ratio(a, b) or pytest.fail()).ci95 or (0, 0)
        hits += low <= 1.02 <= high
    return hits / runs


@pytest.mark.parametrize(("launches", "launch_sd", "drift"), [(5, 0.0, 0.0), (5, 0.02, 0.0), (10, 0.02, 0.3)])
def test_interval_over_launches_covers(launches: int, launch_sd: float, drift: float) -> None:
    # 2000 runs: the SD of the share is 0.5 %, so the nominal 95 % lies within 93 to 97 % by four SDs
    assert 0.93 <= coverage(launches, 4, launch_sd=launch_sd, drift=drift) <= 0.97


def test_interval_over_independent_blocks_is_wider_than_it_need_be() -> None:
    """Eight blocks cannot show that they are independent, so their interval allows for dependence."""
    assert coverage(1, 8, launch_sd=0.0, drift=0.3, runs=500) >= 0.97


def test_interval_over_blocks_is_blind_to_launch_effects() -> None:
    """Why fewer than five launches carry a label and a warning: the interval misses far more often than it says."""
    assert coverage(1, 40, launch_sd=0.02, runs=300) < 0.5


# --- imports ---------------------------------------------------------------------------------------------------------

LOADS = "import sys; import {module}; sys.exit('torch' in sys.modules)"


def test_statistics_do_not_load_torch() -> None:
    use = "headgrid.experiment.stats; headgrid.experiment.stats.t_interval([1, 2])"
    assert subprocess.run([sys.executable, "-c", LOADS.format(module=use)], timeout=120).returncode == 0


def test_that_check_can_fail() -> None:
    stand_in = "types; sys.modules['torch'] = types.ModuleType('torch')"
    assert subprocess.run([sys.executable, "-c", LOADS.format(module=stand_in)], timeout=120).returncode == 1
