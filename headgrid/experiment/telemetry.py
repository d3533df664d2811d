"""Telemetry of a run: what is sampled, the side process that samples it, and its file read back.

The timed ranks do nothing for it. A process of its own, started beside them with the lowest priority, appends to
`telemetry.jsonl` in the run folder: one JSON object a line, written out at once, times as in the journal (Unix time)
with the monotonic clock beside them. A counter that does not answer is named once with the reason; no zero takes its
place.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from headgrid.errors import InvalidInput
from headgrid.experiment.telemetry_hosts import clocks_of, files, in_rank_0_time

FILE = "telemetry.jsonl"
DEFAULT_HZ = 10.0
MAX_HZ = 50.0
"""Above this the sampler would itself be a load: a GPM sample takes in the order of a millisecond."""
START_TIMEOUT_S, STOP_TIMEOUT_S = 10.0, 5.0

Place = Literal["gpu", "core", "host", "process"]
Kind = Literal["gauge", "interval", "total", "bits"]
Tier = Literal["fast", "slow", "rare"]

TIER_S: Mapping[str, float] = MappingProxyType({"fast": 0.0, "slow": 2.0, "rare": 10.0})
"""Least time between two samples of a counter. Fast ones are taken at every tick; so is the CPU's load without GPUs."""


@dataclass(frozen=True, slots=True)
class Counter:
    """What one counter says.

    `kind`: a gauge is true at its moment; an interval figure over the time since the sample before; a total only grows,
    and its growth per second is what is reported; bits are flags.
    """

    place: Place
    kind: Kind
    tier: Tier
    unit: str
    label: str


COUNTERS: Mapping[str, Counter] = MappingProxyType(
    {
        "graphics_active_percent": Counter("gpu", "interval", "fast", "%", "Graphics engine active"),
        "sm_active_percent": Counter("gpu", "interval", "fast", "%", "SM active"),
        "sm_occupancy_percent": Counter("gpu", "interval", "fast", "%", "SM occupancy"),
        "tensor_active_percent": Counter("gpu", "interval", "fast", "%", "Tensor cores active"),
        "dram_bandwidth_percent": Counter("gpu", "interval", "fast", "%", "DRAM bandwidth in use"),
        "nvlink_tx_bytes_per_s": Counter("gpu", "interval", "fast", "B/s", "NVLink sent"),
        "nvlink_rx_bytes_per_s": Counter("gpu", "interval", "fast", "B/s", "NVLink received"),
        "pcie_tx_bytes_per_s": Counter("gpu", "interval", "fast", "B/s", "PCIe sent"),
        "pcie_rx_bytes_per_s": Counter("gpu", "interval", "fast", "B/s", "PCIe received"),
        "power_w": Counter("gpu", "gauge", "fast", "W", "Power"),
        "energy_j": Counter("gpu", "total", "fast", "W", "Power, from the energy counter"),
        "sm_clock_mhz": Counter("gpu", "gauge", "fast", "MHz", "SM clock"),
        "memory_clock_mhz": Counter("gpu", "gauge", "slow", "MHz", "Memory clock"),
        "throttle_reasons": Counter("gpu", "bits", "fast", "", "Clock event reasons"),
        "temperature_c": Counter("gpu", "gauge", "slow", "°C", "GPU temperature"),
        "memory_temperature_c": Counter("gpu", "gauge", "slow", "°C", "Memory temperature"),
        "memory_used_bytes": Counter("gpu", "gauge", "slow", "B", "Memory used"),
        "ecc_corrected": Counter("gpu", "total", "slow", "1/s", "ECC errors, corrected"),
        "ecc_uncorrected": Counter("gpu", "total", "slow", "1/s", "ECC errors, not corrected"),
        "nvlink_replays": Counter("gpu", "total", "rare", "1/s", "NVLink replays"),
        "nvlink_crc_errors": Counter("gpu", "total", "rare", "1/s", "NVLink CRC errors"),
        "nvlink_recoveries": Counter("gpu", "total", "rare", "1/s", "NVLink recoveries"),
        "pcie_replays": Counter("gpu", "total", "rare", "1/s", "PCIe replays"),
        "cpu_busy_s": Counter("core", "total", "slow", "of a core", "CPU load"),
        "cpu_clock_mhz": Counter("core", "gauge", "rare", "MHz", "CPU clock"),
        "cpu_steal_s": Counter("host", "total", "slow", "cores", "CPU time stolen by the hypervisor"),
        "load_1min": Counter("host", "gauge", "rare", "", "Load average, 1 minute"),
        "context_switches": Counter("host", "total", "slow", "1/s", "Context switches of the host"),
        "memory_available_bytes": Counter("host", "gauge", "slow", "B", "Host memory available"),
        "memory_stall_s": Counter("host", "total", "slow", "of the time", "Host stalled for memory (PSI full)"),
        "swapped_in_bytes": Counter("host", "total", "slow", "B/s", "Swapped in"),
        "swapped_out_bytes": Counter("host", "total", "slow", "B/s", "Swapped out"),
        "quota_throttled_s": Counter("host", "total", "slow", "of the time", "Throttled by the container's CPU quota"),
        "process_cpu_s": Counter("process", "total", "slow", "of a core", "CPU time of a rank"),
        "rss_bytes": Counter("process", "gauge", "slow", "B", "Resident memory of a rank"),
        "voluntary_switches": Counter("process", "total", "slow", "1/s", "Voluntary context switches of a rank"),
        "involuntary_switches": Counter("process", "total", "slow", "1/s", "Involuntary context switches of a rank"),
    }
)


@dataclass(frozen=True, slots=True)
class Telemetry:
    """All that a `telemetry.jsonl` holds: one session for each process that sampled, oldest first.

    `others`: the same of further hosts by their numbers, in rank 0's time; `clocks`: how far each one's was ahead.
    """

    sessions: tuple["Session", ...]
    others: Mapping[int, "Telemetry"] = field(default_factory=dict)
    clocks: tuple[Mapping[str, Any], ...] = ()

    def of_hosts(self) -> dict[int, "Telemetry"]:
        """Hosts of which there are samples, rank 0's first."""
        every = {0: self, **self.others}
        return {host: telemetry for host, telemetry in every.items() if telemetry.sessions}

    def events(self, kind: str) -> Iterator[Mapping[str, Any]]:
        """The records of one kind that are no samples: `xid`, `lost`, `failed`."""
        return (event for session in self.sessions for event in session.events if event["kind"] == kind)


@dataclass(frozen=True, slots=True)
class Session:
    """One sampling process: its first record, its samples in order, and what else it said."""

    start: Mapping[str, Any]
    samples: tuple[Mapping[str, Any], ...]
    events: tuple[Mapping[str, Any], ...]

    @property
    def hz(self) -> float:
        """Declared samples per second."""
        return self.start["hz"]

    @property
    def missing(self) -> dict[str, str]:
        """Counters that did not answer, and why."""
        late = {e["counter"]: e["why"] for e in self.events if e["kind"] == "missing"}
        return {**self.start["missing"], **late}


def check_hz(hz: float) -> None:
    """Raise InvalidInput for a rate that is not 0 (off) or in (0, 50] samples per second."""
    if not 0 <= hz <= MAX_HZ:  # also refuses NaN
        raise InvalidInput(
            f"{hz:g} telemetry samples per second",
            why=f"it takes a rate from 0 (off) to {MAX_HZ:g}, above which the sampler is itself a load",
            legal=("--telemetry-hz 0", f"--telemetry-hz {DEFAULT_HZ:g}"),
        )


class Sampler:
    """The side process, as the command that started it sees it."""

    def __init__(self, path: Path, hz: float, *, gpus: bool) -> None:
        """Start sampling to `path`, `hz` times a second, with GPUs if `gpus`, and wait for the first sample.

        What was there before the ranks is known only from a sample before them. Without one within START_TIMEOUT_S
        the run goes on, and its summary says what was not checked.
        """
        self._path, self._followed = path, ()
        options = {"path": str(path), "hz": hz, "gpus": gpus, "parent": os.getpid(), "sys_path": sys.path}
        # By -c with this process's own search path: -m would look in the working folder first, where anything may lie.
        code = (
            "import json, sys; options = json.loads(sys.argv[1]); sys.path[:] = options.pop('sys_path');"
            " from headgrid.experiment.telemetry_sampler import main; main(**options)"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(options)],
            stdin=subprocess.PIPE,  # its end, however it comes, ends the sampler
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C goes to the terminal's group: the command decides, then the sampler ends
        )
        assert self._process.stdout is not None
        select.select([self._process.stdout], [], [], START_TIMEOUT_S)

    @property
    def pid(self) -> int:
        """The side process."""
        return self._process.pid

    def follow(self, pids: Iterable[int]) -> None:
        """Say which processes are the ranks; their load is ours, and any other is foreign."""
        chosen = tuple(sorted(pids))
        if chosen == self._followed or not chosen or self._process.stdin is None:
            return
        with suppress(OSError):  # it has ended: `stop` says so in its file
            self._process.stdin.write(json.dumps({"follow": chosen}).encode() + b"\n")
            self._process.stdin.flush()
            self._followed = chosen

    def stop(self) -> None:
        """End the side process after a last sample. One that failed or hangs gets a `failed` record in its place."""
        try:
            _, errors = self._process.communicate(timeout=STOP_TIMEOUT_S)
            why = errors.decode(errors="replace").strip().splitlines()[-1:] or [f"code {self._process.returncode}"]
            failed = why[0] if self._process.returncode else None
        except subprocess.TimeoutExpired:
            failed = f"it did not end within {STOP_TIMEOUT_S:g} s"
        finally:
            self._process.kill()
            self._process.wait()
        if failed is not None:
            with suppress(OSError):  # no disk for samples is no reason to end a run whose journal stands
                append_line(self._path, {"kind": "failed", "time_s": time.time(), "why": failed})


@contextmanager
def sampling(folder: Path, hz: float, *, gpus: bool) -> Iterator[Sampler | None]:
    """Sample to the run folder for the length of the block; nothing at 0 Hz."""
    if not hz:
        yield None
        return
    sampler = Sampler(folder / FILE, hz, gpus=gpus)
    try:
        yield sampler
    finally:
        sampler.stop()


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record, on a line of its own even if an earlier process was killed in the middle of one."""
    append_lines(path, json.dumps(record, allow_nan=False).encode() + b"\n")


def append_lines(path: Path, lines: bytes) -> None:
    """The same of whole lines."""
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            torn = file.read(1) != b"\n"
            file.write(b"\n" if torn else b"")
        file.write(lines)


def read(path: Path) -> Telemetry | None:
    """The telemetry at `path`, and that of other hosts beside it; None if there is none at `path`.

    Lines that a kill has torn are left out: samples are observations beside the journal, and losing one changes no
    figure of the journal.
    """
    records = _records(path)
    if records is None:
        return None
    found = {host: _records(file) or [] for host, file in files(path.parent).items()}
    others = {
        host: Telemetry(collect(in_rank_0_time(rows)).sessions, clocks=tuple(clocks_of(rows)))
        for host, rows in found.items()
    }
    return Telemetry(collect(records).sessions, {host: each for host, each in others.items() if each.sessions})


def _records(path: Path) -> list[dict[str, Any]] | None:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return None
    return [record for line in lines if (record := _parsed(line)) is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record and "time_s" in record else None


def collect(records: Sequence[Mapping[str, Any]]) -> Telemetry:
    """Sessions from a file's records in order; what stands before the first `start` has no context and is left out."""
    starts = [n for n, record in enumerate(records) if record["kind"] == "start"]
    sessions = []
    for first, last in pairwise([*starts, len(records)]):
        rest = records[first + 1 : last]
        samples = tuple(record for record in rest if record["kind"] == "sample")
        events = tuple(record for record in rest if record["kind"] != "sample")
        sessions.append(Session(records[first], samples, events))
    return Telemetry(tuple(sessions))
