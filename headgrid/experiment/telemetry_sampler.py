"""The side process: samples at a fixed rate until the command that started it closes its pipe or is gone.

It imports neither torch nor numpy, runs with the lowest priority, and holds no GPU memory (NVML needs no context). A
tick that comes late is taken late and says so by its time; ticks that were missed are not made up for.
"""

import json
import os
import select
import signal
import time
from pathlib import Path
from typing import Any

from headgrid.experiment.telemetry import TIER_S, append_line
from headgrid.experiment.telemetry_host import Host

CLOCK_TRIES = 5
CLOCK_APART_S = 1e-3
"""Two clocks read further apart than this were interrupted in between, and are read again."""


def main(path: str, hz: float, gpus: bool, parent: int) -> None:
    """Sample to `path` until standard input ends. `parent`: the process to belong to; `gpus`: ask NVML, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    os.nice(19)
    loop = _Loop(Path(path), hz, parent, gpus)
    why = "the run ended"
    try:
        why = loop.run()
    except SystemExit:
        why = "terminated"
    finally:
        loop.close(why)


def _leave(number: int, frame: object) -> None:
    raise SystemExit


def clocks() -> tuple[float, float]:
    """Unix time and the monotonic clock at one moment, to a millisecond."""
    unix_s, monotonic_s = 0.0, 0.0
    for _ in range(CLOCK_TRIES):
        before = time.monotonic()
        unix_s = time.time()
        after = time.monotonic()
        monotonic_s = (before + after) / 2
        if after - before < CLOCK_APART_S:
            break
    return unix_s, monotonic_s


class _Loop:
    def __init__(self, path: Path, hz: float, parent: int, gpus: bool) -> None:
        self._period_s, self._parent = 1 / hz, parent
        self._host = Host((parent, os.getpid()), "slow" if gpus else "fast")
        self._gpus, missing = _open_gpus() if gpus else (None, {})
        start = {
            "hz": hz,
            "pid": os.getpid(),
            "parent": parent,
            "host": self._host.describe(),
            "gpus": self._gpus.describe() if self._gpus else [],
            "missing": missing | self._host.missing | (self._gpus.missing if self._gpus else {}),
        }
        self._last_s = dict.fromkeys(TIER_S, float("-inf"))
        self._lost: set[int] = set()
        self._samples, self._input = 0, b""
        unix_s, monotonic_s = clocks()
        append_line(path, {"kind": "start", "time_s": unix_s, "monotonic_s": monotonic_s} | start)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._start_cpu_s = time.process_time()

    def run(self) -> str:
        """Sample until there is a reason to end, and return it."""
        due_s = time.monotonic()
        self._sample()
        os.write(1, b"\n")  # the command waits for this before it starts ranks
        while True:
            if os.getppid() != self._parent:
                return "the command that started the sampler is gone"
            due_s = max(due_s + self._period_s, time.monotonic())
            while (wait_s := due_s - time.monotonic()) > 0:
                if select.select([0], [], [], wait_s)[0] and not self._listen():
                    return "the run ended"
            self._sample()

    def _listen(self) -> bool:
        """Take what the command says; False once it has closed the pipe."""
        data = os.read(0, 65536)
        *lines, self._input = (self._input + data).split(b"\n")
        for line in lines:
            self._host.follow(json.loads(line)["follow"])
        return bool(data)

    def _due(self, now_s: float, everything: bool) -> list[str]:
        tiers = [
            tier for tier, every_s in TIER_S.items() if everything or now_s - self._last_s[tier] >= every_s * 0.999
        ]
        self._last_s |= dict.fromkeys(tiers, now_s)
        return tiers

    def _sample(self, everything: bool = False) -> None:
        unix_s, monotonic_s = clocks()
        tiers = self._due(monotonic_s, everything)
        record: dict[str, Any] = {"kind": "sample", "time_s": round(unix_s, 4), "monotonic_s": round(monotonic_s, 4)}
        record |= self._host.sample(tiers)
        if self._gpus:
            record["gpu"] = self._gpus.sample(tiers)
            if "slow" in tiers:
                record["gpu_processes"] = self._gpus.processes(self._host.pids)
                self._report_faults(unix_s)
        self._samples += 1
        self._write(record)

    def _report_faults(self, unix_s: float) -> None:
        assert self._gpus is not None
        for event in self._gpus.xids():
            self._write(event | {"time_s": unix_s})
        for index in sorted(self._gpus.lost - self._lost):
            self._write({"kind": "lost", "time_s": unix_s, "gpu_index": index})
        self._lost |= self._gpus.lost

    def _write(self, record: dict[str, Any]) -> None:
        """One write, so that a kill between two records tears neither."""
        os.write(self._file, json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n")

    def close(self, why: str) -> None:
        """A last sample, so that what grew is known to the end, and what all this has cost."""
        self._sample(everything=True)
        unix_s, monotonic_s = clocks()
        cpu_s = {"start_cpu_s": round(self._start_cpu_s, 4), "cpu_s": round(time.process_time() - self._start_cpu_s, 4)}
        spent = {"samples": self._samples, **cpu_s}
        self._write({"kind": "stop", "time_s": unix_s, "monotonic_s": monotonic_s, "why": why} | spent)
        os.close(self._file)


def _open_gpus() -> tuple[Any, dict[str, str]]:
    """The GPUs, or None and the reason for every counter of theirs."""
    from headgrid.experiment.telemetry import COUNTERS

    try:
        from headgrid.experiment.telemetry_gpu import Gpus

        return Gpus(), {}
    except Exception as error:
        return None, {name: f"NVML: {error}" for name, counter in COUNTERS.items() if counter.place == "gpu"}
