"""What a GPU did, from the events that torch.profiler exports: kernels, copies, and which of them communicate.

Kernel names tell what communicates: NCCL's own, those of `runtime.kernels.peers_triton`, which read other GPUs'
memory, and copies between devices. Everything else that runs on a GPU counts as computing, copies within its memory
too. A peers' kernel that sums and norms in one counts as communication as a whole.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

PEERS = {
    "sum_add_norm": "all_reduce",
    "to_rows": "all_to_all",
    "to_channels": "all_to_all",
    "to_all": "all_gather",
    "to_keys": "all_gather",
    "merge_parts": "all_to_all",
}
"""Kernels that load from the memory of other ranks, and the collective that each is reported as."""
_PEERS = re.compile(rf"({'|'.join(PEERS)})(_\d\w*)?$")
_NCCL = re.compile(r"(?:void )?nccl\w*?Kernel_?(\w*)")
_VERBS = {
    "AllReduce": frozenset({"all_reduce"}),
    "ReduceScatter": frozenset({"reduce_scatter"}),
    "AllGather": frozenset({"all_gather"}),
    "AllToAll": frozenset({"all_to_all", "all_gather", "reduce_scatter"}),
    "SendRecv": frozenset({"send", "recv", "all_to_all", "all_gather", "reduce_scatter"}),
    "Generic": frozenset({"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "recv"}),
}
"""What a kernel of NCCL may carry out. Uneven all-gathers and reduce-scatters are all-to-alls, and these are sends."""
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}
_SYNCHRONISES = "cudaDeviceSynchronize"


@dataclass(frozen=True, slots=True)
class Activity:
    """Something that a GPU did from `start` to `end`, in nanoseconds of the profiler's clock.

    `carries`: the kinds of collectives that it may be; empty for what computes. `launched`: when the host launched it;
    its start where that is not known.
    """

    name: str
    stream: int
    start: int
    end: int
    launched: int
    communicates: bool
    carries: frozenset[str]


def carried_by(name: str) -> frozenset[str] | None:
    """The kinds of collectives that a kernel or copy of this name may carry out; None if it computes."""
    if peers := _PEERS.match(name):
        return frozenset({PEERS[peers[1]]})
    if nccl := _NCCL.match(name):
        verb = next((verb for verb in _VERBS if verb.lower() in nccl[1].lower()), None)
        return _VERBS[verb] if verb else frozenset()
    if name.startswith("Memcpy PtoP"):
        return frozenset()
    return None


def _ns(microseconds: float) -> int:
    return round(microseconds * 1e3)


@dataclass(frozen=True, slots=True)
class Recorded:
    """What ran on a device behind the barrier that a trace begins with, by start.

    `origin`: when the barrier was over on the device, at nearly the same moment on all ranks. `begun`: when the host
    went on from it; the same where that was not recorded.
    """

    activities: list[Activity]
    origin: int
    begun: int


def recorded(events: Iterable[Mapping[str, Any]], *, alone: bool) -> Recorded:
    """What the "traceEvents" of an exported trace tell.

    The barrier is all that began before the host had waited for the device once; where no such wait was recorded, all
    up to the first communication, or where a rank is `alone` nothing.
    """
    listed = [event for event in events if event.get("ph") == "X" and "ts" in event]
    launched = {
        event["args"]["correlation"]: _ns(event["ts"])
        for event in listed
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    found = sorted(
        (_activity(event, launched) for event in listed if event.get("cat") in _ON_DEVICE), key=attrgetter("start")
    )
    waits = sorted(_ns(e["ts"] + e.get("dur", 0)) for e in listed if e.get("name") == _SYNCHRONISES)
    ahead, wait = _barrier(found, waits, alone=alone)
    first = found[ahead].start if ahead < len(found) else 0
    origin = max((each.end for each in found[:ahead]), default=first)
    return Recorded(found[ahead:], origin, max(origin, min(first, wait or origin)))


def _barrier(found: Sequence[Activity], waits: Sequence[int], *, alone: bool) -> tuple[int, int | None]:
    """How many activities belong to the barrier, and when the host had waited for it, if that was recorded."""
    for wait in waits:
        ahead = sum(each.start < wait for each in found)
        if 0 < ahead < len(found):
            return ahead, wait
    return next((place + 1 for place, each in enumerate(found) if each.communicates and not alone), 0), None


def _activity(event: Mapping[str, Any], launched: Mapping[Any, int]) -> Activity:
    args, start = event.get("args", {}), _ns(event["ts"])
    carries = carried_by(event["name"])
    return Activity(
        event["name"],
        int(args.get("stream", event.get("tid", 0)) or 0),
        start,
        start + _ns(event.get("dur", 0)),
        launched.get(args.get("correlation"), start),
        carries is not None,
        carries or frozenset(),
    )


def in_order_of_issue(activities: Sequence[Activity]) -> list[Activity]:
    """What carries out collectives, as the host issued it: by launch, within a CUDA graph by start."""
    return sorted((a for a in activities if a.carries), key=lambda each: (each.launched, each.start))


def matched(activities: Sequence[Activity], kinds: Sequence[str], sizes: Sequence[int]) -> list[Activity | None] | str:
    """For each collective, of these kinds and bytes, in the order of issue, the activity that carried it out.

    One of no bytes may have none (NCCL launches nothing for it): then none of them has. Or why they do not match.
    """
    carried = in_order_of_issue(activities)
    for chosen in (list(range(len(kinds))), [place for place, size in enumerate(sizes) if size]):
        if len(chosen) != len(carried):
            continue
        pairs = list(zip(chosen, carried, strict=True))
        wrong = next(((place, each) for place, each in pairs if kinds[place] not in each.carries), None)
        if wrong is not None:
            return f"call {wrong[0]} of {len(kinds)} is {kinds[wrong[0]]}, the device ran {wrong[1].name:.60}"
        found: list[Activity | None] = [None] * len(kinds)
        for place, each in pairs:
            found[place] = each
        return found
    return f"{len(kinds)} collectives were issued, the device ran {len(carried)}"


def short_name(name: str) -> str:
    """A kernel's name without its types and template arguments, for people."""
    bare = re.sub(r"\(.*|<.*", "", name.removeprefix("void ")) or name
    return bare.split("::")[-1][:80] if "::" in bare else bare[:80]
