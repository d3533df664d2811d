"""The physics gate: it rejects the seed experiment's table, and of a sound claim each single falsehood."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headgrid.errors import InvalidInput
from headgrid.experiment.check import physics
from headgrid.experiment.check.check import check_file
from headgrid.experiment.check.result import read_result
from headgrid.spec.hardware import find_hardware, known_hardware
from headgrid.spec.model import find_model
from headgrid.spec.workload import Workload

SEED = Path(__file__).parent / "seed_experiment.json"

SOUND: dict[str, Any] = {
    "hardware": {"device": "h200", "devices": 4},
    "model": "seed",
    "workload": {"batch": 128, "seq": 10_000, "dtype": "float16"},
    "arms": [
        {
            "label": label,
            "metrics": {
                "prefill_tokens_per_s": {"mean": rate, "sd": 1000.0, "ci95": [rate - 1240, rate + 1240], "n": 5},
                "decode_tokens_per_s": 128 / tpot,
                "tpot_s": {"mean": tpot, "sd": 1e-5, "ci95": [tpot - 1.24e-5, tpot + 1.24e-5], "n": 5},
                "ttft_s": 0.2,
                "parameters_bytes": 1.7e9,
                "kv_cache_bytes": 84.2e9,
                "activations_bytes": 0.5e9,
                "total_memory_bytes": 4 * 86.4e9,
                "gpu_utilization": 0.99,
                "memory_bytes_per_s": 4.2e12,
                "communication_s": 0.002,
            },
            "communication": [
                {"collective": "all-reduce", "per": "layer", "time_s": 0.000125, "bytes_per_rank": 1_572_864}
            ],
        }
        for label, rate, tpot in (("tp2pp2", 250_000.0, 0.0216), ("dp4", 304_000.0, 0.02139))
    ],
    "comparisons": [
        {
            "a": "dp4",
            "b": "tp2pp2",
            "metric": "prefill_tokens_per_s",
            "ratio": {"mean": 1.216, "ci95": [1.211, 1.221]},
            "p_value": 0.001,
            "cohens_d": 54.0,
            "n": 5,
            "unit": "launch",
        }
    ],
}

Edit = Callable[[dict[str, Any], dict[str, Any]], Any]


def metric(**values: Any) -> Edit:
    return lambda document, arm: arm["metrics"].update(values)


def without(*names: str) -> Edit:
    return lambda document, arm: [arm["metrics"].pop(name) for name in names]


def compared(**values: Any) -> Edit:
    return lambda document, arm: document["comparisons"][0].update(values)


FALSE: dict[str, tuple[Edit, str]] = {
    "faster than the devices' peak": (metric(prefill_tokens_per_s=520_000), "roofline.prefill"),
    "faster than was ever measured": (metric(prefill_tokens_per_s=425_000), "roofline.prefill"),
    "a first token before it can be": (metric(ttft_s=0.015), "roofline.prefill"),
    "decode above the memory's bandwidth": (metric(tpot_s=0.016, decode_tokens_per_s=8000), "roofline.decode"),
    "decode above the stated bandwidth": (metric(memory_bytes_per_s=2.0e12), "roofline.bandwidth"),
    "Little's law": (metric(decode_tokens_per_s=8000), "little"),
    "throughput without its phase": (metric(tokens_per_s=5900), "phase"),
    "more parameters than there are": (metric(parameters_bytes=45e9), "memory.parameters"),
    "fewer parameters than there are": (metric(parameters_bytes=0.3e9), "memory.parameters"),
    "a cache that does not hold the prompts": (metric(kv_cache_bytes=40e9), "memory.kv_cache"),
    "more memory than a device has": (metric(activations_bytes=90e9), "memory.capacity"),
    "a total of something else": (metric(total_memory_bytes=9e9), "memory.total"),
    "a device more than busy": (metric(gpu_utilization=1.04), "utilization"),
    "bandwidth above its peak": (metric(memory_bytes_per_s=5.2e12), "utilization"),
    "operations above their peak": (metric(flop_per_s=1.2e15), "utilization"),
    "a negative time": (metric(ttft_s=-0.2), "range"),
    "communication that fills the step": (metric(communication_s=0.0217), "communication.share"),
    "communication that does not add up": (metric(communication_s=0.0125), "communication.sum"),
    "bytes faster than the link": (
        lambda document, arm: arm["communication"][0].update(bytes_per_rank=1_572_864_000),
        "communication.link",
    ),
    "an interval beside its mean": (metric(ttft_s={"mean": 0.2, "ci95": [0.21, 0.22]}), "interval"),
    "an interval that its SD does not give": (
        metric(tpot_s={"mean": 0.0216, "sd": 1e-3, "ci95": [0.02159, 0.02161], "n": 5}),
        "interval.sd",
    ),
    "a ratio of other figures": (compared(ratio={"mean": 1.317}), "ratio"),
    "a ratio narrower than its parts": (compared(ratio={"mean": 1.216, "ci95": [1.2159, 1.2161]}), "ratio.interval"),
    "an effect of other SDs": (compared(cohens_d=2.85), "statistics.effect"),
    "a probability above 1": (compared(p_value=1.2), "statistics.p"),
    "p against its interval": (compared(p_value=0.4), "statistics.p"),
    "p over iterations": (compared(unit="iteration"), "statistics.unit"),
}


def written(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps(document))
    return path


def test_rejects_the_seed_experiment_for_at_least_six_reasons() -> None:
    verdict = check_file(SEED)
    assert len(verdict.reasons) >= 6
    assert {"roofline.decode", "little", "memory.parameters", "memory.kv_cache", "memory.total", "ratio"} <= {
        *verdict.reasons
    }
    assert {"communication.sum", "statistics.effect", "statistics.unit"} <= {*verdict.reasons}
    numbers = {finding.gate: finding.what for finding in verdict.findings if finding.where == "baseline"}
    assert "420 sequences" in numbers["little"] and "45 GB" in numbers["memory.parameters"]


def test_accepts_a_sound_claim(tmp_path: Path) -> None:
    verdict = check_file(written(tmp_path, SOUND))
    assert verdict.findings == () and verdict.notes == ()


@pytest.mark.parametrize("name", FALSE)
def test_rejects_each_falsehood_by_its_name(tmp_path: Path, name: str) -> None:
    edit, reason = FALSE[name]
    document = copy.deepcopy(SOUND)
    edit(document, document["arms"][1])
    assert reason in check_file(written(tmp_path, document)).reasons


def test_every_gate_can_reject() -> None:
    assert set(physics.GATES) == {
        *("prefill_roofline", "decode_roofline", "little", "named_phase", "memory", "memory_totals", "shares"),
        *("communication", "intervals", "ratios", "effects"),
    }


def test_bounds_against_arithmetic_by_hand() -> None:
    """From measurement to formula without our layouts: 16 layers x (4 + 2 x 4) x 4096^2 weights, and so on."""
    model, workload = find_model("seed"), Workload(batch=128, seq=10_000, decode_steps=1, dtype="float16")
    weights = 16 * (4 * 4096**2 + 2 * 4096 * 16384)
    assert physics.linear_flops(model, workload) == 2 * weights * 1_280_000
    assert physics.kv_bytes(model, workload) == 2 * 16 * 32 * 128 * 2 * 1_280_000
    assert physics.step_bytes(model, workload) == weights + physics.kv_bytes(model, workload)
    arm = read_result(SEED).arms[0]
    attention = 128 * 16 * 2 * 4096 * 10_000**2  # causal: half of 4 L^2 D a layer and sequence
    least = (2 * weights * 1_280_000 + attention) / (16 * 989.4e12)
    assert physics.prefill_s(model, workload, find_hardware("h100-sxm"), arm) == pytest.approx(least, rel=1e-3)


def test_a_csv_file_says_the_same(tmp_path: Path) -> None:
    rows = [
        "arm,versus,metric,value,sd,ci95_low,ci95_high,n,p_value,cohens_d",
        ",,hardware.device,h100-sxm,,,,,,",
        ",,hardware.devices,16,,,,,,",
        *(f",,model.{k},{v},,,,,," for k, v in json.loads(SEED.read_text())["model"].items()),
        ",,workload.batch,128,,,,,,",
        ",,workload.seq,10000,,,,,,",
        "baseline,,tokens_per_s,1200000,,1195000,1205000,1000,,",
        "baseline,,tpot_s,0.00035,,0.00034,0.00036,1000,,",
        "proposed,,tokens_per_s,1580000,,1575000,1585000,1000,,",
        "proposed,,tpot_s,0.00022,,0.00021,0.00023,1000,,",
        "proposed,baseline,tokens_per_s,1.317,,,,,0.0001,2.85",
    ]
    path = tmp_path / "seed.csv"
    path.write_text("\n".join(rows) + "\n")
    assert {"roofline.decode", "little", "little.ratio", "phase", "statistics.effect"} == {*check_file(path).reasons}


def test_without_hardware_the_arithmetic_still_holds(tmp_path: Path) -> None:
    document = {key: value for key, value in json.loads(SEED.read_text()).items() if key != "model"}
    document["hardware"] = {"devices": 16}
    verdict = check_file(written(tmp_path, document))
    assert {"little", "ratio", "memory.total"} <= {*verdict.reasons} and len(verdict.notes) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hardware": {"device": "h300", "devices": 4}}, "h300"),
        ({"model": "sed"}, "sed"),
        ({"arms": []}, "arms"),
        ({"arm": []}, "arm, which the schema"),
        ({"arms": [{"label": "a", "devices": 2, "metrics": {"tps": 3}}]}, "tps"),
        ({"arms": [{"label": "a", "devices": 0, "metrics": {}}]}, "devices = 0"),
        ({"arms": [{"label": "a", "devices": 2, "metrics": {"tpot_s": "fast"}}]}, "no number"),
        ({"arms": [{"label": "a", "devices": 2, "metrics": {"tpot_s": {"mean": 1, "ci95": [1]}}}]}, "not a file"),
        ({"comparisons": [{"a": "x", "b": "dp4"}]}, "'x'"),
        ({"workload": {"batch": 1.5, "seq": 3}}, "batch"),
        ({"workload": {"batch": 1, "seq": 3, "dtype": "int3"}}, "int3"),
        ({"model": {"num_heads": 3}}, "not a file"),
    ],
)
def test_refuses_what_the_schema_does_not_have(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=r".") as refused:
        check_file(written(tmp_path, {**SOUND, **change}))
    assert words in refused.value.block()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"arms": NaN}', "3"])
def test_refuses_what_is_no_document(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(InvalidInput):
        check_file(path)


def test_hardware_figures_have_sources_and_hold_together() -> None:
    for name, device in known_hardware().items():
        assert device.source and find_hardware(device.names[0]) == device and device.name == name
        for dtype, rate in device.measured_matmul_flop_per_s.items():
            assert rate < device.flop_per_s(dtype) and device.measured_source
        assert (device.measured_memory_bytes_per_s or 0) < device.peak_memory_bytes_per_s
        assert 1e10 < device.memory_bytes < 1e12 and 1e11 < device.peak_link_bytes_per_s < 1e12
    with pytest.raises(InvalidInput, match="float7"):
        find_hardware("h200").flop_per_s("float7")
