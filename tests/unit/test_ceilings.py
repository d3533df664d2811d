"""Shares of ceilings against arithmetic on paper; nothing is called a share without a ceiling that is named."""

import dataclasses
from typing import Any

import calibrated
import pytest

from headgrid.errors import InvalidInput
from headgrid.experiment.ceilings import measured_ceilings, summarise_ceilings, unsettled
from headgrid.experiment.design import Protocol, declare, from_dict
from headgrid.experiment.telemetry import Session, Telemetry
from headgrid.experiment.text import Text
from headgrid.report import ceilings as report
from headgrid.report import conditions
from headgrid.spec.model import find_model
from headgrid.spec.workload import Workload

BATCH, SEQ, STEPS = 128, 10_000, 32
TOKENS = BATCH * SEQ
PRODUCTS = 16 * 2 * (4 * 4096**2 + 2 * 4096 * 16_384) * TOKENS
ATTENTION = 16 * BATCH * (SEQ**2 / 2) * 4 * 32 * 128


def figure(mean: float) -> dict[str, Any]:
    return {"mean": mean, "sd": mean / 100, "ci95": [mean * 0.99, mean * 1.01], "n": 5, "unit": "launch"}


def arm(layout: str, prefill: float | None = 300_000.0, tpot_s: float = 0.021) -> dict[str, Any]:
    rates = {"prefill_tokens_per_s": figure(prefill), "decode_tokens_per_s": figure(BATCH / tpot_s)} if prefill else {}
    return {"label": layout, "layout": layout, "role": "arm", "fp8": None} | {
        key: rates.get(key) for key in ("prefill_tokens_per_s", "decode_tokens_per_s")
    }


def design(calibration: Any = None, **changes: Any) -> dict[str, Any]:
    work = Workload(batch=BATCH, seq=SEQ, decode_steps=STEPS, dtype="float16")
    declared = {"model": find_model("seed").to_dict(), "workload": dataclasses.asdict(work), "device": "cuda"}
    declared |= {"calibration": calibration.to_dict()} if calibration else {}
    return declared | changes


def launched(name: str = "NVIDIA H200") -> list[dict[str, Any]]:
    return [{"kind": "launch", "launch": 0, "time_s": 0.0, "device_names": [name] * 4}]


def shares(found: dict[str, Any] | None) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    assert found is not None
    return {(row["label"], row["phase"], row["kind"], row["of"]): row for row in found["shares"]}


def test_shares_of_measured_ceilings_on_paper() -> None:
    rows = shares(summarise_ceilings(design(calibrated.h200()), launched(), [arm("n2m2:batch")]))
    seconds = TOKENS / 300_000
    mfu = rows["n2m2:batch", "prefill", "mfu", "measured"]["share"]
    assert mfu["mean"] == pytest.approx((PRODUCTS + ATTENTION) / (4 * 685e12) / seconds, rel=1e-3)
    floor = rows["n2m2:batch", "prefill", "floor", "measured"]
    assert floor["share"]["mean"] == pytest.approx((PRODUCTS / 685e12 + ATTENTION / 525e12) / 4 / seconds, rel=1e-3)
    read = 6.44e9 / 4 + 2 * 16 * BATCH * (SEQ + (STEPS + 1) / 2) * 4096 * 2 / 4
    step = rows["n2m2:batch", "decode", "bytes", "measured"]
    assert step["least_s"] == pytest.approx(read / 4.24e12, rel=1e-3)
    assert step["share"]["mean"] == pytest.approx(read / 4.24e12 / 0.021, rel=1e-3)
    for share, low, high in ((mfu, 0.99, 1.01), (step["share"], 0.99, 1.01)):
        assert share["ci95"] == pytest.approx([share["mean"] * low, share["mean"] * high])
        assert share["sd"] == pytest.approx(share["mean"] / 100)
    sheet = rows["n2m2:batch", "prefill", "mfu", "data sheet"]["share"]
    assert sheet["mean"] == pytest.approx(mfu["mean"] * 685 / 989.4)
    assert ("n2m2:batch", "prefill", "floor", "data sheet") not in rows


def test_the_floor_of_the_seeds_workload_is_the_measured_one() -> None:
    """4.03 TFLOP / 665 and 0.82 / 525 TFLOP/s per layer and sequence: 81 800 tokens/s of a GPU."""
    products = [calibrated.kernel("float16", (8192, 4096, 16_384), calibrated.figure(665e12))]
    rows = shares(summarise_ceilings(design(calibrated.h200(products=products)), launched(), [arm("dp4")]))
    assert TOKENS / 4 / rows["dp4", "prefill", "floor", "measured"]["least_s"] == pytest.approx(81_800, rel=0.01)


def test_products_in_fp8_have_a_ceiling_of_their_own() -> None:
    arms = [arm("n1m4:batch"), arm("n1m4:batch+fp8")]
    rows = shares(summarise_ceilings(design(calibrated.h200()), launched(), arms))
    wide, narrow = (rows[one["label"], "prefill", "mfu", "measured"] for one in arms)
    assert narrow["at"] == {"products of float8": 1230e12, "products of float16": 685e12}
    expected = (PRODUCTS / 1230e12 + ATTENTION / 685e12) / ((PRODUCTS + ATTENTION) / 685e12)
    assert narrow["least_s"] / wide["least_s"] == pytest.approx(expected, rel=1e-3)


def test_without_a_calibration_a_gpu_has_its_data_sheet_and_a_cpu_nothing() -> None:
    rows = shares(summarise_ceilings(design(), launched(), [arm("tp4")]))
    assert {key[3] for key in rows} == {"data sheet"} and len(rows) == 2
    assert summarise_ceilings(design(), launched("Some GPU"), [arm("tp4")]) is None
    assert summarise_ceilings(design(device="cpu"), launched("cpu"), [arm("tp4")]) is None
    assert summarise_ceilings(design(), [*launched(), *launched("NVIDIA H100 80GB HBM3")], [arm("tp4")]) is None
    assert summarise_ceilings(design(model={"name": "of another version"}), launched(), [arm("tp4")]) is None


def test_an_arm_that_shows_no_times_shows_no_shares() -> None:
    rows = shares(summarise_ceilings(design(calibrated.h200()), launched(), [arm("tp4", prefill=None)]))
    assert rows and all(row["share"] is None and row["why"] is None for row in rows.values())


def test_what_fits_a_cache_is_no_share_of_memory_bandwidth() -> None:
    work = dataclasses.asdict(Workload(batch=2, seq=8, decode_steps=2))
    small = design(calibrated.cpu(4), device="cpu", workload=work, model=find_model("tiny").to_dict())
    rows = shares(summarise_ceilings(small, launched("cpu"), [arm("tp4")]))
    cached = rows["tp4", "decode", "bytes", "measured"]
    assert cached["share"] is None and "MiB of cache" in cached["why"]
    assert rows["tp4", "prefill", "mfu", "measured"]["share"]["mean"] > 0
    tiny_cache = small | {"calibration": calibrated.cpu(4, cache_bytes=None).to_dict()}
    rows = shares(summarise_ceilings(tiny_cache, launched("cpu"), [arm("tp4")]))
    assert rows["tp4", "decode", "bytes", "measured"]["share"] is not None


def test_ceilings_that_still_drifted_are_a_warning() -> None:
    drifting = calibrated.h200(copy_bytes_per_s=calibrated.figure(4e12, settled=False))
    found = summarise_ceilings(design(drifting), launched(), [arm("tp4")])
    (warning,) = unsettled(found)
    assert "copying" in warning and unsettled(None) == []
    assert unsettled(summarise_ceilings(design(calibrated.h200()), launched(), [arm("tp4")])) == []


def test_the_table_names_what_its_shares_are_of() -> None:
    arms = [arm("tp4"), arm("tp4") | {"label": "tp4 (A/A)", "role": "aa"}, arm("dp4", prefill=None)]
    summary = {"arms": arms, "ceilings": summarise_ceilings(design(calibrated.h200()), launched(), arms)}
    table = report.table(summary)
    assert table is not None and [row[0].text for row in table.rows] == ["tp4", "dp4"]
    assert [title.split()[-1] for title in table.head[1:]] == ["products", "sheet", "attention", "copying", "sheet"]
    share = shares(summary["ceilings"])["tp4", "decode", "bytes", "measured"]["share"]
    assert table.rows[0][4].text == f"{share['mean']:.3f} [{share['ci95'][0]:.3f}, {share['ci95'][1]:.3f}]"
    assert {cell.text for cell in table.rows[1][1:]} == {"not measured"}
    assert "nothing reaches it" in table.note and calibrated.h200().to_dict()["sha256"][:12] in table.note
    assert report.table({"arms": arms}) is None and report.table({"arms": arms, "ceilings": None}) is None
    without = report.table({"arms": arms, "ceilings": summarise_ceilings(design(), launched(), arms)})
    assert without is not None and "no measured ceiling" in without.note and len(without.head) == 3


def test_the_page_says_which_of_telemetrys_ceilings_were_measured() -> None:
    row = {"label": "DRAM bandwidth in use", "unit": "%", "mean": 80.0, "sd": 1.0, "max": 82.0, "n": 9, "derived": None}
    row |= {"counter": "dram_bandwidth_percent", "ceiling": 90.0, "share_of_ceiling": 80 / 90}
    texts = []
    for measured in (True, False):
        phases = {"prefill": [], "decode": [row | {"ceiling_measured": measured}]}
        found = {"arms": [{"label": "tp4", "phases": phases}], "missing": [], "hz": 10}
        (cells,) = conditions.telemetry({"telemetry": found}, "decode").rows
        texts.append([cell.text for cell in cells])
    assert "(of measured 90.0%)" in texts[0][0] and "89" in texts[0][1]
    assert "(of" not in texts[1][0] and "89" not in texts[1][1]  # of the data sheet's peak, as the counter itself says


def test_a_design_keeps_its_calibration_and_has_another_hash_with_it() -> None:
    work = Workload(batch=4, seq=16, decode_steps=2)
    plans = [
        declare(
            model=find_model("tiny"), workload=work, arms=("tp4", "n2m2:batch"), ranks=4, device="cpu",
            text=Text("some", "0" * 64), protocol=Protocol(), calibration=calibration,
        )
        for calibration in (None, calibrated.cpu(4), calibrated.cpu(4, seconds=2.0))
    ]  # fmt: skip
    flat = [plan.to_dict() for plan in plans]
    assert len({each["hash"] for each in flat}) == 3 and "calibration" not in flat[0]
    assert [from_dict(each).calibration for each in flat] == [plan.calibration for plan in plans]
    flat[1]["calibration"]["copy_bytes_per_s"]["median"] *= 0.5
    with pytest.raises(InvalidInput, match="hash"):
        from_dict(flat[1])


def test_telemetrys_ceilings_are_the_calibrations_where_it_has_them() -> None:
    gpus = [{"index": 0, "name": "NVIDIA H200"}, {"index": 1, "name": "NVIDIA H200"}]
    telemetry = Telemetry((Session({"gpus": gpus}, (), ()),))
    found = measured_ceilings(design(calibrated.h200()), telemetry, {0, 1})
    assert found["dram_bandwidth_percent"] == pytest.approx(100 * 4.3 / 4.8)
    assert found["read_bytes_per_s"] == 4.3e12
    assert found["nvlink_tx_bytes_per_s"] == found["sent_bytes_per_s"] == calibrated.h200().link_bytes_per_s
    assert measured_ceilings(design(), telemetry, {0, 1}) == {}
    edited = design(calibrated.h200())
    edited["calibration"]["ranks"] = 8
    assert measured_ceilings(edited, telemetry, {0, 1}) == {} and summarise_ceilings(edited, launched(), []) is None
    unknown = Telemetry((Session({"gpus": [{"index": 0, "name": "Some GPU"}]}, (), ()),))
    assert "dram_bandwidth_percent" not in measured_ceilings(design(calibrated.h200()), unknown, {0})
