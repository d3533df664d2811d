"""What a rank issues in a pass that is watched: every collective, its layer, and on a CPU when it kept the rank.

On a GPU the host only issues: times come from the device (`gpu`), matched by order. On a CPU the rank's main thread
computes and waits itself, so its own clocks tell: `HostClock`.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from greenlet import getcurrent
from torch import Tensor

from headgrid.experiment.breakdown.calls import Call
from headgrid.experiment.breakdown.perfetto import Bar
from headgrid.layout.batching import MicroBatch
from headgrid.layout.layout import Layout
from headgrid.layout.shards import stage_layers
from headgrid.layout.traffic import (
    Collective,
    gathered_weights,
    layer_calls,
    leave_calls,
    logits_calls,
    pick_calls,
    stationary_step,
)
from headgrid.runtime.collectives import Issued
from headgrid.runtime.engine import Engine
from headgrid.runtime.layer import Layer
from headgrid.runtime.stage import Stage
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

MESSAGES = ("pp", "pp_back")
_READS = 8
Labelled = tuple[int | None, Collective]


def decode_sequence(
    model: ModelSpec, layout: Layout, workload: Workload, rank: int, micro_batch: MicroBatch
) -> list[Labelled]:
    """What a stage issues for one micro-batch of a decode step, in its order, with the layer of each call; without
    messages between stages, which are issued around it.
    """
    step, stage = stationary_step(model, layout, workload, rank, micro_batch), layout.coordinates(rank).pp
    found: list[Labelled] = [(None, call) for call in leave_calls(step)] if stage == 0 else []
    layers = stage_layers(model, layout)[stage]
    for layer in range(layers.start, layers.stop):
        found += [(layer, call) for call in layer_calls(step)]
    if stage == layout.pp - 1:
        ends = (*pick_calls(step), *logits_calls(model, layout, rank, step.ending, step.element_bytes))
        found += [(None, call) for call in ends]
    return found


@dataclass(slots=True)
class Seen:
    """A call as it was issued; of `host` times the rank's clock at its start and end, and at waits for it."""

    issued: Issued
    layer: int | None
    gathers: bool
    start: int | None = None
    end: int | None = None
    waits: list[tuple[int, int]] = field(default_factory=list)


class Log:
    """Everything that one rank issues during one pass: an observer of its mesh, its layers and its micro-batches."""

    def __init__(self, engine: Engine, model: ModelSpec, workload: Workload, clock: "HostClock | None") -> None:
        """`clock` where this rank's own thread waits for collectives."""
        layout, rank = engine.layout, engine.mesh.rank
        self.calls: list[Seen] = []
        self.computed: list[tuple[str, int, int]] = []
        """Micro-batches and layers: name, start and end by the clock."""
        self._clock, self._open = clock, {}
        own = stage_layers(model, layout)[engine.mesh.at.pp]
        self._layers = range(own.start, own.stop)
        self._current: dict[Any, int] = {}
        self._sequences = [decode_sequence(model, layout, workload, rank, mb) for mb in engine.decode_plan]
        self._due: Iterator[Labelled] | None = None
        gathered = layout.weights == "gathered"
        self._parts = len(gathered_weights(model, layout, rank, workload.element_bytes)) if gathered else 0
        self._gathers = count()

    @contextmanager
    def watching(self, engine: Engine) -> Iterator[None]:
        """Watch all that the engine does inside the block."""
        stages: Sequence[Stage] = engine.path.stages
        for stage in stages:
            stage.apply = self._told(stage.apply)  # type: ignore[method-assign]
        for axis in engine.mesh.axes if self._clock else ():
            axis.timing = self._waits
        try:
            with engine.mesh.observed(self):
                yield
        finally:
            for stage in stages:
                del stage.apply
            for axis in engine.mesh.axes:
                axis.timing = None

    def _told(self, apply: Callable[..., None]) -> Callable[..., None]:
        def told(layer: Layer, index: int, *rest: Any) -> None:
            coroutine, start = getcurrent(), self._now()
            self._current[coroutine] = self._layers[index]
            try:
                apply(layer, index, *rest)
            finally:
                del self._current[coroutine]
                self._computed(f"layer {self._layers[index]}", start)

        return told

    def _now(self) -> int:
        return self._clock.now() if self._clock else 0

    def _computed(self, name: str, start: int) -> None:
        if self._clock:
            self.computed.append((name, start, self._clock.now()))

    def __call__(self, phase: str, micro_batch: int, step: int, compute: Callable[[], Tensor]) -> Tensor:
        """A micro-batch passes this stage. In decode the order of its calls is known, also where a graph is replayed
        and nothing is issued.
        """
        start, before = self._now(), len(self.calls)
        if phase == "decode":
            self._due = iter(self._sequences[micro_batch])
        result = compute()
        if phase == "decode" and len(self.calls) == before:
            for layer, call in self._sequences[micro_batch]:
                self.calls.append(Seen(Issued(call.kind, call.axis, call.bytes), layer, False))
        self._due = None
        self._computed(f"micro-batch {micro_batch}" + (f", step {step}" if phase == "decode" else ""), start)
        return result

    def before(self, issued: Issued) -> None:
        """A call is about to be issued."""
        layer, gathers = self._place(issued)
        seen = Seen(issued, layer, gathers)
        self.calls.append(seen)
        self._open[id(issued)] = seen
        if self._clock:
            seen.start = self._clock.now() if issued.overlapped else self._clock.enter()

    def after(self, issued: Issued, result: Tensor) -> None:
        """Its result is there; a message to another rank is still on its way."""
        seen = self._open[id(issued)]
        if self._clock:
            seen.end = self._clock.now() if issued.overlapped else self._clock.leave()

    def _place(self, issued: Issued) -> tuple[int | None, bool]:
        """The layer that a call belongs to, and whether it gathers that layer's weights."""
        if issued.axis in MESSAGES:
            return None, False
        if self._due is not None:
            return next(self._due, (None, None))[0], False
        layer = self._current.get(getcurrent())
        if layer is None and self._parts and issued.overlapped and issued.kind == "all_gather":
            return self._layers[next(self._gathers) // self._parts % len(self._layers)], True
        return layer, False

    def _waits(self, issued: Issued, wait: Callable[[], object]) -> None:
        assert self._clock is not None
        start = self._clock.enter()
        wait()
        seen = self._open[id(issued)]
        seen.end = self._clock.leave()
        seen.waits.append((start, seen.end))

    def host_calls(self) -> list[Call]:
        """The calls by the rank's own clock. One that is waited for later than it is issued may have ended at any time
        before: only what the rank waited for it is known.
        """
        found: list[Call] = []
        for seen in self.calls:
            took = None
            if not seen.issued.overlapped and seen.start is not None and seen.end is not None:
                took = seen.end - seen.start
            exposed = sum(end - start for start, end in seen.waits) if took is None else took
            hidden = None if took is None else 0
            found.append(_call(seen, took, exposed, hidden))
        return found

    def untimed(self) -> list[Call]:
        """The calls, of which no times are known."""
        return [_call(seen, None, None, None) for seen in self.calls]

    def host_bars(self, start: int) -> list[Bar]:
        """What the rank's thread did, from `start` on: its layers and micro-batches, and where it waited for others."""
        found = [Bar("computes", name, one - start, end - start, "phase", {}) for name, one, end in self.computed]
        for seen, call in zip(self.calls, self.untimed(), strict=True):
            blocked = seen.waits
            if not seen.issued.overlapped and seen.start is not None and seen.end is not None:
                blocked = [(seen.start, seen.end)]
            found += [
                Bar("waits for others", called(call), one - start, end - start, "communication", told(call))
                for one, end in blocked
            ]
        return found


def called(call: Call) -> str:
    """A call's name in a picture."""
    what = "weights" if call.gathers else f"{call.kind} {call.axis}"
    return what if call.layer is None else f"{what}, layer {call.layer}"


def told(call: Call) -> dict[str, Any]:
    """What a picture tells of a call when it is touched."""
    return {"collective": call.kind, "axis": call.axis, "bytes": call.bytes, "layer": call.layer}


def _call(seen: Seen, time_ns: int | None, exposed: int | None, hidden: int | None) -> Call:
    issued = seen.issued
    return Call(issued.kind, issued.axis, issued.bytes, seen.layer, seen.gathers, time_ns, exposed, hidden)


class HostClock:
    """The clocks of this rank's main thread: how long it ran, and how long it was ready to run without a core.

    Both are the kernel's own counts, so that neither is what the other leaves over: CPU time of the thread, and its
    time in run queues (/proc/<pid>/task/<tid>/schedstat, Linux's Documentation/scheduler/sched-stats.rst). Between
    `enter` and `leave` the thread waits for others, and neither counts.
    """

    def __init__(self) -> None:
        """For the thread that calls this. `without_queue`: why there is no time in run queues, if there is none."""
        self.without_queue: str | None = None
        self._file: int | None = None
        path = f"/proc/{os.getpid()}/task/{threading.get_native_id()}/schedstat"
        try:
            self._file = os.open(path, os.O_RDONLY)
            self._queued()
        except (OSError, IndexError, ValueError) as error:
            self.without_queue = f"this kernel does not count time in run queues ({type(error).__name__})"
            self.close()
        self.ran = self.queued = self.waited = 0
        self.waits: list[tuple[int, int]] = []
        self._since = self._read()

    def close(self) -> None:
        """Give the file back."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _queued(self) -> int:
        return int(os.pread(self._file, 96, 0).split()[1]) if self._file is not None else 0

    def _read(self) -> tuple[int, int, int]:
        """All three clocks at one moment: again if the thread lost its core between them."""
        queued = self._queued()
        for _ in range(_READS):
            wall, ran, before = time.perf_counter_ns(), time.thread_time_ns(), queued
            queued = self._queued()
            if queued == before:
                return wall, ran, queued
        return time.perf_counter_ns(), time.thread_time_ns(), queued

    def now(self) -> int:
        """Nanoseconds of the host's monotonic clock, which all ranks of a host share."""
        return time.perf_counter_ns()

    def start(self) -> int:
        """Count from here."""
        self.ran = self.queued = self.waited = 0
        self.waits.clear()
        self._since = self._read()
        return self._since[0]

    def enter(self) -> int:
        """The thread begins to wait for other ranks."""
        now, before = self._read(), self._since
        self.ran += now[1] - before[1]
        self.queued += now[2] - before[2]
        self._since = now
        return now[0]

    def leave(self) -> int:
        """It goes on."""
        now, before = self._read(), self._since
        self.waited += now[0] - before[0]
        self.waits.append((before[0], now[0]))
        self._since = now
        return now[0]
