"""A clean run on four GPUs, or on a CPU, with telemetry: what tests contaminate in one place each."""

import copy
import random
from collections.abc import Callable
from typing import Any

from run_fixture import make_design, make_records

from headgrid.experiment.telemetry import COUNTERS, Telemetry, collect

Record = dict[str, Any]
BEGIN_S, MONOTONIC_S, HZ = 1_795_352_400.0, 5000.0, 10.0
RANKS, CORES = 4, 8
PIDS = [100, 101, 102, 103]
PARENT, SAMPLER = 90, 91
UUIDS = [f"GPU-{n}" for n in range(RANKS)]
ARMS = [
    {"label": "tp2pp2", "layout": "tp2pp2", "role": "baseline"},
    {"label": "tp2pp2 (A/A)", "layout": "tp2pp2", "role": "aa"},
    {"label": "n2m2:batch", "layout": "n2m2:batch", "role": "arm"},
]
GPU = {
    "graphics_active_percent": 97.0,
    "sm_active_percent": 91.0,
    "sm_occupancy_percent": 33.0,
    "tensor_active_percent": 61.0,
    "dram_bandwidth_percent": 40.0,
    "nvlink_tx_bytes_per_s": 2.0e11,
    "nvlink_rx_bytes_per_s": 2.0e11,
    "pcie_tx_bytes_per_s": 1.0e6,
    "pcie_rx_bytes_per_s": 1.0e6,
    "power_w": 690.0,
    "sm_clock_mhz": 1755,
    "memory_clock_mhz": 3201,
    "throttle_reasons": 4,
    "temperature_c": 61,
    "memory_temperature_c": 70,
    "memory_used_bytes": 80 * 2**30,
    "ecc_corrected": 3,
    "ecc_uncorrected": 0,
    "nvlink_replays": 2,
    "nvlink_crc_errors": 0,
    "nvlink_recoveries": 0,
    "pcie_replays": 1,
}
TAKEN_S = {"prefill": 3.0, "decode": 1.0}


def gpu_row(index: int) -> Record:
    return {
        "index": index,
        "uuid": UUIDS[index],
        "name": "NVIDIA H200",
        "driver": "580.159",
        "vbios": "96.00",
        "mig": False,
        "ecc": True,
        "power_limit_w": 700.0,
        "nvlinks": 18,
        "ceilings": {
            "power_w": 700.0,
            "sm_clock_mhz": 1980,
            "nvlink_tx_bytes_per_s": 4.5e11,
            "sm_active_percent": 100.0,
        },
    }


class Run:
    """Design, journal and telemetry of one run, still open to change."""

    def __init__(
        self, device: str = "cuda", blocks: int = 6, seed: int = 0, launches: int = 1, analysis: int = 2
    ) -> None:
        self.rng = random.Random(seed)
        self.design = make_design(
            arms=copy.deepcopy(ARMS),
            ranks=RANKS,
            device=device,
            blocks=blocks,
            warmup_blocks=1,
            launches=launches,
            seed=seed,
            **({"analysis": analysis, "planted": 0.0} if analysis > 1 else {}),
        )
        self.records = self._journal()
        self.lines = [self._start(), *self._samples()]

    def _journal(self) -> list[Record]:
        """The fixture's journal with blocks one after the other: a prefill of 3 s, a decode of 1 s, noise of 0.3 %."""
        records = make_records(self.design, noise=0.0)
        now_s = BEGIN_S + 10
        for record in records:
            if record["kind"] == "launch":
                now_s += 5
                record |= {
                    "time_s": now_s,
                    "start_s": 3.0,
                    "started_s": now_s - 3.5,
                    "pids": PIDS,
                    "device_uuids": UUIDS,
                }
        for record in (r for r in records if r["kind"] == "block"):
            for phase, usual_s in TAKEN_S.items():
                slowest_s = usual_s * (1 + self.rng.gauss(0, 0.003))
                record[f"{phase}_start_s"] = now_s
                record[f"{phase}_s"] = [slowest_s * (1 - 0.002 * rank) for rank in range(RANKS)]
                now_s += slowest_s + 0.05
        draw = random.Random(f"sentinels {self.design['seed']}")
        for record in (r for r in records if r["kind"] in ("block", "end")):
            usual = {"gemm_s": 2e-3, "all_reduce_s": 1e-3, "host_s": 1e-3}
            record["sentinels"] = {k: [v * (1 + draw.gauss(0, 0.003)) for _ in PIDS] for k, v in usual.items()}
        self.end_s = now_s + 1
        return records

    def _start(self) -> Record:
        host = {"cores": list(range(CORES)), "host_cores": CORES, "memory_total_bytes": 2**37}
        gpus = [gpu_row(n) for n in range(RANKS)] if self.design["device"] == "cuda" else []
        missing = {} if gpus else {n: "NVML: no driver" for n, c in COUNTERS.items() if c.place == "gpu"}
        at = {"time_s": BEGIN_S, "monotonic_s": MONOTONIC_S, "hz": HZ, "pid": SAMPLER, "parent": PARENT}
        return {"kind": "start", **at, "host": host, "gpus": gpus, "missing": missing}

    def _samples(self) -> list[Record]:
        return [self._sample(n / HZ, slow=n % 20 == 0) for n in range(int((self.end_s - BEGIN_S) * HZ))]

    def _sample(self, after_s: float, slow: bool) -> Record:
        """Totals grow steadily: each rank computes on one core, the command and the sampler hardly."""
        running = after_s > 12
        gpu = {name: [value if running else value * 0] * RANKS for name, value in GPU.items()}
        for counter in ("ecc_corrected", "nvlink_replays", "pcie_replays"):
            gpu[counter] = [GPU[counter]] * RANKS  # what stood there before the run is not the run's
        gpu["energy_j"] = [690.0 * after_s] * RANKS
        own = [after_s * 0.02, after_s * 0.004, *(after_s * 0.9 for _ in PIDS)]
        host: Record = {"cpu_busy_s": [1000.0 + (sum(own) + 0.05 * after_s) / CORES] * CORES, "cpu_steal_s": 4.2}
        sample: Record = {
            "kind": "sample",
            "time_s": BEGIN_S + after_s,
            "monotonic_s": MONOTONIC_S + after_s,
            "host": host,
        }
        if slow:
            host |= {"load_1min": 4.1, "context_switches": 900 * after_s, "memory_available_bytes": 2**36}
            host |= {
                "memory_stall_s": 1.5,
                "swapped_in_bytes": 4096,
                "swapped_out_bytes": 8192,
                "quota_throttled_s": 0.25,
            }
            process = {"pids": [PARENT, SAMPLER, *PIDS], "process_cpu_s": own, "rss_bytes": [2**30] * 6}
            process |= {"voluntary_switches": [50 * after_s] * 6, "involuntary_switches": [3 * after_s] * 6}
            sample["process"] = process
            sample["gpu_processes"] = [[{"pid": pid, "used_bytes": 1, "own": True}] if running else [] for pid in PIDS]
        if self.design["device"] == "cuda":
            sample["gpu"] = {n: v for n, v in gpu.items() if slow or COUNTERS[n].tier == "fast"}
        else:
            sample.pop("gpu_processes", None)
        return sample

    # --- where and how to contaminate --------------------------------------------------------------------------------

    def block(self, number: int = 3, arm: str = "n2m2:batch") -> Record:
        """One timed block's record."""
        return next(r for r in self.records if r["kind"] == "block" and (r["block"], r["arm"]) == (number, arm))

    def during(self, record: Record, phase: str = "prefill") -> list[Record]:
        """The samples inside one block's phase; not the first, which speaks of the time before, too."""
        start_s = record[f"{phase}_start_s"]
        end_s = start_s + max(record[f"{phase}_s"])
        return [x for x in self.lines if x["kind"] == "sample" and start_s + 1 / HZ <= x["time_s"] <= end_s]

    def since(self, time_s: float, change: Callable[[Record], None]) -> None:
        """Change every sample from a moment on: how a total jumps."""
        for line in self.lines:
            if line["kind"] == "sample" and line["time_s"] >= time_s:
                change(line)

    def gpu(self, record: Record, counter: str, value: float, gpu: int = 1) -> None:
        """A GPU's counter in one block's prefill."""
        for sample in self.during(record):
            if counter in sample["gpu"]:
                sample["gpu"][counter] = [value if n == gpu else v for n, v in enumerate(sample["gpu"][counter])]

    def rise(self, place: str, counter: str, by: float, key: int | None = 1) -> None:
        """A total that jumps in the middle of the block."""
        record = self.block()

        def change(sample: Record) -> None:
            values = sample.get(place, {}).get(counter)
            if values is not None:
                raised = [v + by if n == key else v for n, v in enumerate(values)] if key is not None else values + by
                sample[place][counter] = raised

        self.since(record["prefill_start_s"] + 1.5, change)

    @property
    def telemetry(self) -> Telemetry:
        return collect(self.lines)
