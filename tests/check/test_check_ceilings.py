"""`check` holds a run against its calibration: beyond it only as far as measuring can miss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import calibrated
import honest_run
import pytest
import tamperings

from headgrid.experiment.check.ceilings import TOLERATED
from headgrid.experiment.check.check import check_run
from headgrid.experiment.check.finding import Verdict
from headgrid.layout.flops import model_attention_flops, model_flops
from headgrid.layout.layout import parse_layout
from headgrid.layout.reads import fullest


def checked(folder: Path) -> Verdict:
    return check_run(folder, source_sha256=honest_run.SOURCE)


def with_calibration(
    folder: Path, change: Callable[[tamperings.Documents], None] = lambda found: None, **own: Any
) -> Verdict:
    def declare(found: tamperings.Documents) -> None:
        found.design["calibration"] = calibrated.h200(**own).to_dict()
        change(found)

    tamperings.forge(folder, declare)
    return checked(folder)


def products(best: float, *, settled: bool = True) -> list[dict[str, Any]]:
    return [calibrated.kernel("float16", (8192, 4096, 16_384), calibrated.figure(best, settled=settled))]


def test_accepts_a_run_below_its_ceilings(run: Path) -> None:
    verdict = with_calibration(run)
    assert verdict.findings == () and verdict.notes == ()
    assert {"calibration", "measured_ceilings"} <= set(verdict.gates)


def test_a_prefill_may_beat_the_best_window_by_what_is_tolerated_and_no_more(run: Path) -> None:
    plan = honest_run.design()
    attention = model_attention_flops(plan.model, plan.workload)
    rate = model_flops(plan.model, plan.workload) / honest_run.PREFILL_S["dp4"] / 4
    assert attention and 5.5e14 < rate < 6.5e14
    slow = [calibrated.kernel("float16", (32, 10_000, 128), calibrated.figure(300e12))]
    verdict = with_calibration(run, products=products(rate / TOLERATED * 1.01), attention=slow)
    assert verdict.findings == ()
    verdict = with_calibration(run, products=products(rate / TOLERATED * 0.98), attention=slow)
    assert verdict.reasons == ("ceiling.prefill",)
    assert [finding.where for finding in verdict.findings] == ["dp4"]


def test_a_decode_step_may_not_read_faster_than_copying_or_reading(run: Path) -> None:
    plan = honest_run.design()
    fastest = max(
        (fullest(plan.model, layout, plan.workload).total_bytes - (60 << 20)) / (honest_run.DECODE_S[str(layout)] / 32)
        for layout in map(parse_layout, honest_run.DECODE_S)
    )
    for factor, reasons in ((1.01, ()), (0.98, ("ceiling.decode",))):
        memory = {name: calibrated.figure(fastest / TOLERATED * factor) for name in MEMORY}
        assert with_calibration(run, **memory).reasons == reasons
    memory["read_bytes_per_s"] = calibrated.figure(fastest * 1.01)  # reading alone may be faster than copying
    assert with_calibration(run, **memory).reasons == ()


MEMORY = ("copy_bytes_per_s", "read_bytes_per_s")


def test_ceilings_that_had_not_settled_bound_nothing_and_say_so(run: Path) -> None:
    memory = {name: calibrated.figure(1e12, settled=False) for name in MEMORY}
    verdict = with_calibration(run, products=products(1e14, settled=False), **memory)
    assert verdict.findings == () and sum("had not settled" in note for note in verdict.notes) == 2


def faster_product(found: tamperings.Documents) -> None:
    found.design["calibration"]["products"][0]["flop_per_s"]["median"] *= 1.001


def test_a_calibration_that_was_edited_is_found(run: Path) -> None:
    verdict = with_calibration(run, faster_product)
    assert "calibration.content" in verdict.reasons


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"device_name": "NVIDIA H100 80GB HBM3"}, "calibration.device"),
        ({"device": "cpu"}, "calibration.device"),
        ({"collectives": [calibrated.cost("send", 2) | {"alpha_s": 1e-6}]}, "calibration.fit"),
        ({"collectives": [calibrated.cost("send", 2) | {"beta_bytes_per_s": 4e11}]}, "calibration.fit"),
        ({"collectives": [calibrated.cost("send", 2) | {"rms_relative_error": 1e-3}]}, "calibration.fit"),
    ],
)
def test_calibrations_of_other_devices_and_other_lines_are_found(run: Path, own: Any, reason: str) -> None:
    assert with_calibration(run, **own).reasons == (reason,)


def test_a_share_that_was_improved_is_found(run: Path) -> None:
    with_calibration(run)
    tamperings.document("summary.json", lambda s: s["ceilings"]["shares"][0]["share"].update(mean=0.97))(run)
    assert checked(run).reasons == ("summary.figures",)
    with_calibration(run)
    tamperings.document("summary.json", lambda s: s.pop("ceilings"))(run)
    assert checked(run).reasons == ("summary.figures",)
