"""What GPUs say of themselves: NVML, and on Hopper and later its GPM metrics, without root and without a profiler.

The NVLink throughput fields 138 and 139 of NVML read 0 on Hopper; GPM's metrics 60 and 61 answer, so these are used.
GPM metrics are means over the time between two samples of a GPU. Sources: nvml.h (fields, GPM metric ids, clock event
reasons); the PCI Express base specification for the link's rate.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pynvml

from headgrid.experiment.telemetry import COUNTERS

MIB = 2**20
# metric id of GPM, and what makes the counter's unit of it
GPM: Mapping[str, tuple[int, float]] = MappingProxyType(
    {
        "graphics_active_percent": (pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL, 1.0),
        "sm_active_percent": (pynvml.NVML_GPM_METRIC_SM_UTIL, 1.0),
        "sm_occupancy_percent": (pynvml.NVML_GPM_METRIC_SM_OCCUPANCY, 1.0),
        "tensor_active_percent": (pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL, 1.0),
        "dram_bandwidth_percent": (pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL, 1.0),
        "pcie_tx_bytes_per_s": (pynvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC, MIB),
        "pcie_rx_bytes_per_s": (pynvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC, MIB),
        "nvlink_tx_bytes_per_s": (pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC, MIB),
        "nvlink_rx_bytes_per_s": (pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC, MIB),
    }
)
# fields of nvmlDeviceGetFieldValues, which answers several in one call; the factor makes the counter's unit
FIELDS: Mapping[str, tuple[int, float]] = MappingProxyType(
    {
        "energy_j": (pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION, 1e-3),
        "memory_temperature_c": (pynvml.NVML_FI_DEV_MEMORY_TEMP, 1.0),
        "ecc_corrected": (pynvml.NVML_FI_DEV_ECC_SBE_VOL_TOTAL, 1.0),
        "ecc_uncorrected": (pynvml.NVML_FI_DEV_ECC_DBE_VOL_TOTAL, 1.0),
        "nvlink_replays": (pynvml.NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL, 1.0),
        "nvlink_crc_errors": (pynvml.NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL, 1.0),
        "nvlink_recoveries": (pynvml.NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL, 1.0),
        "pcie_replays": (pynvml.NVML_FI_DEV_PCIE_REPLAY_COUNTER, 1.0),
    }
)
CALLS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "power_w": lambda handle: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "sm_clock_mhz": lambda handle: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda handle: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "throttle_reasons": lambda handle: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
        "temperature_c": lambda handle: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "memory_used_bytes": lambda handle: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used),
    }
)
NVLINK = ("nvlink_tx_bytes_per_s", "nvlink_rx_bytes_per_s", "nvlink_replays", "nvlink_crc_errors", "nvlink_recoveries")
# bytes/s and lane, one way, after the line code; the key is the PCIe generation
PCIE_LANE_BYTES_PER_S = MappingProxyType({3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9})


class Gpus:
    """All GPUs of this host that NVML shows."""

    def __init__(self) -> None:
        """Raises pynvml.NVMLError where there is no driver."""
        pynvml.nvmlInit()
        self.handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        self.lost: set[int] = set()
        self._gpm = [_Gpm(handle) for handle in self.handles]
        self._xids = _watch_xids(self.handles)
        self.missing = self._probe()

    def describe(self) -> list[dict[str, Any]]:
        """What does not change during a run, of every GPU, and the ceilings of its counters."""
        return [_describe(index, handle) for index, handle in enumerate(self.handles)]

    def sample(self, tiers: Sequence[str]) -> dict[str, list[float | None]]:
        """The counters of these tiers that answer: one value for each GPU, None where it gave none this time."""
        names = [name for name, c in COUNTERS.items() if c.place == "gpu" and c.tier in tiers]
        names = [name for name in names if name not in self.missing]
        rows = [self._sample_one(index, names) for index in range(len(self.handles))]
        return {name: [row.get(name) for row in rows] for name in names}

    def _sample_one(self, index: int, names: Sequence[str]) -> dict[str, float | None]:
        handle, row = self.handles[index], {}
        if index in self.lost:
            return row
        try:
            row |= {name: CALLS[name](handle) for name in names if name in CALLS}
            row |= _fields(handle, [name for name in names if name in FIELDS])
            row |= self._gpm[index].sample([name for name in names if name in GPM])
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_GPU_IS_LOST:  # pyright: ignore[reportAttributeAccessIssue]
                self.lost.add(index)
        return row

    def processes(self, own: frozenset[int]) -> list[list[dict[str, Any]]]:
        """Compute processes on each GPU. `own`: true or false, or null for a process that is not visible here.

        In a container NVML may give process ids of the host, which say nothing in here.
        """
        return [[_process(p, own) for p in _processes(handle)] for handle in self.handles]

    def xids(self) -> list[dict[str, Any]]:
        """Critical errors that the driver has reported since the last call."""
        found = []
        while self._xids is not None:
            try:
                event = pynvml.nvmlEventSetWait_v2(self._xids, 0)
            except pynvml.NVMLError:
                break  # none is waiting, or the GPU is gone, which the counters will say
            found.append({"kind": "xid", "gpu": _uuid(event.device), "xid": int(event.eventData)})
        return found

    def _probe(self) -> dict[str, str]:
        """Counters that some GPU does not answer, and why."""
        missing = {}
        for index, handle in enumerate(self.handles):
            found = {name: reason for name, call in CALLS.items() if (reason := _refusal(call, handle))}
            found |= _unanswered_fields(handle) | self._gpm[index].unanswered()
            if not _active_links(handle):
                found |= dict.fromkeys(NVLINK, "no NVLink is active")
            if reason := _refusal(pynvml.nvmlDeviceGetComputeRunningProcesses, handle):
                found["gpu_processes"] = reason
            missing |= {name: f"GPU {index}: {reason}" for name, reason in found.items() if name not in missing}
        return missing | ({} if self._xids is not None else {"xid_events": "this driver reports no Xid events"})


class _Gpm:
    """GPM of one GPU: the metrics between this sample and the one before."""

    def __init__(self, handle: Any) -> None:
        self._handle, self.why = handle, ""
        try:
            supported = pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice
            self.why = "" if supported else "this GPU has no GPM (Hopper and later have)"
            self._last, self._next = (pynvml.nvmlGpmSampleAlloc() for _ in range(2)) if supported else (None, None)
            if supported:
                pynvml.nvmlGpmSampleGet(handle, self._last)
        except (pynvml.NVMLError, AttributeError) as error:  # an old driver lacks the functions
            self.why = str(error)
        self._asked = pynvml.c_nvmlGpmMetricsGet_t()  # 20 KB: made once

    def sample(self, names: Sequence[str]) -> dict[str, float | None]:
        if self.why or not names:
            return {}
        pynvml.nvmlGpmSampleGet(self._handle, self._next)
        asked: Any = self._asked
        asked.version, asked.numMetrics = pynvml.NVML_GPM_METRICS_GET_VERSION, len(names)
        asked.sample1, asked.sample2 = self._last, self._next
        for n, name in enumerate(names):
            asked.metrics[n].metricId = GPM[name][0]
        pynvml.nvmlGpmMetricsGet(asked)
        self._last, self._next = self._next, self._last
        return {name: _scaled(asked.metrics[n], GPM[name][1]) for n, name in enumerate(names)}

    def unanswered(self) -> dict[str, str]:
        if self.why:
            return dict.fromkeys(GPM, self.why)
        try:
            values = self.sample(list(GPM))
        except pynvml.NVMLError as error:
            return dict.fromkeys(GPM, str(error))
        return {name: f"GPM metric {GPM[name][0]} does not answer" for name, value in values.items() if value is None}


def _scaled(metric: Any, factor: float) -> float | None:
    if metric.nvmlReturn != pynvml.NVML_SUCCESS or not math.isfinite(metric.value):
        return None
    return round(metric.value * factor, 2 if factor == 1.0 else 0)


def _fields(handle: Any, names: Sequence[str]) -> dict[str, float | None]:
    if not names:
        return {}
    values = pynvml.nvmlDeviceGetFieldValues(handle, [FIELDS[name][0] for name in names])
    return {name: _field(value, FIELDS[name][1]) for name, value in zip(names, values, strict=True)}


_VALUE_TYPES = MappingProxyType({0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal", 6: "usVal"})


def _field(value: Any, factor: float) -> float | None:
    if value.nvmlReturn != pynvml.NVML_SUCCESS:
        return None
    number = getattr(value.value, _VALUE_TYPES[value.valueType])
    return number if factor == 1.0 else round(number * factor, 3)


def _unanswered_fields(handle: Any) -> dict[str, str]:
    try:
        values = _fields(handle, list(FIELDS))
    except pynvml.NVMLError as error:
        return dict.fromkeys(FIELDS, str(error))
    return {name: f"NVML field {FIELDS[name][0]} does not answer" for name, value in values.items() if value is None}


def _refusal(call: Callable[[Any], Any], handle: Any) -> str:
    try:
        call(handle)
    except pynvml.NVMLError as error:
        return str(error) or type(error).__name__
    return ""


def _processes(handle: Any) -> list[Any]:
    try:
        return pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return []


def _process(process: Any, own: frozenset[int]) -> dict[str, Any]:
    visible = os.path.exists(f"/proc/{process.pid}")
    return {
        "pid": process.pid,
        "used_bytes": process.usedGpuMemory,
        "own": True if process.pid in own else False if visible else None,
    }


def _watch_xids(handles: Sequence[Any]) -> Any:
    """An event set that collects Xid errors of all GPUs; None where the driver gives none."""
    try:
        events = pynvml.nvmlEventSetCreate()
        for handle in handles:
            pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
    except pynvml.NVMLError:
        return None
    return events


def _asked(call: Callable[..., Any], *args: Any) -> Any:
    """The answer, or None where this driver has none."""
    try:
        return call(*args)
    except (pynvml.NVMLError, AttributeError):
        return None


def _uuid(handle: Any) -> str:
    return str(_asked(pynvml.nvmlDeviceGetUUID, handle))


def _active_links(handle: Any) -> int:
    states = (_asked(pynvml.nvmlDeviceGetNvLinkState, handle, n) for n in range(pynvml.NVML_NVLINK_MAX_LINKS))
    return sum(bool(state) for state in states)


def _describe(index: int, handle: Any) -> dict[str, Any]:
    mig = _asked(pynvml.nvmlDeviceGetMigMode, handle)
    ecc = _asked(pynvml.nvmlDeviceGetEccMode, handle)
    return {
        "index": index,
        "uuid": _uuid(handle),
        "name": _asked(pynvml.nvmlDeviceGetName, handle),
        "driver": _asked(pynvml.nvmlSystemGetDriverVersion),
        "vbios": _asked(pynvml.nvmlDeviceGetVbiosVersion, handle),
        "mig": None if mig is None else bool(mig[0]),
        "ecc": None if ecc is None else bool(ecc[0]),
        "power_limit_w": _known(_asked(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle), 1e-3),
        "nvlinks": _active_links(handle),
        "ceilings": _ceilings(handle),
    }


def _ceilings(handle: Any) -> dict[str, float]:
    """The most that a counter can show on this GPU, in the counter's unit, as the driver states it."""
    memory = _asked(pynvml.nvmlDeviceGetMemoryInfo, handle)
    power_w = _known(_asked(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle), 1e-3)
    link = _asked(_fields_raw, handle, pynvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON)
    nvlink = _active_links(handle) * link * 1e6 if link else None
    lane = PCIE_LANE_BYTES_PER_S.get(_asked(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle))
    width = _asked(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle)
    pcie = lane * width if lane and width else None
    found = {
        "power_w": power_w,
        "energy_j": power_w,
        "sm_clock_mhz": _asked(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": _asked(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_MEM),
        "memory_used_bytes": int(memory.total) if memory else None,
        "nvlink_tx_bytes_per_s": nvlink,
        "nvlink_rx_bytes_per_s": nvlink,
        "pcie_tx_bytes_per_s": pcie,
        "pcie_rx_bytes_per_s": pcie,
    }
    found |= {name: 100.0 for name, counter in COUNTERS.items() if counter.unit == "%"}
    return {name: value for name, value in found.items() if value}


def _fields_raw(handle: Any, field: int) -> float | None:
    return _field(pynvml.nvmlDeviceGetFieldValues(handle, [field])[0], 1.0)


def _known(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
