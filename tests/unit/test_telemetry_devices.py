"""What the sampler reads: files of the kernel by their formats, and counters of a GPU by a fake driver."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from telemetry_fixture import Run

from headgrid.experiment import telemetry_gpu, telemetry_host
from headgrid.experiment.isolation import judge
from headgrid.experiment.telemetry import COUNTERS


def test_kernel_files_are_read_by_their_formats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stat = b"cpu  10 20 30 400 5 6 7 80 9 9\ncpu0 4 8 12 200 1 1 1 40 0 0\ncpu1 6 12 18 200 4 5 6 40 0 0\nintr 1 2\n"
    assert telemetry_host.parse_stat(stat, 0.01) == ([0.24, 0.36], 0.8)
    assert telemetry_host.parse_throttled_s("nr_periods 5\nnr_throttled 2\nthrottled_usec 1500000\n") == 1.5
    assert telemetry_host.parse_throttled_s("nr_periods 5\nnr_throttled 2\nthrottled_time 2500000000\n") == 2.5
    assert telemetry_host.parse_throttled_s("usage_usec 5\n") is None
    pressure = tmp_path / "memory"
    pressure.write_text("some avg10=0.00 total=9\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1250000\n")
    monkeypatch.setattr(telemetry_host, "PRESSURE", pressure)
    assert telemetry_host.memory_stall_s() == 1.25


class FakeDriver:
    """NVML of one GPU whose metrics `refused` do not answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refused: tuple[int, ...] = (), links: int = 18) -> None:
        self.lost = False
        answers: dict[str, Callable[..., Any]] = {
            "Init": lambda: None,
            "DeviceGetCount": lambda: 1,
            "DeviceGetHandleByIndex": lambda index: f"handle{index}",
            "DeviceGetPowerUsage": lambda handle: self.alive(650_000),
            "DeviceGetClockInfo": lambda handle, kind: 1755,
            "DeviceGetCurrentClocksThrottleReasons": lambda handle: 4,
            "DeviceGetTemperature": lambda handle, sensor: 61,
            "DeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=2**30, total=2**37),
            "DeviceGetNvLinkState": lambda handle, link: link < links,
            "DeviceGetFieldValues": lambda handle, ids: [self.field(i, i in refused) for i in ids],
            "GpmQueryDeviceSupport": lambda handle: SimpleNamespace(isSupportedDevice=True),
            "GpmSampleAlloc": pynvml.c_nvmlGpmSample_t,
            "GpmSampleGet": lambda handle, sample: sample,
            "GpmMetricsGet": lambda asked: self.gpm(asked, refused),
            "DeviceGetComputeRunningProcesses": lambda handle: [
                SimpleNamespace(pid=pid, usedGpuMemory=1) for pid in (os.getpid(), 1, 2**22 + 1)
            ],
            "EventSetCreate": lambda: self.refuse(pynvml.NVML_ERROR_NOT_SUPPORTED),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, f"nvml{name}", answer)

    @staticmethod
    def refuse(code: int) -> None:
        raise pynvml.NVMLError(code)

    def alive(self, value: int) -> int:
        if self.lost:
            self.refuse(pynvml.NVML_ERROR_GPU_IS_LOST)
        return value

    @staticmethod
    def field(number: int, refused: bool) -> Any:
        value = SimpleNamespace(uiVal=number, ullVal=number * 1000, ulVal=0)
        code = pynvml.NVML_ERROR_NOT_SUPPORTED if refused else pynvml.NVML_SUCCESS
        return SimpleNamespace(nvmlReturn=code, valueType=3, value=value)

    @staticmethod
    def gpm(asked: Any, refused: tuple[int, ...]) -> None:
        for metric in asked.metrics[: asked.numMetrics]:
            metric.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED if metric.metricId in refused else 0
            metric.value = float("nan") if metric.metricId == 5 else float(metric.metricId)


def test_gpu_counters_have_units_and_what_does_not_answer_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeDriver(monkeypatch, refused=(10, pynvml.NVML_FI_DEV_MEMORY_TEMP))
    gpus = telemetry_gpu.Gpus()
    assert gpus.missing == {
        "dram_bandwidth_percent": "GPU 0: GPM metric 10 does not answer",
        "tensor_active_percent": "GPU 0: GPM metric 5 does not answer",  # it answered with NaN
        "memory_temperature_c": f"GPU 0: NVML field {pynvml.NVML_FI_DEV_MEMORY_TEMP} does not answer",
        "xid_events": "this driver reports no Xid events",
    }
    sample = gpus.sample(["fast", "slow", "rare"])
    gpu = {name for name, counter in COUNTERS.items() if counter.place == "gpu"}
    assert set(sample) == gpu - set(gpus.missing)
    assert sample["power_w"] == [650] and sample["sm_active_percent"] == [2.0]
    assert sample["nvlink_tx_bytes_per_s"] == [61 * 2**20] and sample["nvlink_rx_bytes_per_s"] == [60 * 2**20]
    assert sample["energy_j"] == [83.0] and sample["memory_used_bytes"] == [2**30]
    own = {row["pid"]: row["own"] for row in gpus.processes(frozenset({os.getpid()}))[0]}
    assert own == {os.getpid(): True, 1: False, 2**22 + 1: None}
    assert gpus.xids() == []


def test_a_gpu_without_links_has_no_link_counters_and_a_lost_one_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(monkeypatch, links=0)
    gpus = telemetry_gpu.Gpus()
    assert gpus.missing["nvlink_tx_bytes_per_s"] == "GPU 0: no NVLink is active"
    run = Run()
    run.lines[0]["missing"] = {"xid_events": gpus.missing["xid_events"]}
    unchecked = judge(run.design, run.records, run.telemetry)["unchecked"]
    assert unchecked == [{"code": "GPU_XID", "why": "xid_events: this driver reports no Xid events"}]
    driver.lost = True
    assert gpus.sample(["fast"])["power_w"] == [None] and gpus.lost == {0}
    assert gpus.sample(["fast"])["sm_clock_mhz"] == [None]
