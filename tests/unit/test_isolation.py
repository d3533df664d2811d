"""Every contamination code fires where it was injected, and none fires on a clean run."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from telemetry_fixture import HZ, PIDS, UUIDS, Run

from headgrid.experiment.isolation import CHECKS, CODES, judge, sentences, verdict_of
from headgrid.experiment.isolation_run import autocorrelation, mann_kendall

HERE = ("n2m2:batch", 3)
Judged = dict[str, Any]


def judged(run: Run) -> Judged:
    return judge(run.design, run.records, run.telemetry)


def found(isolation: Judged) -> dict[str, str]:
    return {row["code"]: row["severity"] for row in reversed(isolation["findings"])}  # the gravest of each code


def codes_of(isolation: Judged, arm: str, block: int) -> list[str]:
    rows = [row["codes"] for row in isolation["flagged"] if (row["arm"], row["block"]) == (arm, block)]
    return rows[0] if rows else []


# --- one injection for each code: (how, severity, whether it is this block's own) ------------------------------------


def bits(mask: int) -> Callable[[Run], None]:
    return lambda run: run.gpu(run.block(), "throttle_reasons", mask | 4)


def rises(place: str, counter: str, by: float, key: int | None = 1) -> Callable[[Run], None]:
    return lambda run: run.rise(place, counter, by, key)


def foreign_process(run: Run) -> None:
    next(s for s in run.during(run.block()) if "gpu_processes" in s)["gpu_processes"][2].append(
        {"pid": 4242, "used_bytes": 2**30, "own": False}
    )


def memory_taken(run: Run) -> None:
    run.lines[1]["gpu"]["memory_used_bytes"] = [0, 0, 3 * 2**30, 0]


def slower_arm(run: Run) -> None:
    """One arm at a lower clock, without a power cap that would explain it."""
    for block in [r for r in run.records if r["kind"] == "block" and r["arm"] == "n2m2:batch"]:
        for gpu in range(4):
            run.gpu(block, "sm_clock_mhz", 1500, gpu)
            run.gpu(block, "throttle_reasons", 0, gpu)


def over_blocks(counter: str, value: Callable[[int], float]) -> Callable[[Run], None]:
    def inject(run: Run) -> None:
        for block in [r for r in run.records if r["kind"] == "block"]:
            run.gpu(block, counter, value(block["block"]))

    return inject


def event(kind: str, **values: Any) -> Callable[[Run], None]:
    return lambda run: run.lines.append({"kind": kind, "time_s": run.block()["prefill_start_s"] + 1, **values})


def row(**values: Any) -> Callable[[Run], None]:
    return lambda run: run.lines[0]["gpus"][3].update(values)


def foreign_load(run: Run) -> None:
    """Another process computes 3 of 8 cores during the block."""
    start_s, grown = run.block()["prefill_start_s"], 3 * 0.1 / 8

    def change(sample: dict) -> None:
        seconds = min(4.0, sample["time_s"] - start_s)
        sample["host"]["cpu_busy_s"] = [v + grown * 10 * seconds for v in sample["host"]["cpu_busy_s"]]

    run.since(start_s, change)


def low_memory(run: Run) -> None:
    for sample in run.during(run.block()):
        sample["host"]["memory_available_bytes"] = 2**30


def preempted(run: Run) -> None:
    start_s = run.block()["prefill_start_s"]

    def change(sample: dict) -> None:
        if "process" in sample:
            extra = 400 * min(4.0, sample["time_s"] - start_s)
            counts = sample["process"]["involuntary_switches"]
            sample["process"]["involuntary_switches"] = [*counts[:-1], counts[-1] + extra]

    run.since(start_s, change)


def silent(run: Run) -> None:
    gone = [id(sample) for sample in run.during(run.block())[5:25]]
    run.lines = [line for line in run.lines if id(line) not in gone]


def clock_step(run: Run) -> None:
    """The wall clock is set back by 0.2 s in the middle of the block, for telemetry and journal alike."""
    at_s = run.block()["prefill_start_s"] + 1.5
    run.since(at_s, lambda sample: sample.update(time_s=sample["time_s"] - 0.2))


def lagging(run: Run) -> None:
    run.block()["prefill_s"] = [2.5, 2.5, 2.6, 3.0]


def blocks_of(run: Run, arm: str) -> list[dict]:
    return [r for r in run.records if r["kind"] == "block" and r["arm"] == arm and not r["warmup"]]


def scale(record: dict, factor: float) -> None:
    for phase in ("prefill", "decode"):
        record[f"{phase}_s"] = [seconds * factor for seconds in record[f"{phase}_s"]]


def drift(run: Run) -> None:
    for number, block in enumerate(blocks_of(run, "n2m2:batch")):
        scale(block, 1 + 0.01 * number)


def waves(run: Run) -> None:
    for number, block in enumerate(blocks_of(run, "n2m2:batch")):
        scale(block, 1.05 if number // 6 % 2 else 0.95)


def disturbed(run: Run) -> None:
    """The matrix product before the block takes 15 % longer on one rank."""
    times = run.block()["sentinels"]["gemm_s"]
    times[2] *= 1.15


def cold(run: Run) -> None:
    for arm in run.design["arms"]:
        scale(blocks_of(run, arm["label"])[0], 1.2)


INJECTIONS: dict[str, tuple[Callable[[Run], None], str, bool]] = {
    "GPU_THERMAL_SLOWDOWN": (bits(0x40), "INVALID", True),
    "GPU_POWER_BRAKE": (bits(0x80), "INVALID", True),
    "GPU_HW_SLOWDOWN": (bits(0x8), "INVALID", True),
    "GPU_SYNC_BOOST": (bits(0x10), "SUSPECT", True),
    "GPU_POWER_CAP": (bits(0x4), "INFO", False),
    "GPU_FOREIGN_PROCESS": (foreign_process, "INVALID", True),
    "GPU_MEMORY_TAKEN": (memory_taken, "SUSPECT", False),
    "GPU_CLOCK_DROP": (lambda run: run.gpu(run.block(), "sm_clock_mhz", 1400), "SUSPECT", True),
    "GPU_CLOCKS_DIFFER": (slower_arm, "SUSPECT", False),
    "GPU_CLOCKS_UNSETTLED": (over_blocks("sm_clock_mhz", lambda block: 1755 + 18 * block), "SUSPECT", False),
    "GPU_TEMPERATURE_DRIFT": (over_blocks("temperature_c", lambda block: 40 + 4 * block), "SUSPECT", False),
    "GPU_XID": (event("xid", gpu=UUIDS[2], xid=79), "INVALID", False),
    "GPU_LOST": (event("lost", gpu_index=2), "INVALID", False),
    "GPU_MIXED": (row(ecc=False), "SUSPECT", False),
    "GPU_POWER_LIMITS_DIFFER": (row(power_limit_w=500.0), "SUSPECT", False),
    "GPU_MIG": (row(mig=True), "SUSPECT", False),
    "GPU_ECC_CORRECTED": (rises("gpu", "ecc_corrected", 1), "SUSPECT", True),
    "GPU_ECC_UNCORRECTED": (rises("gpu", "ecc_uncorrected", 1), "INVALID", True),
    "NVLINK_REPLAYS": (rises("gpu", "nvlink_replays", 5), "SUSPECT", True),
    "NVLINK_CRC_ERRORS": (rises("gpu", "nvlink_crc_errors", 5), "SUSPECT", True),
    "NVLINK_RECOVERIES": (rises("gpu", "nvlink_recoveries", 1), "INVALID", True),
    "PCIE_REPLAYS": (rises("gpu", "pcie_replays", 1), "SUSPECT", True),
    "CPU_FOREIGN_LOAD": (foreign_load, "INVALID", True),
    "CPU_STEAL": (rises("host", "cpu_steal_s", 0.9, None), "INVALID", True),
    "CPU_QUOTA_THROTTLED": (rises("host", "quota_throttled_s", 0.2, None), "INVALID", True),
    "MEMORY_LOW": (low_memory, "SUSPECT", True),
    "MEMORY_STALLED": (rises("host", "memory_stall_s", 0.5, None), "INVALID", True),
    "PAGED_OUT": (rises("host", "swapped_out_bytes", 2**20, None), "SUSPECT", True),
    "PAGED_IN": (rises("host", "swapped_in_bytes", 2**20, None), "SUSPECT", True),
    "RANK_PREEMPTED": (preempted, "SUSPECT", True),
    "TELEMETRY_GAP": (silent, "SUSPECT", True),
    "CLOCK_STEP": (clock_step, "SUSPECT", True),
    "RANK_SKEW": (lagging, "SUSPECT", True),
    "DRIFT": (drift, "SUSPECT", False),
    "AUTOCORRELATED": (waves, "SUSPECT", False),
    "SLOW_FIRST_BLOCK": (cold, "SUSPECT", False),
    "NOT_STEADY": (cold, "SUSPECT", False),
    "SENTINEL": (disturbed, "SUSPECT", True),
}
FORMER = {"SLOW_FIRST_BLOCK"}
"""Codes that only runs of the former analysis have."""
ALSO = {"GPU_MIG": {"GPU_MIXED"}}
"""What an injection brings with it by its nature."""
BLOCKS = {"DRIFT": 12, "AUTOCORRELATED": 36, "GPU_CLOCKS_UNSETTLED": 9, "GPU_TEMPERATURE_DRIFT": 9}


def test_there_is_an_injection_for_every_code() -> None:
    assert set(INJECTIONS) == set(CODES) and len(CODES) >= 15


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_clean_run_is_clean(device: str) -> None:
    isolation = judged(Run(device))
    assert isolation["verdict"] == "CLEAN" and isolation["flagged"] == []
    assert isolation["blocks"] == {"CLEAN": 18, "SUSPECT": 0, "INVALID": 0}
    assert found(isolation) == ({"GPU_POWER_CAP": "INFO"} if device == "cuda" else {})
    assert sentences(isolation) == []
    unchecked = {row["code"] for row in isolation["unchecked"]}
    gpu_codes = {code for check in CHECKS if check.device == "cuda" for code in check.codes}
    assert unchecked == (set() if device == "cuda" else gpu_codes)
    assert set(isolation["checked"]) | unchecked == set(CODES) - FORMER


@pytest.mark.parametrize("code", INJECTIONS)
def test_each_code_fires_where_it_was_injected_and_no_other_does(code: str) -> None:
    inject, severity, own_block = INJECTIONS[code]
    run = Run(blocks=BLOCKS.get(code, 6), analysis=1 if code in FORMER else 2)
    assert code == "GPU_POWER_CAP" or code not in found(judged(run))  # the negative control: before, it is silent
    inject(run)
    isolation = judged(run)
    assert found(isolation)[code] == severity
    assert set(found(isolation)) - {code, "GPU_POWER_CAP"} == ALSO.get(code, set())
    if severity == "INFO":
        assert isolation["verdict"] == "CLEAN"
        return
    assert code in codes_of(isolation, *HERE) or not own_block
    assert verdict_of(isolation, "n2m2:batch", "prefill") != "CLEAN"
    assert any(text.startswith(f"{code}, {severity.lower()}") for text in sentences(isolation))
    if own_block:  # slow counters tell only to two seconds, so a neighbour may share the blame; not the whole run
        assert isolation["blocks"]["CLEAN"] >= 14


def test_random_contaminations_are_never_called_clean(budget: Callable[[int, int], int]) -> None:
    draw = random.Random(7)
    local = [code for code, (_, severity, own) in INJECTIONS.items() if own and severity != "INFO"]
    for number in range(budget(40, 200)):
        run = Run(seed=number, blocks=5)
        arm, block = draw.choice(["tp2pp2", "tp2pp2 (A/A)", "n2m2:batch"]), draw.randrange(5)
        record = run.block(block, arm)
        run.block = lambda *_, record=record: record  # type: ignore[method-assign]
        code = draw.choice(local)
        INJECTIONS[code][0](run)
        assert code in codes_of(judged(run), arm, block), (number, code, arm, block)


def test_false_alarms_are_rare_on_clean_runs(budget: Callable[[int, int], int]) -> None:
    runs = budget(20, 1000)
    alarmed = [seed for seed in range(runs) if judged(Run(seed=seed, blocks=12))["flagged"]]
    assert len(alarmed) <= max(1, 0.02 * runs), alarmed  # at most 1 % is the aim; 2 % leaves room for chance


def test_without_telemetry_only_the_journal_is_judged_and_that_is_said() -> None:
    run = Run()
    lagging(run)
    isolation = judge(run.design, run.records, None)
    assert found(isolation) == {"RANK_SKEW": "SUSPECT"}
    assert set(isolation["checked"]) == {"RANK_SKEW", "DRIFT", "AUTOCORRELATED", "NOT_STEADY", "SENTINEL"}
    assert {row["why"] for row in isolation["unchecked"]} == {"no telemetry was sampled"}


def test_a_missing_counter_makes_its_code_unchecked_with_the_reason() -> None:
    run = Run()
    run.lines[0]["missing"] = {"throttle_reasons": "GPU 0: Not Supported"}
    bits(0x40)(run)
    isolation = judged(run)
    reasons = {row["code"]: row["why"] for row in isolation["unchecked"]}
    assert reasons["GPU_THERMAL_SLOWDOWN"] == "throttle_reasons: GPU 0: Not Supported"
    assert "GPU_THERMAL_SLOWDOWN" not in found(isolation)


def test_blocks_of_an_old_journal_without_start_times_are_not_called_checked() -> None:
    run = Run()
    for record in run.records:
        record.pop("prefill_start_s", None), record.pop("decode_start_s", None)
    assert {row["why"] for row in judged(run)["unchecked"]} == {"the journal's blocks have no start times"}


def test_a_gpu_that_no_rank_used_contaminates_nothing() -> None:
    run = Run()
    for record in run.records:
        if record["kind"] == "launch":
            record["device_uuids"] = UUIDS[:1] * 4
    bits(0x40)(run)
    row(ecc=False)(run)
    assert "GPU_THERMAL_SLOWDOWN" not in found(judged(run)) and "GPU_MIXED" not in found(judged(run))


def test_a_gpu_run_whose_gpus_could_not_be_sampled_is_not_called_checked() -> None:
    run = Run()
    run.lines[0]["gpus"] = []
    reasons = {row["code"]: row["why"] for row in judged(run)["unchecked"]}
    assert {code for check in CHECKS if check.device == "cuda" for code in check.codes} == set(reasons)
    assert set(reasons.values()) == {"no GPU could be sampled"}


def test_process_ids_of_another_namespace_are_counted_not_compared() -> None:
    run = Run()
    samples = [s for s in run.lines if s.get("gpu_processes")]
    for sample in samples:
        sample["gpu_processes"] = [[{**p, "own": None} for p in rows] for rows in sample["gpu_processes"]]
    assert judged(run)["verdict"] == "CLEAN"
    for sample in samples:
        sample["gpu_processes"][0] += [{"pid": 7, "used_bytes": 1, "own": None}] * bool(sample["gpu_processes"][0])
    assert found(judged(run))["GPU_FOREIGN_PROCESS"] == "INVALID"


def test_a_sampler_that_ended_early_leaves_later_blocks_suspect() -> None:
    run = Run()
    cut_s = run.block(4, "tp2pp2")["prefill_start_s"]
    run.lines = [line for line in run.lines if line["time_s"] < cut_s]
    isolation = judged(run)
    assert codes_of(isolation, "tp2pp2", 5) == ["TELEMETRY_GAP"]
    assert codes_of(isolation, "tp2pp2", 1) == []


def test_blocks_from_before_the_first_sampler_are_suspect_and_later_ones_are_not() -> None:
    """A run begun with 0 samples a second and resumed with 10."""
    run = Run()
    begins_s = run.block(2, "tp2pp2")["prefill_start_s"]
    start, samples = run.lines[0], [line for line in run.lines[1:] if line["time_s"] >= begins_s - 2]
    start |= {key: samples[0][key] for key in ("time_s", "monotonic_s")}
    run.lines = [start, *samples]
    isolation = judged(run)
    assert set(found(isolation)) == {"TELEMETRY_GAP", "GPU_POWER_CAP"}
    assert codes_of(isolation, "tp2pp2", 1) == ["TELEMETRY_GAP"]
    assert [codes_of(isolation, "tp2pp2", block) for block in (2, 3, 4, 5)] == [[]] * 4


def test_a_sampler_may_be_silent_for_as_long_as_its_own_rate_allows() -> None:
    """Between two samplers of 10 and of 1 a second: the first one's silence counts."""
    run = Run()
    begins_s = run.block(3, "tp2pp2")["prefill_start_s"]
    cut_s = begins_s - 3.0  # the second sampler begins 3 s after the first one's last sample
    first = [line for line in run.lines if line["time_s"] < cut_s]
    rest = [line for line in run.lines if line["time_s"] >= begins_s]
    again = run.lines[0] | {key: rest[0][key] for key in ("time_s", "monotonic_s")}

    def verdicts(hz: float) -> set[str]:
        run.lines = [first[0] | {"hz": hz}, *first[1:], again, *rest]
        return set(found(judged(run))) - {"GPU_POWER_CAP"}

    assert verdicts(10.0) == {"TELEMETRY_GAP"}
    assert verdicts(1.0) == set()


def test_one_invalid_block_of_many_makes_a_figure_suspect_more_make_it_invalid() -> None:
    run = Run(blocks=24)
    bits(0x40)(run)
    assert verdict_of(judged(run), "n2m2:batch", "prefill") == "SUSPECT"
    assert verdict_of(judged(run), "n2m2:batch", "decode") == "CLEAN"
    for number in (5, 6):
        run.gpu(run.block(number), "throttle_reasons", 0x40)
    assert verdict_of(judged(run), "n2m2:batch", "prefill") == "INVALID"


def test_a_drift_that_all_arms_share_leaves_their_blocks_independent() -> None:
    run = Run(blocks=36)
    for arm in run.design["arms"]:
        for number, block in enumerate(blocks_of(run, arm["label"])):
            scale(block, 1 + 0.01 * number)
    assert "DRIFT" in found(judged(run)) and "AUTOCORRELATED" not in found(judged(run))


def test_ranks_that_share_cores_are_not_called_preempted() -> None:
    run = Run("cpu")
    run.lines[0]["host"]["cores"] = [0, 1]
    preempted(run)
    reasons = {row["code"]: row["why"] for row in judged(run)["unchecked"]}
    assert reasons["RANK_PREEMPTED"] == "4 ranks on 2 cores preempt each other anyway"


def test_statistics_by_hand() -> None:
    # S = 10 for 1..5: z = 9 / sqrt(5 * 4 * 15 / 18) = 2.2045
    assert mann_kendall([1, 2, 3, 4, 5]) == pytest.approx(9 / (5 * 4 * 15 / 18) ** 0.5)
    assert mann_kendall([5, 4, 3, 2, 1]) == -mann_kendall([1, 2, 3, 4, 5]) and mann_kendall([2, 2, 2]) == 0
    assert autocorrelation([1, -1, 1, -1]) == -0.75 and autocorrelation([3, 3]) == 0


def test_fixture_is_what_the_checks_expect() -> None:
    run = Run()
    assert HZ == run.lines[0]["hz"] and len(PIDS) == run.design["ranks"]
