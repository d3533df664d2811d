"""Lines through collectives' times, figures from windows, and the frozen value: recovered, bounded, refused."""

import dataclasses
import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import calibrated
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgrid.errors import InvalidInput
from headgrid.experiment.calibrate import ensure_fits, machine_of
from headgrid.experiment.calibrate_fit import fit_line, has_settled, measured
from headgrid.spec.calibration import Measured, from_dict, read_calibration

SIZES = calibrated.SIZES


# --- lines ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-7, 1e-2), st.floats(1e6, 1e12))
def test_a_line_is_recovered_where_the_sizes_resolve_both_of_its_figures(alpha: float, beta: float) -> None:
    times = [alpha + size / beta for size in SIZES]
    line = fit_line(SIZES, times)
    assert math.isclose(line.alpha_s, alpha, rel_tol=1e-6 * max(1, SIZES[0] / beta / alpha), abs_tol=1e-12)
    assert line.beta_bytes_per_s is not None
    assert math.isclose(line.beta_bytes_per_s, beta, rel_tol=1e-6 * max(1, alpha * beta / SIZES[-1]))
    assert line.worst_relative_error < 1e-9


def noisy(draw: random.Random, alpha: float, beta: float, sd: float) -> list[float]:
    return [(alpha + size / beta) * math.exp(draw.gauss(0, sd)) for size in SIZES]


def test_intervals_hold_the_truth_in_95_of_100_and_reject_twice_the_truth() -> None:
    draw, alpha, beta, rounds = random.Random(4), 15e-6, 300e9, 600
    held = {"alpha": 0, "beta": 0, "twice alpha": 0, "twice beta": 0}
    for _ in range(rounds):
        line = fit_line(SIZES, noisy(draw, alpha, beta, 0.05))
        assert line.alpha_ci95 and line.beta_ci95
        held["alpha"] += line.alpha_ci95[0] <= alpha <= line.alpha_ci95[1]
        held["beta"] += line.beta_ci95[0] <= beta <= line.beta_ci95[1]
        held["twice alpha"] += line.alpha_ci95[0] <= 2 * alpha <= line.alpha_ci95[1]
        held["twice beta"] += line.beta_ci95[0] <= 2 * beta <= line.beta_ci95[1]
    assert all(0.92 < held[name] / rounds < 0.98 for name in ("alpha", "beta")), held
    assert held["twice alpha"] == held["twice beta"] == 0


def test_against_numpy_and_against_least_squares_that_are_not_relative() -> None:
    times = noisy(random.Random(1), 12e-6, 250e9, 0.1)
    line = fit_line(SIZES, times)
    weights = 1 / np.array(times)
    matrix = np.stack([np.ones(len(SIZES)), np.array(SIZES, float)], 1)
    (alpha, slope), (squares,), _, _ = np.linalg.lstsq(matrix * weights[:, None], np.ones(len(SIZES)))
    assert math.isclose(line.alpha_s, alpha, rel_tol=1e-9) and line.beta_bytes_per_s is not None
    assert math.isclose(line.beta_bytes_per_s, 1 / slope, rel_tol=1e-9)
    assert math.isclose(line.rms_relative_error, math.sqrt(squares / len(SIZES)), rel_tol=1e-9)
    absolute = np.linalg.lstsq(matrix, np.array(times))[0][0]  # fits the largest message and nothing else
    assert abs(line.alpha_s / 12e-6 - 1) < 0.15 < abs(absolute / 12e-6 - 1)


def test_what_the_points_do_not_resolve_is_not_stated() -> None:
    flat = fit_line(SIZES, [3e-4 * (1 - 0.01 * n) for n in range(len(SIZES))])
    assert flat.beta_bytes_per_s is None and flat.alpha_ci95 is None and 2.7e-4 < flat.alpha_s < 3.1e-4
    steep = fit_line(SIZES, [(size / 1e9) ** 1.2 for size in SIZES])
    assert steep.alpha_s == 0.0 and steep.alpha_ci95 is None and steep.worst_relative_error > 0.3


@pytest.mark.parametrize(
    ("sizes", "times"),
    [
        ([1024, 4096, 16_384], [1e-5, 2e-5, 3e-5]),
        ([1024, 1024, 1024, 4096, 4096], [1e-5] * 5),
        (SIZES, [*[1e-5] * 8, 0.0]),
        (SIZES, [*[1e-5] * 8, -1e-5]),
        (SIZES, [*[1e-5] * 8, math.nan]),
        (SIZES, [*[1e-5] * 8, math.inf]),
        ((0, *SIZES[1:]), [1e-5] * 9),
        (SIZES, [1e-5] * 8),
    ],
)
def test_refuses_points_without_a_line(sizes: Any, times: Any) -> None:
    with pytest.raises(InvalidInput):
        fit_line(sizes, times)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_a_figure_is_of_the_windows_behind_the_fall_from_the_burst() -> None:
    draw = random.Random(0)
    falls = [[758.0] * 6 + [draw.gauss(660, 2) for _ in range(34)] for _ in range(2)]
    found = measured(falls)
    assert abs(found.median - 660) < 2 and found.best == 758 and found.high < 670 and found.n == 40
    assert found.settled and found.spread < 0.02
    assert len(found.per_rank) == 2 and found.median == sum(found.per_rank) / 2


def test_what_still_falls_has_not_settled_on_any_of_the_ranks() -> None:
    steady, falling = [660.0] * 40, [758 - 2.5 * n for n in range(40)]
    assert measured([steady, steady]).settled and not measured([steady, falling]).settled
    assert has_settled([1.0, 1.01] * 20) and not has_settled([1.0] * 20 + [1.03] * 10)


def test_of_times_the_smallest_is_best() -> None:
    windows = [[3e-6, 5e-6, 4e-6, 4e-6]]
    assert measured(windows, larger_is_better=False).best == 3e-6 and measured(windows).best == 5e-6


@pytest.mark.parametrize("windows", [[], [[1.0] * 3], [[1.0] * 9, [1.0] * 2], [[1.0] * 8 + [0.0]], [[math.nan] * 9]])
def test_refuses_windows_without_a_figure(windows: list[list[float]]) -> None:
    with pytest.raises(InvalidInput):
        measured(windows)


# --- the value --------------------------------------------------------------------------------------------------------


def test_survives_its_file_and_is_frozen(tmp_path: Path) -> None:
    made = calibrated.h200()
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(made.to_dict()))
    read = read_calibration(path)
    assert read == made and read.to_dict() == made.to_dict()
    with pytest.raises(dataclasses.FrozenInstanceError):
        read.ranks = 8  # type: ignore[misc]
    assert read.product("float16").shape == (8192, 16_384, 4096)  # the faster of two
    gather = read.cost("all_gather", 4)
    assert gather is not None and read.cost("all_gather", 2) is None
    for size in (0, 1000, 5e8):
        assert math.isclose(gather.time_s(size), calibrated.ALPHA_S + size / calibrated.BETA_BYTES_PER_S, rel_tol=1e-9)
    assert read.link_bytes_per_s == pytest.approx(calibrated.BETA_BYTES_PER_S, rel=0.05)  # not all-reduce's 500 GB/s
    with pytest.raises(InvalidInput, match="no products in float32"):
        read.product("float32")
    with pytest.raises(InvalidInput, match="no message"):
        gather.time_s(-1)


def faster(data: dict[str, Any]) -> None:
    data["products"][0]["flop_per_s"]["median"] *= 1.005


def another_schema(data: dict[str, Any]) -> None:
    data["schema"] = 2


def tampered(change: Any) -> dict[str, Any]:
    data = calibrated.h200().to_dict()
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (faster, "hash"),
        (another_schema, "no calibration of schema"),
        (lambda data: data.update(ranks=8), "hash"),
        (lambda data: data["environment"].update(python="3.11"), "hash"),
        (lambda data: data.pop("sha256"), "hash"),
    ],
)
def test_refuses_files_that_were_changed(tmp_path: Path, change: Any, said: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(tampered(change)))
    with pytest.raises(InvalidInput, match=said) as error:
        read_calibration(path)
    assert "headgrid calibrate" in error.value.block()


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"schema": 1}', "\x00"])
def test_refuses_files_that_are_no_calibration(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(InvalidInput):
        read_calibration(tmp_path / "file.json")
    with pytest.raises(InvalidInput, match="cannot read"):
        read_calibration(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"copy_bytes_per_s": calibrated.figure(4e12) | {"median": -1.0}},
        {"copy_bytes_per_s": calibrated.figure(4e12) | {"median": math.nan}},
        {"copy_bytes_per_s": calibrated.figure(4e12) | {"low": 5e12}},
        {"copy_bytes_per_s": calibrated.figure(4e12) | {"n": 0}},
        {"copy_bytes_per_s": calibrated.figure(4e12) | {"unit": "TB/s"}},
        {"copy_bytes_per_s": 4e12},
        {"collectives": [calibrated.cost("broadcast", 4)]},
        {"collectives": [calibrated.cost("send", 2) | {"points": [{"size_bytes": 1}]}]},
        {"speed": 1},
    ],
)
def test_refuses_figures_that_nothing_measures(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        calibrated.h200(**changes)


@pytest.mark.parametrize(
    "change", [{"products": [{"dtype": "float16"}]}, {"launch_s": None, "speed": 1}, {"spin_per_s": 3}]
)
def test_a_hash_made_again_over_nonsense_does_not_make_it_a_calibration(change: dict[str, Any]) -> None:
    flat = {key: value for key, value in (calibrated.h200().to_dict() | change).items() if key != "sha256"}
    data = flat | {"sha256": hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()}
    with pytest.raises(InvalidInput) as error:
        from_dict(data)
    assert "hash" not in error.value.what


def test_whether_a_calibration_is_of_this_machine() -> None:
    env = {"cpu": "Some CPU", "python": "3.12.3", "gpus": [], "load_average": [1, 2, 3]}
    made = calibrated.cpu(16, environment=machine_of(env))
    assert ensure_fits(made, "cpu", 16, ["float32"], env | {"load_average": [9, 9, 9]}) == []
    (note,) = ensure_fits(made, "cpu", 16, ["float32"], env | {"python": "3.13.0"})
    assert "another python" in note
    for ranks, dtype, cpu, said in (
        (8, "float32", "Some CPU", "of 16 ranks"),
        (16, "float16", "Some CPU", "no products in float16"),
        (16, "float32", "Another CPU", "Some CPU"),
    ):
        with pytest.raises(InvalidInput, match=said):
            ensure_fits(made, "cpu", ranks, [dtype], env | {"cpu": cpu})
    with pytest.raises(InvalidInput, match="of cpu"):
        ensure_fits(made, "cuda", 16, ["float32"], env)
    gpus = [{"name": "NVIDIA H200", "power_limit_w": 500.0}]
    h200 = calibrated.h200(environment=machine_of({"gpus": [{"name": "NVIDIA H200", "power_limit_w": 700.0}]}))
    assert any("another gpus" in note for note in ensure_fits(h200, "cuda", 2, ["float16", "float8"], {"gpus": gpus}))


def test_a_measured_figure_needs_no_clocks() -> None:
    bare = {key: value for key, value in calibrated.figure(1.0).items() if key not in ("sm_clock_mhz", "power_w")}
    assert Measured(**bare).power_w is None
