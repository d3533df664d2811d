"""What collectives cost: every kind, in groups of every size, over a range of bytes.

The runtime's own calls are measured (`runtime.collectives`), and bytes are those that they report: what a rank sends,
as `layout.traffic` counts it, so that a predicted collective can be priced as it stands. Groups of one size work at
the same time, as those of a layout do. A call's time is that of the slowest rank.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from headgrid.experiment.calibrate_fit import fit_line
from headgrid.runtime.collectives import Axis, Recorder, barrier
from headgrid.runtime.mesh import GroupPool
from headgrid.spec.calibration import KINDS

SIZES = {
    "cuda": tuple(4096 * 4**power for power in range(9)),
    "cpu": tuple(1024 * 4**power for power in range(7)),
}
"""Bytes that a rank sends, about: 4 KiB to 256 MiB between GPUs, 1 KiB to 4 MiB through gloo."""
DTYPE = {"cuda": torch.float16, "cpu": torch.float32}
POINT_S = {"cuda": 0.1, "cpu": 0.08}
"""For which a size is measured, if LEAST_WINDOWS do not take longer."""
LEAST_WINDOWS, MOST_WINDOWS = 5, 15
WINDOW_S = {"cuda": 1e-2, "cpu": 2e-3}
"""Long against the time by which ranks leave a barrier apart."""
MOST_CALLS = 20
"""In one graph."""


@dataclass(frozen=True, slots=True)
class Question:
    """One kind of collective in groups of one size."""

    kind: str
    ranks: int
    groups: tuple[tuple[int, ...], ...]


def questions(ranks: int) -> Iterator[Question]:
    """Groups of neighbouring ranks: of 2, 4, 8, ... where these divide all ranks, and of all. Messages: in pairs."""
    counts = [count for power in range(1, ranks.bit_length()) if ranks % (count := 1 << power) == 0 and count < ranks]
    for count in [*counts, ranks] if ranks > 1 else []:
        groups = tuple(tuple(range(first, first + count)) for first in range(0, ranks, count))
        yield from (Question(kind, count, groups) for kind in KINDS if kind != "send" or count == 2)
    if ranks % 2 and ranks > 1:  # the last one has no partner
        pairs = tuple((first, first + 1) for first in range(0, ranks - 1, 2))
        yield Question("send", 2, (*pairs, (ranks - 1,)))


def answer(question: Question, pool: GroupPool, device: torch.device) -> dict[str, Any]:
    """A `spec.calibration.Cost` as a dict, the same on every rank."""
    axis = pool.axis("calibrated", question.groups)
    points = [_point(question, axis, size, device) for size in SIZES[device.type]]
    line = fit_line([point["size_bytes"] for point in points], [point["median_s"] for point in points])
    graphed = _in_graph(question.kind, device)
    return {"kind": question.kind, "ranks": question.ranks, "graphed": graphed, **line._asdict(), "points": points}


def _point(question: Question, axis: Axis, size_bytes: int, device: torch.device) -> dict[str, Any]:
    call = _call(question.kind, axis, size_bytes, device)
    recorder = Recorder()
    axis.observers.append(recorder)
    call()
    axis.observers.remove(recorder)
    sent = _largest([sum(issued.bytes for issued in recorder.issued if issued.kind == question.kind)], device)[0]
    once = _largest([_timed(call, device)], device)[0]
    calls = max(1, min(MOST_CALLS, int(WINDOW_S[device.type] / once)))
    replays = max(1, int(WINDOW_S[device.type] / (once * calls)))
    some = _repeated(call, calls, graphed=_in_graph(question.kind, device))
    many, calls = _repeated(some, replays, graphed=False), calls * replays
    many()
    windows = int(max(LEAST_WINDOWS, min(MOST_WINDOWS, POINT_S[device.type] / (once * calls))))
    times = _largest([_timed(many, device) / calls for _ in range(windows)], device)
    row = {"median_s": median(times), "low_s": min(times), "high_s": max(times), "n": len(times)}
    return {"size_bytes": round(sent), **row}


def _call(kind: str, axis: Axis, size_bytes: int, device: torch.device) -> Callable[[], object]:
    """A call in which a rank sends about so many bytes; nothing for a rank without partners."""
    g, dtype = axis.size, DTYPE[device.type]
    if g == 1:
        return lambda: None
    sent = max(1, size_bytes // (dtype.itemsize * (g - 1)))  # elements for each of the others
    whole = torch.randn(sent * g, device=device).to(dtype)
    part, equal = whole[:sent].clone(), [sent] * g
    if kind == "all_reduce":
        half = torch.zeros(max(1, sent * g // 2), device=device, dtype=dtype)  # sums of zeros stay finite
        return lambda: axis.all_reduce(half)
    if kind == "send":
        return lambda: _message(axis, part)
    calls: dict[str, Callable[[], object]] = {
        "all_gather": lambda: axis.all_gather(part, equal),
        "reduce_scatter": lambda: axis.reduce_scatter(whole, equal),
        "all_to_all": lambda: axis.all_to_all(whole, equal, equal),
    }
    return calls[kind]


def _message(axis: Axis, x: torch.Tensor) -> None:
    """From the first of a pair to the second, and nothing back: the second's time is that of the message."""
    if axis.index == 0:
        work = axis.start_send(x, 1)
        if work is not None:
            work.wait()
    else:
        axis.start_receive(x, 0).wait()


def _in_graph(kind: str, device: torch.device) -> bool:
    return device.type == "cuda" and kind != "send"  # the runtime sends outside of its graphs


def _repeated(call: Callable[[], object], calls: int, *, graphed: bool) -> Callable[[], object]:
    def many() -> None:
        for _ in range(calls):
            call()

    if not graphed:
        return many
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog asks too
        many()
    return graph.replay


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of this rank from a common barrier until its work has ended."""
    barrier(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _largest(values: list[float], device: torch.device) -> list[float]:
    """Each of the values on the rank where it is largest."""
    x = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x.tolist()
