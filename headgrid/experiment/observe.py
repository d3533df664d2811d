"""The untimed pass: what each collective costs, which stage runs when, how much memory a prefill takes."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from headgrid.layout.traffic import Collective
from headgrid.runtime.collectives import Issued
from headgrid.runtime.meter import LiveBytes


class CollectiveTimer:
    """Times collectives from issue to completion, on the host or with events on CUDA's current stream.

    Those that overlap with computing get no time: between issue and wait lies other work.
    """

    def __init__(self, device: torch.device) -> None:
        """`device` is where the collectives' tensors are."""
        self._cuda = device.type == "cuda"
        self._open: dict[int, Any] = {}
        self._spans: list[tuple[Issued, Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def before(self, issued: Issued) -> None:
        """Start the clock of this call."""
        self._open[id(issued)] = self._now()

    def after(self, issued: Issued, result: Tensor) -> None:
        """Stop it."""
        self._spans.append((issued, self._open.pop(id(issued)), self._now()))

    def totals(self, of_layers: Collection[Collective]) -> dict[str, dict[str, Any]]:
        """Calls, bytes and seconds by "kind/axis/where", where = `layer` for those in `of_layers`, else `ends`."""
        if self._cuda:
            torch.cuda.synchronize()
        rows: dict[str, dict[str, Any]] = defaultdict(lambda: {"calls": 0, "bytes_per_rank": 0, "time_s": 0.0})
        seconds = (lambda start, end: start.elapsed_time(end) / 1e3) if self._cuda else (lambda start, end: end - start)
        for issued, start, end in self._spans:
            where = "layer" if _as_collective(issued) in of_layers else "ends"
            row = rows[f"{issued.kind}/{issued.axis}/{where}"]
            row["calls"] += 1
            row["bytes_per_rank"] += issued.bytes
            known = row["time_s"] is not None and not issued.overlapped  # an equal call may be either
            row["time_s"] = row["time_s"] + seconds(start, end) if known else None
        return dict(rows)


def as_predicted(issued: list[Issued], predicted: Counter[Collective]) -> bool:
    """Whether exactly the predicted collectives were issued."""
    return Counter(map(_as_collective, issued)) == predicted


def _as_collective(call: Issued) -> Collective:
    return Collective(call.kind, call.axis, call.bytes)  # type: ignore[arg-type]


def merge_totals(per_rank: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for each kind, axis and place: the figures of the rank that spent most time in it."""
    rows: list[dict[str, Any]] = []
    for key in sorted({key for totals in per_rank for key in totals}):
        slowest = max((totals[key] for totals in per_rank if key in totals), key=lambda row: row["time_s"] or 0.0)
        kind, axis, where = key.split("/")
        rows.append({"collective": kind, "axis": axis, "per_layer": where == "layer"} | slowest)
    return rows


class StageClock:
    """Keeps when this stage computed which micro-batch. Waits for the compute stream, so never in a timed pass.

    Only for that stream: to wait for the device would be to wait for messages that are expected later, and a stage
    that waits for the next micro-batch before it finishes this one stops the pipeline for good.
    """

    def __init__(self, stage: int, device: torch.device) -> None:
        """`stage` is this rank's pipeline stage."""
        self.stage, self._device = stage, device
        self.events: list[dict[str, Any]] = []
        self.zero_s = 0.0
        """What times are counted from, by the clock of this host."""

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return time.monotonic() - self.zero_s  # one clock for all ranks of a host

    def __call__(self, phase: str, micro_batch: int, step: int, compute: Callable[[], Tensor]) -> Tensor:
        """Compute and keep the times."""
        start = self._now()
        result = compute()
        row = {"stage": self.stage, "phase": phase, "micro_batch": micro_batch, "step": step}
        self.events.append(row | {"start_s": start, "end_s": self._now()})
        return result


class PeakMemory:
    """Peak bytes of new tensors: the allocator's own figure on CUDA, counted tensors on a CPU."""

    def __init__(self, device: torch.device) -> None:
        """`device` is where the tensors are."""
        self._device = device
        self.peak_bytes = 0
        self.measured_by = "torch.cuda.max_memory_allocated" if device.type == "cuda" else "live tensors"

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Measure what the block allocates beyond what was there before."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            yield
            torch.cuda.synchronize(self._device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - before
        else:
            with LiveBytes() as live:
                yield
            self.peak_bytes = live.peak_bytes


class Settle:
    """Waits a moment after each collective: gloo's threads hold a tensor a little longer than the call lasts."""

    def before(self, issued: Issued) -> None:
        """Nothing."""

    def after(self, issued: Issued, result: Tensor) -> None:
        """Let gloo's worker threads drop their references, so that freed memory counts as freed."""
        time.sleep(0.003)
