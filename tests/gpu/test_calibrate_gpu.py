"""A short calibration of real GPUs: every figure is there and lies below its data-sheet ceiling."""

import json
import subprocess
import sys

import pytest
import torch

from headgrid.errors import HeadgridError
from headgrid.spec.calibration import KINDS, Calibration, read_calibration
from headgrid.spec.hardware import find_hardware

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = tmp_path_factory.mktemp("calibration") / "gpus.json"
    command = [sys.executable, "-m", "headgrid", "calibrate", "--seconds", "0.5", "--out", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["sha256"] == read_calibration(path).to_dict()["sha256"]
    return read_calibration(path)


def test_rates_lie_below_the_data_sheet_and_not_far(found: Calibration) -> None:
    try:
        hardware = find_hardware(found.device_name)
    except HeadgridError:
        pytest.skip(f"no data sheet of {found.device_name}")
    for dtype in ("float16", "bfloat16"):
        product, attention = found.product(dtype).flop_per_s, found.attend(dtype).flop_per_s
        assert 0.3 * hardware.flop_per_s(dtype) < product.median < hardware.flop_per_s(dtype)
        assert 0.1 * hardware.flop_per_s(dtype) < attention.median < product.best
    for figure in (found.copy_bytes_per_s, found.read_bytes_per_s):
        assert 0.5 * hardware.peak_memory_bytes_per_s < figure.median <= figure.best < hardware.peak_memory_bytes_per_s
    assert found.product("float16").flop_per_s.power_w is not None
    assert found.cache_bytes and found.cache_bytes > 1 << 20


def test_a_graph_launches_faster_than_the_host(found: Calibration) -> None:
    assert found.graph_launch_s is not None
    assert 1e-7 < found.graph_launch_s.median < found.launch_s.median < 1e-4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_every_collective_has_a_line_that_follows_its_points(found: Calibration) -> None:
    assert {cost.kind for cost in found.collectives if cost.ranks == found.ranks} >= set(KINDS) - {"send"}
    for cost in found.collectives:
        assert 1e-7 < cost.alpha_s < 1e-3 and cost.beta_bytes_per_s is not None
        assert cost.graphed is (cost.kind != "send")
        largest = cost.points[-1]
        assert 0.5 < cost.time_s(largest.size_bytes) / largest.median_s < 2
