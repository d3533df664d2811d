"""Codes that GPUs' telemetry gives: other processes, throttling, clocks, temperature, memory and link errors.

Clock event reasons are NVML's (nvml.h, nvmlClocksEventReasons). The software power cap is what a 700 W GPU does under
any full load, so it is told, not held against a figure.
"""

from collections.abc import Callable, Iterator, Mapping
from statistics import fmean, median
from types import MappingProxyType

from headgrid.experiment.isolation_evidence import Check, Evidence, Finding, Severity, block_means
from headgrid.experiment.telemetry_series import Window

SW_POWER_CAP, HW_SLOWDOWN, SYNC_BOOST = 0x4, 0x8, 0x10
SW_THERMAL, HW_THERMAL, POWER_BRAKE = 0x20, 0x40, 0x80
CLOCK_DROP = 0.05
"""A block whose SM clock lies this share below its arm's median; NVBench discards below 75 % of the peak, we look for
what would move a figure by more than a few per cent."""
CLOCK_UNSETTLED = 0.02
"""Change of the clock from the first to the last third of a launch that is still settling, not noise: one clock step of
a Hopper GPU is 15 MHz, below 1 %."""
TEMPERATURE_DRIFT_C = 10.0
"""A GPU that warms by this much during the timed blocks was not warm when they began; leakage and clocks follow."""
IDLE_MEMORY_BYTES = 2**30
"""Memory in use before the ranks start: an idle data-centre GPU holds up to some hundred MiB for the driver."""
POWER_CAPPED_SHARE = 0.1
"""From this share of capped samples on, a lower clock is what the power limit makes of a heavier load."""

THROTTLE_BITS: Mapping[str, tuple[int, Severity, str]] = MappingProxyType(
    {
        "GPU_THERMAL_SLOWDOWN": (SW_THERMAL | HW_THERMAL, "INVALID", "slowed down by heat"),
        "GPU_POWER_BRAKE": (POWER_BRAKE, "INVALID", "slowed down by an external power brake"),
        "GPU_HW_SLOWDOWN": (HW_SLOWDOWN, "INVALID", "slowed down by its hardware"),
        "GPU_SYNC_BOOST": (SYNC_BOOST, "SUSPECT", "held to another GPU's clock by sync boost"),
        "GPU_POWER_CAP": (SW_POWER_CAP, "INFO", "at its power limit"),
    }
)


def _throttling(evidence: Evidence) -> Iterator[Finding]:
    for point in evidence.points("throttle_reasons"):
        for gpu, bits in point.values.items():
            for code, (mask, severity, said) in THROTTLE_BITS.items():
                if int(bits) & mask:
                    yield from evidence.at(point, code, severity, f"GPU {gpu} was {said}")


def _foreign_processes(evidence: Evidence) -> Iterator[Finding]:
    """Processes that are not ours. Of ids that mean nothing in this container, more than the ranks' own are foreign."""
    assert evidence.telemetry is not None
    ranks_per_gpu = _ranks_per_gpu(evidence)
    for session in evidence.telemetry.sessions:
        last_s = session.start["time_s"]
        for sample in session.samples:
            for gpu in evidence.gpus if "gpu_processes" in sample else ():
                rows = sample["gpu_processes"][gpu]
                unknown = sum(row["own"] is None for row in rows)
                own = sum(row["own"] is True for row in rows)
                foreign = sum(row["own"] is False for row in rows) + max(0, unknown - max(0, ranks_per_gpu - own))
                if foreign:
                    text = f"{foreign} process(es) of others computed on GPU {gpu}"
                    yield from evidence.during("GPU_FOREIGN_PROCESS", "INVALID", last_s, sample["time_s"], text)
            last_s = sample["time_s"] if "gpu_processes" in sample else last_s


def _ranks_per_gpu(evidence: Evidence) -> int:
    """How many ranks share a GPU: one, unless a launch names one device several times."""
    named = [record.get("device_uuids") or [] for record in evidence.records if record["kind"] == "launch"]
    return max((uuids.count(uuid) for uuids in named for uuid in uuids if uuid), default=1)


def _sampled_late(evidence: Evidence) -> str | None:
    """Why nothing is known about the time before the ranks."""
    sampled = any(point.end_s < evidence.first_start_s for point in evidence.points("memory_used_bytes"))
    return None if sampled else "the ranks ran before the first sample"


def _memory_taken(evidence: Evidence) -> Iterator[Finding]:
    """Memory in use when the sampler started, which is before the ranks do."""
    assert evidence.telemetry is not None
    before = [p for p in evidence.points("memory_used_bytes") if p.end_s < evidence.first_start_s]
    for gpu, used in (before[0].values if before else {}).items():
        if used > IDLE_MEMORY_BYTES:
            yield Finding("GPU_MEMORY_TAKEN", "SUSPECT", f"{used / 2**30:.1f} GiB of GPU {gpu} were taken beforehand")


def _clock_drops(evidence: Evidence) -> Iterator[Finding]:
    """A block's clock against the median of the same arm, phase and GPU."""
    means = block_means(evidence, "sm_clock_mhz")
    usual: dict[tuple[str, str, int], list[float]] = {}
    for (window, gpu), clock in means.items():
        usual.setdefault((window.arm, window.phase, gpu), []).append(clock)
    for (window, gpu), clock in means.items():
        norm = median(usual[window.arm, window.phase, gpu])
        if clock < (1 - CLOCK_DROP) * norm:
            text = f"GPU {gpu} ran at {clock:.0f} MHz, usually {norm:.0f} MHz in this arm and phase"
            yield Finding("GPU_CLOCK_DROP", "SUSPECT", text, window.launch, window.block, window.arm, window.phase)


def _clocks_between_arms(evidence: Evidence) -> Iterator[Finding]:
    means = block_means(evidence, "sm_clock_mhz")
    arms: dict[tuple[str, str], list[float]] = {}
    for (window, _), clock in means.items():
        arms.setdefault((window.phase, window.arm), []).append(clock)
    for phase in dict.fromkeys(phase for phase, _ in arms):  # in order: a set would give another example each time
        clocks = {arm: fmean(values) for (p, arm), values in arms.items() if p == phase}
        highest = max(clocks.values())
        for arm, clock in clocks.items():
            if clock < (1 - CLOCK_DROP) * highest:
                capped = _capped_share(evidence, arm, phase)
                severity: Severity = "INFO" if capped >= POWER_CAPPED_SHARE else "SUSPECT"
                text = (
                    f"in {phase}, {arm} ran at {clock:.0f} MHz, another arm at {highest:.0f};"
                    f" {capped:.0%} of its samples were at the power limit"
                )
                yield Finding("GPU_CLOCKS_DIFFER", severity, text, arm=arm, phase=phase)


def _capped_share(evidence: Evidence, arm: str, phase: str) -> float:
    flags = [
        bool(int(bits) & SW_POWER_CAP)
        for point in evidence.points("throttle_reasons")
        if (w := evidence.timeline.around(point)) is not None and (w.arm, w.phase) == (arm, phase)
        for bits in point.values.values()
    ]
    return fmean(flags) if flags else 0.0


def _thirds(means: dict[tuple[Window, int], float], launch: int) -> Iterator[tuple[int, float, float]]:
    """Of each GPU: the mean share of its arm's own level in the first and in the last third of a launch's blocks."""
    mine = {where: value for where, value in means.items() if where[0].launch == launch}
    levels: dict[tuple[str, str, int], list[float]] = {}
    for (window, gpu), value in mine.items():
        levels.setdefault((window.arm, window.phase, gpu), []).append(value)
    blocks = sorted({window.block for window, _ in mine})
    third = len(blocks) // 3
    if not third:
        return
    early, late = set(blocks[:third]), set(blocks[-third:])
    for gpu in sorted({gpu for _, gpu in mine}):
        shares = [
            (w.block, value / fmean(levels[w.arm, w.phase, gpu]))
            for (w, g), value in mine.items()
            if g == gpu and value
        ]
        first, last = ([share for block, share in shares if block in part] for part in (early, late))
        if first and last:
            yield gpu, fmean(first), fmean(last)


def _clocks_unsettled(evidence: Evidence) -> Iterator[Finding]:
    means = block_means(evidence, "sm_clock_mhz")
    for launch in sorted({window.launch for window, _ in means}):
        for gpu, first, last in _thirds(means, launch):
            if abs(last / first - 1) > CLOCK_UNSETTLED:
                text = f"the clock of GPU {gpu} changed by {last / first - 1:+.1%} from the first to the last blocks"
                yield Finding("GPU_CLOCKS_UNSETTLED", "SUSPECT", text, launch)


def _temperature_drift(evidence: Evidence) -> Iterator[Finding]:
    launches = sorted({window.launch for window in evidence.windows})
    for launch in launches:
        mine = [window for window in evidence.windows if window.launch == launch]
        start_s, end_s = mine[0].start_s, mine[-1].end_s
        during = [point for point in evidence.points("temperature_c") if start_s <= point.end_s <= end_s]
        for gpu in evidence.gpus if len(during) > 1 else ():
            first, last = during[0].values.get(gpu), during[-1].values.get(gpu)
            if first is not None and last is not None and abs(last - first) > TEMPERATURE_DRIFT_C:
                text = f"GPU {gpu} went from {first:.0f} to {last:.0f} °C during the timed blocks"
                yield Finding("GPU_TEMPERATURE_DRIFT", "SUSPECT", text, launch)


def _rising(counter: str, code: str, severity: Severity, what: str) -> Callable[[Evidence], Iterator[Finding]]:
    """A check for an error counter that should stand still."""

    def find(evidence: Evidence) -> Iterator[Finding]:
        for point in evidence.points(counter):
            for gpu, grown in point.values.items():
                if grown > 0:
                    yield from evidence.at(point, code, severity, f"GPU {gpu}: {grown:.0f} new {what}")

    return find


def _xids(evidence: Evidence) -> Iterator[Finding]:
    """A critical driver error spoils its launch: what came before may have been the cause."""
    assert evidence.telemetry is not None
    used = {row["uuid"] for row in evidence.gpu_rows}
    for event in evidence.telemetry.events("xid"):
        if event["gpu"] in used:
            yield from _at_launch(evidence, "GPU_XID", event["time_s"], f"{event['gpu']} reported Xid {event['xid']}")


def _lost(evidence: Evidence) -> Iterator[Finding]:
    assert evidence.telemetry is not None
    for event in evidence.telemetry.events("lost"):
        if event["gpu_index"] in evidence.gpus:
            text = f"the driver lost GPU {event['gpu_index']}"
            yield from _at_launch(evidence, "GPU_LOST", event["time_s"], text)


def _at_launch(evidence: Evidence, code: str, time_s: float, text: str) -> Iterator[Finding]:
    begun = [r for r in evidence.records if r["kind"] == "launch" and r.get("started_s", r["time_s"]) <= time_s]
    yield Finding(code, "INVALID", text, begun[-1]["launch"] if begun else None)


def _mixed(evidence: Evidence) -> Iterator[Finding]:
    rows = evidence.gpu_rows
    for keys, code, what in (
        (("name", "driver", "vbios", "mig", "ecc", "nvlinks"), "GPU_MIXED", "not alike"),
        (("power_limit_w",), "GPU_POWER_LIMITS_DIFFER", "under different power limits"),
    ):
        for key in keys:
            found = sorted({str(row.get(key)) for row in rows})
            if len(found) > 1:
                yield Finding(code, "SUSPECT", f"the GPUs are {what}: {key} is {', '.join(found)}")
    if any(row.get("mig") for row in rows):
        yield Finding("GPU_MIG", "SUSPECT", "a GPU is divided by MIG: others may use the rest of its memory and power")


def _error_check(counter: str, code: str, severity: Severity, what: str) -> Check:
    return Check({code: f"{what} rose"}, _rising(counter, code, severity, what), (counter,), device="cuda")


CHECKS = (
    Check(
        {code: f"a GPU was {said}" for code, (_, _, said) in THROTTLE_BITS.items()},
        _throttling,
        ("throttle_reasons",),
        device="cuda",
    ),
    Check(
        {"GPU_FOREIGN_PROCESS": "other processes computed on a rank's GPU"},
        _foreign_processes,
        ("gpu_processes",),
        device="cuda",
    ),
    Check(
        {"GPU_MEMORY_TAKEN": "memory was in use before"},
        _memory_taken,
        ("memory_used_bytes",),
        device="cuda",
        unless=_sampled_late,
    ),
    Check({"GPU_CLOCK_DROP": "a block ran at a lower clock"}, _clock_drops, ("sm_clock_mhz",), device="cuda"),
    Check(
        {"GPU_CLOCKS_DIFFER": "arms ran at different clocks"}, _clocks_between_arms, ("sm_clock_mhz",), device="cuda"
    ),
    Check({"GPU_CLOCKS_UNSETTLED": "clocks were still settling"}, _clocks_unsettled, ("sm_clock_mhz",), device="cuda"),
    Check({"GPU_TEMPERATURE_DRIFT": "a GPU was not yet warm"}, _temperature_drift, ("temperature_c",), device="cuda"),
    Check({"GPU_XID": "a critical driver error"}, _xids, ("xid_events",), device="cuda"),
    Check({"GPU_LOST": "a GPU disappeared"}, _lost, device="cuda"),
    Check(
        {
            "GPU_MIXED": "GPUs are not alike",
            "GPU_POWER_LIMITS_DIFFER": "power limits differ",
            "GPU_MIG": "a GPU is divided",
        },
        _mixed,
        device="cuda",
    ),
    _error_check("ecc_corrected", "GPU_ECC_CORRECTED", "SUSPECT", "corrected ECC errors"),
    _error_check("ecc_uncorrected", "GPU_ECC_UNCORRECTED", "INVALID", "uncorrected ECC errors"),
    _error_check("nvlink_replays", "NVLINK_REPLAYS", "SUSPECT", "NVLink replays"),
    _error_check("nvlink_crc_errors", "NVLINK_CRC_ERRORS", "SUSPECT", "NVLink CRC errors"),
    _error_check("nvlink_recoveries", "NVLINK_RECOVERIES", "INVALID", "NVLink recoveries"),
    _error_check("pcie_replays", "PCIE_REPLAYS", "SUSPECT", "PCIe replays"),
)
