"""What the telemetry of a run says about each arm and phase: means, SDs, shares of ceilings, and what is missing."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from headgrid.experiment.ceilings import measured_ceilings
from headgrid.experiment.records import Phase, Record, block_times, of_kind
from headgrid.experiment.telemetry import COUNTERS, Session, Telemetry
from headgrid.experiment.telemetry_series import (
    PHASES,
    Point,
    Timeline,
    points,
    rank_gpus,
    rank_pids,
    ranks_of_hosts,
    windows,
)

MAX_REPORTED_LATENESS = 1.5
"""Ticks further apart than this many periods count as late."""


def summarise_telemetry(
    design: Mapping[str, Any], records: Sequence[Record], telemetry: Telemetry | None
) -> dict[str, Any] | None:
    """`telemetry` of summary.json; None if nothing was sampled.

    A figure is the mean over samples that lie wholly inside timed blocks of the arm, of the mean over the ranks' GPUs,
    cores or processes of the host that was sampled; `sd` is over samples, which follow one another and are not
    independent. `n` counts them. Ceilings are those of rank 0's host.
    """
    if telemetry is None or not telemetry.sessions:
        return None
    timeline, hosts = Timeline(windows(records)), telemetry.of_hosts()
    keys = {host: _keys(each, records, host) for host, each in hosts.items()}
    by_counter = {
        name: _joined(_collected(points(each, name), name, timeline, keys[host]) for host, each in hosts.items())
        for name in _reported()
    }
    measured = measured_ceilings(design, telemetry, keys[0]["gpu"])
    ceilings = _ceilings(telemetry, keys[0]["gpu"]) | measured
    return {
        **_sampling([session for each in hosts.values() for session in each.sessions]),
        **({"hosts": [_clock(host, each) for host, each in hosts.items()]} if len(hosts) > 1 else {}),
        "missing": [{"counter": name, "why": why} for name, why in sorted(_missing(hosts).items())],
        "arms": [
            {
                "label": arm["label"],
                "phases": {
                    phase: [
                        row | {"ceiling_measured": row["counter"] in measured}
                        for row in (
                            *_figures(by_counter, ceilings, arm["label"], phase),
                            *_derived(design, records, by_counter, measured, arm["label"], phase),
                        )
                    ]
                    for phase in PHASES
                },
            }
            for arm in design["arms"]
        ],
    }


def unsampled(records: Sequence[Record], telemetry: Telemetry | None) -> Iterator[str]:
    """A sentence about the ranks of hosts of which there are no samples, in a run on several."""
    ranks, sampled = ranks_of_hosts(records), telemetry.of_hosts() if telemetry is not None else {}
    without = [host for host in ranks if host not in sampled]
    if len(ranks) > 1 and without:
        yield (
            f"The ranks ran on {len(ranks)} hosts, and there are no samples of host{'s' * (len(without) > 1)}"
            f" {', '.join(map(str, without))} with {sum(ranks[host] for host in without)} of the"
            f" {sum(ranks.values())} ranks: these are unchecked."
        )


def _reported() -> list[str]:
    return [name for name, counter in COUNTERS.items() if counter.kind != "bits"]


def _missing(hosts: Mapping[int, Telemetry]) -> dict[str, str]:
    """Counters that did not answer, and why; of other hosts only what rank 0's does not say of its own."""
    found: dict[str, str] = {}
    for host, telemetry in hosts.items():
        said = telemetry.sessions[-1].missing
        found |= {name: f"host {host}: {why}" if host else why for name, why in said.items() if name not in found}
    return found


def _clock(host: int, telemetry: Telemetry) -> dict[str, Any]:
    """A host's samples, and how far its clock was ahead of rank 0's: least, most, and the worst bound on the error."""
    offsets = [clock["offset_s"] for clock in telemetry.clocks]
    return {
        "host": host,
        "samples": sum(len(session.samples) for session in telemetry.sessions),
        "clock_ahead_s": [min(offsets), max(offsets)] if offsets else None,
        "clock_error_s": max((clock["error_s"] for clock in telemetry.clocks), default=None),
    }


def _sampling(sessions: Sequence[Session]) -> dict[str, Any]:
    """How the sampling itself went."""
    ended = [(session, event) for session in sessions for event in session.events if event["kind"] == "stop"]
    seconds = sum(stop["monotonic_s"] - session.start["monotonic_s"] for session, stop in ended)
    spent = sum(stop["cpu_s"] for _, stop in ended)
    gaps = [
        after["monotonic_s"] - before["monotonic_s"]
        for session in sessions
        for before, after in pairwise(session.samples)
    ]
    late = sum(gap > MAX_REPORTED_LATENESS / sessions[-1].hz for gap in gaps)
    return {
        "hz": sessions[-1].hz,
        "samples": sum(len(session.samples) for session in sessions),
        "late_samples": late,
        "longest_gap_s": max(gaps, default=None),
        "sampler_cpu_share": spent / seconds if seconds else None,
        "sessions": len(sessions),
        "failures": [event["why"] for session in sessions for event in session.events if event["kind"] == "failed"],
    }


def _keys(telemetry: Telemetry, records: Sequence[Record], at: int) -> dict[str, set[int]]:
    host = telemetry.sessions[-1].start["host"]
    return {
        "gpu": set(rank_gpus(telemetry, records)),
        "core": set(host["cores"]),
        "host": {0},
        "process": set(rank_pids(records, at)),
    }


Collected = Mapping[tuple[str, Phase], list[float]]


def _joined(found: Iterable[Collected]) -> Collected:
    """The values of all hosts."""
    values: dict[tuple[str, Phase], list[float]] = {}
    for collected in found:
        for where, each in collected.items():
            values.setdefault(where, []).extend(each)
    return values


def _collected(found: Iterable[Point], name: str, timeline: Timeline, keys: Mapping[str, set[int]]) -> Collected:
    """Means over devices of the samples inside each arm's phase."""
    values: dict[tuple[str, Phase], list[float]] = {}
    counter = COUNTERS[name]
    for point in found:
        mine = [value for key, value in point.values.items() if key in keys[counter.place]]
        window = timeline.around(point)
        if window is None or not mine or (counter.kind == "total" and not point.seconds):
            continue
        mean = fmean(mine) / point.seconds if counter.kind == "total" else fmean(mine)
        values.setdefault((window.arm, window.phase), []).append(mean)
    return values


def _ceilings(telemetry: Telemetry, gpus: set[int]) -> dict[str, float]:
    """The mean ceiling of each counter over the ranks' GPUs, and of a core."""
    rows = [row["ceilings"] for row in telemetry.sessions[-1].start["gpus"] if row["index"] in gpus]
    names = {name for row in rows for name in row}
    known = {name: fmean(row[name] for row in rows) for name in names if all(name in row for row in rows)}
    return {"cpu_busy_s": 1.0, **known}


def _figures(
    by_counter: Mapping[str, Collected], ceilings: Mapping[str, float], arm: str, phase: Phase
) -> Iterator[dict[str, Any]]:
    for name, collected in by_counter.items():
        values = collected.get((arm, phase))
        if values:
            ceiling = ceilings.get(name)
            yield figure(name, COUNTERS[name].label, COUNTERS[name].unit, values, ceiling)


def figure(
    name: str, label: str, unit: str, values: Sequence[float], ceiling: float | None, derived: str | None = None
) -> dict[str, Any]:
    """One row: mean, SD (None for one value), largest, n, and the share of the ceiling where there is one.

    `derived`: how a figure came about that no counter gave; None for a counter's own.
    """
    mean = fmean(values)
    return {
        "counter": name,
        "label": label,
        "unit": unit,
        "mean": mean,
        "sd": stdev(values) if len(values) > 1 else None,
        "max": max(values),
        "n": len(values),
        "ceiling": ceiling,
        "share_of_ceiling": mean / ceiling if ceiling else None,
        "derived": derived,
    }


def _derived(
    design: Mapping[str, Any],
    records: Sequence[Record],
    by_counter: Mapping[str, Collected],
    measured: Mapping[str, float],
    arm: str,
    phase: Phase,
) -> Iterator[dict[str, Any]]:
    """Bytes over time where no counter told them."""
    times = list(block_times(records, arm, phase).values())
    steps = design["workload"]["decode_steps"] if phase == "decode" else 1
    if not times:
        return
    sent = sum(op["bytes_per_rank"] for op in _last_ops(records, arm, phase))
    if not by_counter["nvlink_tx_bytes_per_s"].get((arm, phase)):
        rates = [sent * steps / seconds for seconds in times]
        how = "bytes that the collectives of one rank send, over the block's time"
        yield figure("sent_bytes_per_s", "Sent by a rank", "B/s", rates, measured.get("sent_bytes_per_s"), how)
    held = _held_bytes(records, arm)
    if phase == "decode" and held and not by_counter["dram_bandwidth_percent"].get((arm, phase)):
        rates = [held * steps / seconds for seconds in times]
        how = "parameters and KV cache of the fullest rank, each read once a step, over the block's time"
        yield figure("read_bytes_per_s", "Weights and KV read", "B/s", rates, measured.get("read_bytes_per_s"), how)


def _last_ops(records: Sequence[Record], arm: str, phase: Phase) -> Sequence[Mapping[str, Any]]:
    found = [record["ops"] for record in of_kind(records, "traffic", arm) if record["phase"] == phase]
    return found[-1] if found else ()


def _held_bytes(records: Sequence[Record], arm: str) -> int | None:
    last = next(iter(list(of_kind(records, "memory", arm))[-1:]), None)
    sizes = [(row["parameters_bytes"], row["kv_cache_bytes"]) for row in last["per_rank"]] if last else []
    return max((sum(row) for row in sizes if None not in row), default=None)
