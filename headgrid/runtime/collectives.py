"""Every collective of the runtime, in one place, on an explicit mesh axis.

What is issued is reported to observers, described from the tensors and groups themselves; this module knows nothing
of layouts, so that predicted and issued traffic come from independent code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 warns about the only name that torch 2.11 has
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


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


class _Collective(torch.autograd.Function):
    """`forward_of(x)`, whose gradient is `back_of(gradient of the result)`: the collective that undoes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_of: Callable[[Tensor], Tensor], back_of: Callable) -> Tensor:
        """Run the collective on `x`."""
        ctx.back_of = back_of
        return forward_of(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Run the collective that sends gradients the other way."""
        return ctx.back_of(grads[0]), None, None


def differentiated(x: Tensor) -> bool:
    """Whether a gradient of `x` is wanted."""
    return torch.is_grad_enabled() and x.requires_grad


def _view(x: Tensor) -> Tensor:
    return x.view_as(x)


class Axis:
    """One group of ranks along a mesh axis, seen from one of its members. A group of one does nothing at all.

    Where gradients are wanted, each call has the collective for its backward pass. `alike` says that all ranks go on
    to do the same with the result, so that their gradients are equal; else each does a part of the work, and
    gradients are summed (Megatron-LM's f and g; Shoeybi et al. 2019).
    """

    def __init__(self, name: str, ranks: Sequence[int], rank: int, group: dist.ProcessGroup | None) -> None:
        """`ranks` are global ranks in axis order, `rank` is this one; `group` may be None for a single rank."""
        self.name, self.ranks, self.group = name, tuple(ranks), group
        self.size, self.index = len(self.ranks), self.ranks.index(rank)
        self.observers: list[Observer] = []
        self.meanwhile: Callable[[], None] | None = None
        """What this rank does between the start of a collective and its wait. None: it waits at once, and on CUDA the
        collective runs on the current stream.
        """
        self.timing: Callable[[Issued, Callable[[], object]], None] | None = None
        """Called instead of each wait for what was started earlier, with that wait, to call it."""

    def issue(self, kind: str, size: int, *, overlapped: bool = False) -> Issued:
        """Tell observers of a collective in which this rank sends `size` bytes, before it is begun."""
        issued = Issued(kind, self.name, size, overlapped or self.meanwhile is not None)
        for observer in self.observers:
            observer.before(issued)
        return issued

    def done(self, issued: Issued, result: Tensor) -> Tensor:
        """Tell observers of its result, and return that."""
        for observer in self.observers:
            observer.after(issued, result)
        return result

    def wait(self, issued: Issued, work: dist.Work) -> None:
        """Wait for what was started earlier."""
        if self.timing is None:
            work.wait()
        else:
            self.timing(issued, work.wait)

    def _complete(self, issued: Issued, collective: Callable[..., dist.Work | None]) -> None:
        """Run it to its end. Until the wait, its work keeps the tensors that it reads and writes alive."""
        if self.meanwhile is None:
            collective()
            return
        work = collective(async_op=True)
        assert work is not None
        self.meanwhile()
        self.wait(issued, work)

    def all_reduce(self, x: Tensor, *, alike: bool = True) -> Tensor:
        """Sum of `x` over the axis, in place and returned; with gradients a new tensor. `x` contiguous, of any shape
        that is the same on all ranks.
        """
        if self.size == 1:
            return x
        if differentiated(x):
            back = (lambda grad: grad) if alike else self._sum_copy
            return _Collective.apply(x, self._sum_copy, back)
        return self._sum(x)

    def _sum(self, x: Tensor) -> Tensor:
        issued = self.issue("all_reduce", 2 * (self.size - 1) * _size_bytes(x) // self.size)
        self._complete(issued, partial(dist.all_reduce, x, group=self.group))
        return self.done(issued, x)

    def _sum_copy(self, x: Tensor) -> Tensor:
        return self._sum(x.clone(memory_format=torch.contiguous_format))

    def fan_out(self, x: Tensor) -> Tensor:
        """`x` itself, the same on all ranks, each of which goes on to use it for a part of the work.

        Nothing is sent but in backward, where the gradients of the parts are summed.
        """
        return _Collective.apply(x, _view, self._sum_copy) if self.size > 1 and differentiated(x) else x

    def all_gather(self, x: Tensor, sizes: Sequence[int], *, alike: bool = False) -> Tensor:
        """The parts of all ranks in axis order, flat: rank r contributes `sizes[r]` elements. `x` flat, contiguous."""
        if self.size == 1:
            return x
        if differentiated(x):
            return _Collective.apply(x, partial(self._gather, sizes=sizes), self._back_of_gather(sizes, alike))
        return self._gather(x, sizes)

    def _back_of_gather(self, sizes: Sequence[int], alike: bool) -> Callable[[Tensor], Tensor]:
        if alike:
            return lambda grad: grad.split(list(sizes))[self.index]
        return partial(self._scatter_sum, sizes=sizes)

    def start_all_gather(self, x: Tensor, sizes: Sequence[int]) -> "Receipt":
        """Begin `all_gather`; the result is there after `wait`. Leave `x` alone until then."""
        issued = self.issue("all_gather", (self.size - 1) * _size_bytes(x), overlapped=True)
        out = x.new_empty(sum(sizes))
        work = self._start_gather(out, x.detach(), sizes, async_op=True)
        assert work is not None
        back = self._back_of_gather(sizes, alike=False) if differentiated(x) else None
        return Receipt(self, issued, work, out, x, back)

    def _gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        x = x.contiguous()
        issued = self.issue("all_gather", (self.size - 1) * _size_bytes(x))
        out = x.new_empty(sum(sizes))
        self._complete(issued, partial(self._start_gather, out, x, sizes))
        return self.done(issued, out)

    def _start_gather(
        self, out: Tensor, x: Tensor, sizes: Sequence[int], *, async_op: bool = False
    ) -> dist.Work | None:
        if len(set(sizes)) == 1:
            return _all_gather(out, x, group=self.group, async_op=async_op)
        # gloo refuses uneven all-gathers; its uneven all-to-all works
        repeated, splits = x.repeat(self.size), [x.numel()] * self.size
        return dist.all_to_all_single(out, repeated, list(sizes), splits, group=self.group, async_op=async_op)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """This rank's `sizes[index]` elements of the sum of flat `x` over the axis. `x` contiguous.

        Uneven parts travel by all-to-all and are summed here, in fp32 or wider.
        """
        if self.size == 1:
            return x
        if differentiated(x):
            run, back = partial(self._scatter_sum, sizes=sizes), partial(self._gather, sizes=sizes)
            return _Collective.apply(x, run, back)
        return self._scatter_sum(x, sizes)

    def _scatter_sum(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        x, mine = x.contiguous(), sizes[self.index]
        issued = self.issue("reduce_scatter", (x.numel() - mine) * x.element_size())
        if len(set(sizes)) == 1:
            out = x.new_empty(mine)
            self._complete(issued, partial(_reduce_scatter, out, x, group=self.group))
        else:
            parts = x.new_empty(mine * self.size)
            splits = [mine] * self.size, list(sizes)
            self._complete(issued, partial(dist.all_to_all_single, parts, x, *splits, group=self.group))
            wide = torch.promote_types(x.dtype, torch.float32)
            out = parts.view(self.size, mine).sum(0, dtype=wide).to(x.dtype)
        return self.done(issued, out)

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """`send[r]` elements of flat `x` go to rank r; the `receive[r]` that come from it, in axis order, flat."""
        if self.size == 1:
            return x
        if differentiated(x):
            run = partial(self._exchange, send=send, receive=receive)
            return _Collective.apply(x, run, partial(self._exchange, send=receive, receive=send))
        return self._exchange(x, send, receive)

    def _exchange(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        x = x.contiguous()
        issued = self.issue("all_to_all", (x.numel() - send[self.index]) * x.element_size())
        out = x.new_empty(sum(receive))
        self._complete(issued, partial(dist.all_to_all_single, out, x, list(receive), list(send), group=self.group))
        return self.done(issued, out)

    def start_send(self, x: Tensor, to: int) -> "Posted | None":
        """Begin to send `x` to axis position `to`. Keep `x` unchanged until the work is waited for; none if empty."""
        if not x.numel():
            return None
        issued = self.issue("send", _size_bytes(x), overlapped=True)
        self.done(issued, x)  # an observer that corrupts the payload must act before it leaves
        work = dist.isend(x, self.ranks[to], group=self.group)
        return None if work is None else Posted(self, issued, work)

    def start_receive(self, out: Tensor, source: int) -> "Receipt":
        """Begin to receive `out` from axis position `source`; nothing travels where it is empty."""
        if not out.numel():
            return Receipt(self, Issued("recv", self.name, 0, overlapped=True), None, out)
        issued = self.issue("recv", _size_bytes(out), overlapped=True)
        return Receipt(self, issued, dist.irecv(out, self.ranks[source], group=self.group), out)


@dataclass(frozen=True, slots=True)
class Posted:
    """A message under way from this rank."""

    axis: Axis
    issued: Issued
    work: dist.Work

    def wait(self) -> None:
        """Until what was sent may be changed."""
        self.axis.wait(self.issued, self.work)


@dataclass(frozen=True, slots=True)
class Receipt:
    """A message under way to this rank."""

    axis: Axis
    issued: Issued
    work: dist.Work | None
    out: Tensor
    sent: Tensor | None = None
    back: Callable[[Tensor], Tensor] | None = None

    def wait(self) -> Tensor:
        """The message, once it has arrived (on CUDA: once the current stream may use it)."""
        if self.back is not None:
            return _Collective.apply(self.sent, lambda _: self._arrived(), self.back)
        return self._arrived()

    def _arrived(self) -> Tensor:
        if self.work is None:
            return self.out
        self.axis.wait(self.issued, self.work)
        return self.axis.done(self.issued, self.out)


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
