"""What a host's CPU, memory and processes say: psutil, and three files of Linux that psutil does not read."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from headgrid.experiment.telemetry import COUNTERS

STAT = Path("/proc/stat")
PRESSURE = Path("/proc/pressure/memory")
CGROUPS = Path("/sys/fs/cgroup")


class Host:
    """Counters of this host and of the processes that belong to the run."""

    def __init__(self, pids: Sequence[int], load_tier: str) -> None:
        """`pids`: the command and the sampler itself; ranks follow by `follow`.

        `load_tier`: when each core's load is read. Beside GPUs that is "slow", because a host with hundreds of cores
        takes a millisecond to say it; where the CPU is the device it is "fast".
        """
        self._always, self._load_tier = tuple(pids), load_tier
        self._processes: dict[int, psutil.Process] = {}
        self._cores = CoreTimes()
        self.follow(())
        self._quota = _quota_file()
        self._asked = {
            "load_1min": lambda: psutil.getloadavg()[0],
            "context_switches": lambda: psutil.cpu_stats().ctx_switches,
            "memory_available_bytes": lambda: psutil.virtual_memory().available,
            "memory_stall_s": memory_stall_s,
            "quota_throttled_s": lambda: quota_throttled_s(self._quota),
            "cpu_clock_mhz": _clocks_mhz,
            "swapped": lambda: psutil.swap_memory()[4:6],
        }
        self.missing = self._probe()

    def describe(self) -> dict[str, Any]:
        """What does not change during a run."""
        every = range(psutil.cpu_count() or 1)
        return {
            "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(every),
            "host_cores": len(every),
            "memory_total_bytes": psutil.virtual_memory().total,
        }

    def follow(self, pids: Sequence[int]) -> None:
        """Sample these processes, too."""
        for pid in (*self._always, *pids):
            try:
                self._processes.setdefault(pid, psutil.Process(pid))
            except psutil.Error:
                continue

    @property
    def pids(self) -> frozenset[int]:
        """All that belongs to the run."""
        return frozenset(self._processes)

    def sample(self, tiers: Sequence[str]) -> dict[str, Any]:
        """The counters of these tiers that answer, under `host`, and the processes' under `process`."""
        host: dict[str, Any] = {}
        if self._load_tier in tiers:
            host["cpu_busy_s"], stolen_s = self._cores.read()
            host |= {} if stolen_s is None else {"cpu_steal_s": stolen_s}
        if "slow" not in tiers:
            return {"host": host}
        for name, ask in self._asked.items():
            if name in COUNTERS and COUNTERS[name].tier in tiers and name not in self.missing:
                host[name] = ask()
        if "swapped_in_bytes" not in self.missing:
            host["swapped_in_bytes"], host["swapped_out_bytes"] = self._asked["swapped"]()
        return {"host": host, "process": self._sample_processes()}

    def _sample_processes(self) -> dict[str, list[Any]]:
        """Columns of figures, one entry for each process that is still there."""
        rows = []
        for pid, process in list(self._processes.items()):
            try:
                with process.oneshot():
                    times, memory = process.cpu_times(), process.memory_info()
                    switches = process.num_ctx_switches()
            except psutil.Error:
                del self._processes[pid]
                continue
            cpu_s = times.user + times.system + times.children_user + times.children_system
            rows.append((pid, round(cpu_s, 2), memory.rss, switches.voluntary, switches.involuntary))
        names = ("pids", "process_cpu_s", "rss_bytes", "voluntary_switches", "involuntary_switches")
        return {name: [row[n] for row in rows] for n, name in enumerate(names)}

    def _probe(self) -> dict[str, str]:
        """Counters that this host does not answer, and why."""
        missing = {}
        for name, ask in self._asked.items():
            try:
                ask()
            except (OSError, ValueError, NotImplementedError, AttributeError, LookupError) as error:
                missing[name] = _reason(name, error)
        if "swapped" in missing:
            missing |= dict.fromkeys(("swapped_in_bytes", "swapped_out_bytes"), missing.pop("swapped"))
        if self._cores.read()[1] is None:
            missing["cpu_steal_s"] = "only Linux counts stolen time"
        return missing


def _reason(name: str, error: Exception) -> str:
    if name == "quota_throttled_s":
        return "this process is in no cgroup that counts CPU throttling"
    if name == "memory_stall_s":
        return f"the kernel offers no pressure information ({PRESSURE})"
    return str(error) or type(error).__name__


class CoreTimes:
    """Seconds that each core computed for processes, and that a hypervisor took.

    Read from a descriptor that stays open where there is /proc: at 10 Hz this is most of the sampler's cost, and psutil
    takes four times as long. Interrupts are left out: the kernel serves them for whoever it is, and gloo's own packets
    would count as foreign. `user` holds guest time already.
    """

    def __init__(self) -> None:
        """Open the kernel's counters, or fall back to psutil."""
        self._file = os.open(STAT, os.O_RDONLY) if STAT.exists() else None
        self._tick_s = 1 / os.sysconf("SC_CLK_TCK")
        self._size = 4096 + 256 * (psutil.cpu_count() or 1)

    def read(self) -> tuple[list[float], float | None]:
        """Busy seconds of each core, and stolen ones of all; None where nothing counts them."""
        if self._file is None:
            return [round(t.user + getattr(t, "nice", 0.0) + t.system, 2) for t in psutil.cpu_times(percpu=True)], None
        return parse_stat(os.pread(self._file, self._size, 0), self._tick_s)


def parse_stat(text: bytes, tick_s: float) -> tuple[list[float], float]:
    """Busy seconds of each core and stolen seconds of all, of /proc/stat (proc(5)): user, nice, system; steal."""
    rows = [line.split() for line in text.split(b"\n", 4096) if line.startswith(b"cpu")]
    busy_s = [round((int(row[1]) + int(row[2]) + int(row[3])) * tick_s, 2) for row in rows[1:]]
    return busy_s, round(int(rows[0][8]) * tick_s, 2)


def memory_stall_s() -> float:
    """Seconds in which every task waited for memory (PSI `full`, the kernel's Documentation/accounting/psi.rst)."""
    rows = {line.split()[0]: line.split()[-1] for line in PRESSURE.read_text().splitlines()}
    return int(rows["full"].removeprefix("total=")) / 1e6


def _quota_file() -> Path | None:
    """`cpu.stat` of this process's own cgroup, version 2 or 1; in a container its own root often is the mount."""
    try:
        rows = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return None
    found = []
    for _, controllers, path in rows:
        if not controllers:
            found += [CGROUPS / path.lstrip("/") / "cpu.stat", CGROUPS / "cpu.stat"]
        elif "cpu" in controllers.split(","):
            found += [CGROUPS / "cpu" / path.lstrip("/") / "cpu.stat", CGROUPS / "cpu" / "cpu.stat"]
    return next((file for file in found if _has_quota(file)), None)


def _has_quota(file: Path) -> bool:
    try:
        return parse_throttled_s(file.read_text()) is not None
    except OSError:
        return False


def quota_throttled_s(file: Path | None) -> float:
    """Seconds that the CPU quota (CFS bandwidth) has kept the cgroup from running. Raises OSError without one."""
    throttled_s = parse_throttled_s(file.read_text()) if file is not None else None
    if throttled_s is None:
        raise OSError("no cpu.stat with throttling")
    return throttled_s


def parse_throttled_s(text: str) -> float | None:
    """The time in a `cpu.stat`: `throttled_usec` of cgroup version 2, `throttled_time` (ns) of version 1."""
    rows: Mapping[str, str] = dict(line.split(None, 1) for line in text.splitlines() if " " in line)
    if "throttled_usec" in rows:
        return int(rows["throttled_usec"]) / 1e6
    return int(rows["throttled_time"]) / 1e9 if "throttled_time" in rows else None


def _clocks_mhz() -> list[int]:
    clocks = psutil.cpu_freq(percpu=True)
    if not clocks:
        raise LookupError("the CPU's clock cannot be read here")
    return [round(clock.current) for clock in clocks]
