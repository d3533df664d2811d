"""Times the sentinels: work that no arm does, so that a change of it is a change of the machine (`sentinel_bands`)."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from headgrid.experiment.sentinel_bands import KINDS
from headgrid.runtime.collectives import barrier

_GEMM = {"cpu": (160, 2), "cuda": (2048, 64)}
"""Side of the square matrices and number of products: about 1 ms on a core, 2 ms on an H200."""
_REDUCED = {"cpu": (1 << 14, 1), "cuda": (1 << 22, 8)}
"""Values of float32 and number of all-reduces: where 16 ranks share 2 cores, one is enough."""
_LOOPS = 20_000
"""Additions in Python, about 1 ms."""


class Sentinels:
    """The buffers of one rank, made once: 34 MB on a GPU in 16 bits."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Sizes are those of the kind of device; products are in `dtype`, the run's own."""
        self._device = device
        side, self._products = _GEMM[device.type]
        values, self._reductions = _REDUCED[device.type]
        self._a = torch.ones(side, side, dtype=dtype, device=device)
        self._out = torch.empty_like(self._a)
        self._reduced = torch.zeros(values, device=device)

    def read(self) -> dict[str, list[float]]:
        """Seconds of each sentinel on every rank, on every rank. All ranks call it at the same time."""
        works = (self._gemm, self._all_reduce, _host)
        mine = torch.tensor([self._timed(work) for work in works], dtype=torch.float64, device=self._device)
        everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        columns = torch.stack(everyone).T.tolist()
        return {kind: [round(value, 9) for value in column] for kind, column in zip(KINDS, columns, strict=True)}

    def _timed(self, work: Callable[[], None]) -> float:
        barrier(self._device)
        start = time.perf_counter()
        work()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start

    def _gemm(self) -> None:
        for _ in range(self._products):
            torch.mm(self._a, self._a, out=self._out)

    def _all_reduce(self) -> None:
        for _ in range(self._reductions):
            dist.all_reduce(self._reduced)


def _host() -> None:
    total = 0
    for number in range(_LOOPS):
        total += number
