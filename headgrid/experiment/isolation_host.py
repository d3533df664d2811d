"""Codes that the host gives: other load, stolen and throttled time, memory, preemption, and the sampler's own clock."""

from collections.abc import Iterator
from itertools import pairwise

from headgrid.experiment.isolation_evidence import Check, Evidence, Finding, Severity
from headgrid.experiment.telemetry_series import merged, values_of

FOREIGN_LOAD = (0.05, 0.25)
"""Shares of this run's cores that others computed on: suspect, invalid. The kernel's own work stays below 1 or 2 %."""
STEAL = (0.01, 0.05)
"""Shares of the cores' time that a hypervisor took: suspect, invalid. On a host of one's own it is 0."""
INVOLUNTARY_PER_S = 50.0
"""Preemptions of a rank a second. A preempted task waits for a slice of a few ms, so this is some 10 % of the time; a
rank that has a core to itself sees a handful."""
MEMORY_LOW = 0.05
"""Share of the host's memory still available, below which the kernel begins to reclaim what is in use."""
MEMORY_STALL = 0.01
"""Share of the time in which every task waited for memory (PSI `full`)."""
COARSEST_S = 1.0
"""Stolen time is counted in ticks of 10 ms, so it takes a second to tell 1 %."""
GAP_PERIODS, GAP_S = 5.0, 1.0
"""The sampler was silent for longer than this many periods, and than this: what happened then is unknown."""
CLOCK_STEP_S = 0.05
"""A step of Unix time against the monotonic clock; both are read within 1 ms of one another, and slewing moves both."""


def _graded(share: float, limits: tuple[float, float]) -> Severity | None:
    suspect, invalid = limits
    return "INVALID" if share > invalid else "SUSPECT" if share > suspect else None


def _foreign_load(evidence: Evidence) -> Iterator[Finding]:
    """What the cores computed beyond the run's own processes."""
    for start, end, seconds, foreign_s in foreign_seconds(evidence):
        share = foreign_s / (seconds * len(evidence.cores))
        severity = _graded(share, FOREIGN_LOAD)
        if severity is not None:
            text = f"other processes took {share:.0%} of {len(evidence.cores)} cores"
            yield from evidence.during("CPU_FOREIGN_LOAD", severity, start, end, text)


def foreign_seconds(evidence: Evidence) -> Iterator[tuple[float, float, float, float]]:
    """Start, end and length of each time between two readings of the processes, and the CPU seconds of others in it.

    A process that appeared in between counts with all it ever computed, so foreign load is never overstated; one that
    ended took its last seconds with it, so such a time says nothing and is left out.
    """
    for session in evidence.telemetry.sessions if evidence.telemetry else ():
        samples = [sample for sample in session.samples if "process" in sample and "cpu_busy_s" in sample["host"]]
        for before, after in pairwise(samples):
            own = [values_of(sample, "process_cpu_s") or {} for sample in (before, after)]
            busy = [values_of(sample, "cpu_busy_s") or {} for sample in (before, after)]
            seconds = after["monotonic_s"] - before["monotonic_s"]
            if own[0].keys() <= own[1].keys() and seconds > 0:
                grown_s = sum(busy[1].get(core, 0.0) - busy[0].get(core, 0.0) for core in evidence.cores)
                own_s = sum(value - own[0].get(pid, 0.0) for pid, value in own[1].items())
                yield before["time_s"], after["time_s"], seconds, max(0.0, grown_s - own_s)


def _steal(evidence: Evidence) -> Iterator[Finding]:
    assert evidence.telemetry is not None
    cores = evidence.telemetry.sessions[-1].start["host"]["host_cores"]
    for point in merged(evidence.points("cpu_steal_s"), COARSEST_S):
        share = point.values[0] / (point.seconds * cores)
        severity = _graded(share, STEAL)
        if severity is not None:
            yield from evidence.at(point, "CPU_STEAL", severity, f"the hypervisor took {share:.1%} of the CPU time")


def _quota(evidence: Evidence) -> Iterator[Finding]:
    for point in evidence.points("quota_throttled_s"):
        if point.values[0] > 0:
            text = f"the container's CPU quota stopped it for {point.values[0]:.2f} s"
            yield from evidence.at(point, "CPU_QUOTA_THROTTLED", "INVALID", text)


def _memory(evidence: Evidence) -> Iterator[Finding]:
    assert evidence.telemetry is not None
    total = evidence.telemetry.sessions[-1].start["host"]["memory_total_bytes"]
    for point in evidence.points("memory_available_bytes"):
        if point.values[0] < MEMORY_LOW * total:
            text = f"{point.values[0] / 2**30:.1f} GiB of {total / 2**30:.0f} were available"
            yield from evidence.at(point, "MEMORY_LOW", "SUSPECT", text)


def _stalls(evidence: Evidence) -> Iterator[Finding]:
    for point in evidence.points("memory_stall_s"):
        if point.seconds and point.values[0] > MEMORY_STALL * point.seconds:
            text = f"everything waited for memory for {point.values[0] / point.seconds:.1%} of the time"
            yield from evidence.at(point, "MEMORY_STALLED", "INVALID", text)


def _swapping(evidence: Evidence) -> Iterator[Finding]:
    for counter, code in (("swapped_out_bytes", "PAGED_OUT"), ("swapped_in_bytes", "PAGED_IN")):
        for point in evidence.points(counter):
            if point.values[0] > 0:
                text = f"{point.values[0] / 2**20:.1f} MiB were {code.lower().replace('_', ' ')}"
                yield from evidence.at(point, code, "SUSPECT", text)


def _preemption(evidence: Evidence) -> Iterator[Finding]:
    for point in evidence.points("involuntary_switches"):
        for pid, count in point.values.items():
            if pid in evidence.pids and point.seconds and count / point.seconds > INVOLUNTARY_PER_S:
                text = f"rank {evidence.pids[pid]} was preempted {count / point.seconds:.0f} times a second"
                yield from evidence.at(point, "RANK_PREEMPTED", "SUSPECT", text)


def _oversubscribed(evidence: Evidence) -> str | None:
    ranks, cores = evidence.ranks, len(evidence.cores)
    if ranks > cores and evidence.design["device"] == "cpu":
        return f"{ranks} ranks on {cores} cores preempt each other anyway"
    return None


def _gaps(evidence: Evidence) -> Iterator[Finding]:
    """Times without a sample: between two, before the first sampler, and after one that ended before the run.

    A run that was begun without a sampler and resumed with one has such a time, too: what is called checked holds of
    all its blocks, and nobody saw the first ones.
    """
    assert evidence.telemetry is not None
    sessions = evidence.telemetry.sessions
    limit_s = [max(GAP_S, GAP_PERIODS / session.hz) for session in sessions]
    for session, limit in zip(sessions, limit_s, strict=True):
        for before, after in pairwise(session.samples):
            if (gap_s := after["monotonic_s"] - before["monotonic_s"]) > limit:
                text = f"the sampler was silent for {gap_s:.1f} s"
                yield from evidence.during("TELEMETRY_GAP", "SUSPECT", before["time_s"], after["time_s"], text)
    edges = [(s.start["time_s"], (s.samples[-1] if s.samples else s.start)["time_s"]) for s in sessions]
    uncovered = [float("-inf"), *(edge for pair in edges for edge in pair), float("inf")]
    for end_s, start_s, limit in zip(uncovered[::2], uncovered[1::2], [0.0, *limit_s], strict=True):
        if end_s + limit < start_s:
            yield from evidence.during("TELEMETRY_GAP", "SUSPECT", end_s + limit, start_s, "no sampler ran")


def _clock_steps(evidence: Evidence) -> Iterator[Finding]:
    for session in evidence.telemetry.sessions if evidence.telemetry else ():
        for before, after in pairwise((session.start, *session.samples)):
            step_s = after["time_s"] - before["time_s"] - (after["monotonic_s"] - before["monotonic_s"])
            if abs(step_s) > CLOCK_STEP_S:
                times = sorted((before["time_s"], after["time_s"]))
                text = f"the clock was set by {step_s:+.2f} s: samples there may belong to another block"
                yield from evidence.during("CLOCK_STEP", "SUSPECT", times[0], times[1], text)


CHECKS = (
    Check({"CPU_FOREIGN_LOAD": "other processes computed on this run's cores"}, _foreign_load, ("cpu_busy_s",)),
    Check({"CPU_STEAL": "a hypervisor took CPU time"}, _steal, ("cpu_steal_s",)),
    Check({"CPU_QUOTA_THROTTLED": "the container's CPU quota was used up"}, _quota, ("quota_throttled_s",)),
    Check({"MEMORY_LOW": "hardly any host memory was left"}, _memory, ("memory_available_bytes",)),
    Check({"MEMORY_STALLED": "the host waited for memory"}, _stalls, ("memory_stall_s",)),
    Check(
        {"PAGED_OUT": "memory was swapped out", "PAGED_IN": "memory was swapped in"}, _swapping, ("swapped_in_bytes",)
    ),
    Check(
        {"RANK_PREEMPTED": "a rank had to share its core"},
        _preemption,
        ("involuntary_switches",),
        unless=_oversubscribed,
    ),
    Check({"TELEMETRY_GAP": "the sampler was silent"}, _gaps),
    Check({"CLOCK_STEP": "the wall clock was set"}, _clock_steps),
)
