"""Every collective of the runtime, in one place, on an explicit mesh axis.

What is issued is reported to observers, described from the tensors and groups themselves; this module knows nothing
of layouts, so that predicted and issued traffic come from independent code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 warns about the only name that torch 2.11 has
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True)
class Issued:
    """One call: its kind, the name of its axis and the bytes this rank sends to others (`recv`: receives).

    `overlapped` calls are waited for later than they are issued: the time between says nothing about them.
    """

    kind: str
    axis: str
    bytes: int
    overlapped: bool = False


class Observer(Protocol):
    """Watches collectives: records, times or (in tests) corrupts them."""

    def before(self, issued: Issued) -> None:
        """Called before the operation is issued."""

    def after(self, issued: Issued, result: Tensor) -> None:
        """Called with the tensor the operation has written; for `send` with the tensor sent."""


def _size_bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


class Axis:
    """One group of ranks along a mesh axis, seen from one of its members. A group of one does nothing at all."""

    def __init__(self, name: str, ranks: Sequence[int], rank: int, group: dist.ProcessGroup | None) -> None:
        """`ranks` are global ranks in axis order, `rank` is this one; `group` may be None for a single rank."""
        self.name, self.ranks, self.group = name, tuple(ranks), group
        self.size, self.index = len(self.ranks), self.ranks.index(rank)
        self.observers: list[Observer] = []

    def _issue(self, kind: str, size: int, *, overlapped: bool = False) -> Issued:
        issued = Issued(kind, self.name, size, overlapped)
        for observer in self.observers:
            observer.before(issued)
        return issued

    def _done(self, issued: Issued, result: Tensor) -> Tensor:
        for observer in self.observers:
            observer.after(issued, result)
        return result

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of `x` over the axis, in place and returned. `x` contiguous, any shape, equal on all ranks."""
        if self.size == 1:
            return x
        issued = self._issue("all_reduce", 2 * (self.size - 1) * _size_bytes(x) // self.size)
        dist.all_reduce(x, group=self.group)
        return self._done(issued, x)

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """The parts of all ranks in axis order, flat: rank r contributes `sizes[r]` elements. `x` flat, contiguous."""
        if self.size == 1:
            return x
        issued = self._issue("all_gather", (self.size - 1) * _size_bytes(x))
        out = x.new_empty(sum(sizes))
        self._gather(out, x, sizes, async_op=False)
        return self._done(issued, out)

    def start_all_gather(self, x: Tensor, sizes: Sequence[int]) -> "Receipt":
        """Begin `all_gather`; the result is there after `wait`. Leave `x` alone until then."""
        issued = self._issue("all_gather", (self.size - 1) * _size_bytes(x), overlapped=True)
        out = x.new_empty(sum(sizes))
        work = self._gather(out, x, sizes, async_op=True)
        assert work is not None
        return Receipt(self, issued, work, out)

    def _gather(self, out: Tensor, x: Tensor, sizes: Sequence[int], *, async_op: bool) -> dist.Work | None:
        if len(set(sizes)) == 1:
            return _all_gather(out, x, group=self.group, async_op=async_op)
        # gloo refuses uneven all-gathers; its uneven all-to-all works
        repeated, splits = x.repeat(self.size), [x.numel()] * self.size
        return dist.all_to_all_single(out, repeated, list(sizes), splits, group=self.group, async_op=async_op)

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """`send[r]` elements of flat `x` go to rank r; the `receive[r]` that come from it, in axis order, flat."""
        if self.size == 1:
            return x
        issued = self._issue("all_to_all", (x.numel() - send[self.index]) * x.element_size())
        out = x.new_empty(sum(receive))
        dist.all_to_all_single(out, x, list(receive), list(send), group=self.group)
        return self._done(issued, out)

    def start_send(self, x: Tensor, to: int) -> dist.Work:
        """Begin to send `x` to axis position `to`. Keep `x` unchanged until the work is waited for."""
        issued = self._issue("send", _size_bytes(x), overlapped=True)
        self._done(issued, x)  # an observer that corrupts the payload must act before it leaves
        work = dist.isend(x, self.ranks[to], group=self.group)
        assert work is not None
        return work

    def start_receive(self, out: Tensor, source: int) -> "Receipt":
        """Begin to receive `out` from axis position `source`."""
        issued = self._issue("recv", _size_bytes(out), overlapped=True)
        work = dist.irecv(out, self.ranks[source], group=self.group)
        assert work is not None
        return Receipt(self, issued, work, out)


@dataclass(frozen=True, slots=True)
class Receipt:
    """A message under way to this rank."""

    axis: Axis
    issued: Issued
    work: dist.Work
    out: Tensor

    def wait(self) -> Tensor:
        """The message, once it has arrived (on CUDA: once the current stream may use it)."""
        self.work.wait()
        return self.axis._done(self.issued, self.out)


class Recorder:
    """An observer that keeps what was issued, in order."""

    def __init__(self) -> None:
        """Start with an empty record."""
        self.issued: list[Issued] = []
        self.largest_buffer_bytes = 0

    def before(self, issued: Issued) -> None:
        """Keep the call."""
        self.issued.append(issued)

    def after(self, issued: Issued, result: Tensor) -> None:
        """Keep the size of the largest tensor that arrived out of place."""
        if issued.kind not in ("all_reduce", "send"):
            self.largest_buffer_bytes = max(self.largest_buffer_bytes, _size_bytes(result))


def barrier(device: torch.device) -> None:
    """Wait for all ranks, on the host."""
    if device.type == "cuda":
        flag = torch.zeros(1, device=device)
        dist.all_reduce(flag)
        torch.cuda.synchronize(device)
    else:
        dist.barrier()
