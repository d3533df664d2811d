"""Watches every operation of a rank: the tensors that come to be, floating-point operations, what is under way."""

import warnings
from collections.abc import Callable, Collection
from functools import cache, partial
from typing import Any, Self

import torch
from torch.library import Library, get_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headgrid.runtime.collectives import Issued
from headgrid.runtime.meter import flop_counter


class Allocations(TorchDispatchMode):
    """Remembers the size, in elements, of the largest new storage. Views and in-place results are not new."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.seen = 0, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Without this torch loads its whole compiler in every rank, to keep it from compiling this class."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in known:
                self.seen += 1
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return result


class Flops:
    """Counts what torch's own counter does, by the same formulas, by standing in for the CPU's kernels themselves.

    A dispatch mode is called for every operation, of which few multiply matrices: it took a third of a rank's time.
    """

    def __init__(self) -> None:
        self.total = 0
        self._within = False

    def __enter__(self) -> Self:
        self._library = Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is replaced: it is meant
            for operation, kernel, formula in _kernels():
                counted = partial(self._count, kernel, formula)
                self._library.impl(operation, counted, "CPU", with_keyset=True, allow_override=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._library._destroy()

    def _count(self, kernel: Any, formula: Callable[..., int], keys: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run the kernel; what it calls on its own way is part of it."""
        if self._within:
            return kernel.call_boxed(keys, *args, **kwargs)
        self._within = True
        try:
            result = kernel.call_boxed(keys, *args, **kwargs)
        finally:
            self._within = False
        self.total += formula(*args, **kwargs, out_val=result)
        return result


@cache
def _kernels() -> list[tuple[torch._ops.OpOverload, Any, Callable[..., int]]]:
    """The CPU's kernels of all operations that torch's counter knows, with its formulas."""
    found = []
    for packet, formula in flop_counter().flop_registry.items():
        for name in packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else ():
            operation = getattr(packet, name)
            if torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CPU"):
                found.append((operation, get_kernel(operation, "CPU"), formula))
    return found


class UnderWay:
    """An observer of how many collectives of some axes were at most under way: started, and not waited for."""

    def __init__(self, axes: Collection[str]) -> None:
        self.axes, self.now, self.most = axes, 0, 0

    def before(self, issued: Issued) -> None:
        self.now += issued.axis in self.axes
        self.most = max(self.most, self.now)

    def after(self, issued: Issued, result: torch.Tensor) -> None:
        self.now -= issued.axis in self.axes
