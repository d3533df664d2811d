"""One pass on a GPU under torch.profiler: what ran on the device, when, and which of it was which collective."""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, supported_activities

from headgrid.experiment.breakdown.activities import Activity, matched, recorded, short_name
from headgrid.experiment.breakdown.calls import Call
from headgrid.experiment.breakdown.intervals import Account, Union, account, union
from headgrid.experiment.breakdown.perfetto import STEP, Bar
from headgrid.experiment.breakdown.watch import Seen, called, told
from headgrid.runtime.collectives import barrier

SHORTEST_GAP_NS = 1_000
"""Gaps are drawn from this length on; all of them are counted."""


@dataclass(frozen=True, slots=True)
class Profiled:
    """A pass: its duration by the host's clock, ns, and the device's events, or why there are none."""

    step: int
    events: Sequence[dict[str, Any]]
    unavailable: str | None


def profiled(device: torch.device, work: Callable[[], object]) -> Profiled:
    """Run `work` behind a barrier and record the device. Whatever becomes of the profiler, the work is done, so that
    ranks stay together.
    """
    recorder, why = _started(device)
    barrier(device)
    start = time.perf_counter_ns()
    work()
    torch.cuda.synchronize(device)
    step = time.perf_counter_ns() - start
    if recorder is None:
        return Profiled(step, (), why)
    try:
        recorder.stop()
        return Profiled(step, _exported(recorder), None)
    except (RuntimeError, OSError, ValueError, LookupError) as error:
        return Profiled(step, (), f"torch.profiler failed: {_first_line(error)}")


def _started(device: torch.device) -> tuple[profile | None, str | None]:
    """A profiler that records; a short one before it takes what CUPTI needs to wake up."""
    if ProfilerActivity.CUDA not in supported_activities():
        return None, "this torch cannot record GPU activities (it was built without CUPTI)"
    try:
        with profile(activities=[ProfilerActivity.CUDA]):
            torch.zeros(1, device=device)
            torch.cuda.synchronize(device)
        recorder = profile(activities=[ProfilerActivity.CUDA])
        recorder.start()
    except RuntimeError as error:
        return None, f"torch.profiler did not start: {_first_line(error)}"
    return recorder, None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _exported(recorder: profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorder.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """What became of a rank's step on its GPU; `unmatched`: why calls have no times."""

    account: Account
    calls: list[Call]
    bars: list[Bar]
    unmatched: str | None


def device_step(events: Sequence[dict[str, Any]], seen: Sequence[Seen], *, alone: bool) -> DeviceStep | str:
    """The account of a rank's events, given what it issued. Or why there is none. `alone`: there is no other rank."""
    record = recorded(events, alone=alone)
    found, begun, origin = record.activities, record.begun, record.origin
    if not found:
        return "torch.profiler recorded nothing on the device (CUPTI may be forbidden or used by another tool)"
    computing = union((a.start, a.end) for a in found if not a.communicates)
    talking = [(a.start, a.end) for a in found if a.communicates]
    pairs = matched(found, [each.issued.kind for each in seen], [each.issued.bytes for each in seen])
    unmatched = pairs if isinstance(pairs, str) else None
    carriers: list[Activity | None] = [None] * len(seen) if isinstance(pairs, str) else pairs
    calls = [_call(each, carrier, computing, unmatched) for each, carrier in zip(seen, carriers, strict=True)]
    names = {carrier: call for carrier, call in zip(carriers, calls, strict=True) if carrier is not None}
    whole = account(begun, computing.intervals, talking)
    bars = [_bar(each, origin, names.get(each)) for each in found]
    bars.append(Bar(STEP, STEP, begun - origin, begun - origin + whole.span, "phase", {}))
    gaps = union([*computing.intervals, *talking]).gaps(begun, begun + whole.span)
    bars += [
        Bar("idle", "idle", start - origin, end - origin, "idle", {})
        for start, end in gaps.intervals
        if end - start >= SHORTEST_GAP_NS
    ]
    return DeviceStep(whole, calls, bars, unmatched)


def _call(seen: Seen, carrier: Activity | None, computing: Union, unmatched: str | None) -> Call:
    issued, took, exposed, hidden = seen.issued, None, None, None
    if carrier is not None:
        took = carrier.end - carrier.start
        hidden = computing.within(carrier.start, carrier.end)
        exposed = took - hidden
    elif unmatched is None:  # no bytes: nothing was launched
        took = exposed = hidden = 0
    return Call(issued.kind, issued.axis, issued.bytes, seen.layer, seen.gathers, took, exposed, hidden)


def _bar(each: Activity, origin: int, call: Call | None) -> Bar:
    start, end = each.start - origin, each.end - origin
    category = "communication" if each.communicates else "compute"
    if call is None:
        return Bar(f"stream {each.stream}", short_name(each.name), start, end, category, {})
    return Bar(f"stream {each.stream}", called(call), start, end, category, told(call) | {"kernel": each.name[:120]})
