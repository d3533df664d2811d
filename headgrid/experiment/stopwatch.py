"""Times the work of all ranks from a common barrier, and adds the slow-down that is planted in one arm."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from headgrid.runtime.collectives import barrier

SPIN_S = 2e-4
"""A sleep may end so much late, so the rest is waited for awake; more would take cores from ranks that still work."""


def timed(device: torch.device, work: Callable[[], object], planted: float = 0.0) -> tuple[float, list[float]]:
    """Unix time of a common barrier, and the seconds that each rank took from it to the end of its own work.

    `planted`: the share of its own time that each rank then still waits, within the time that is told.
    """
    barrier(device)
    start_s, start = time.time(), time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if planted:
        _wait_until(start + (1 + planted) * (time.perf_counter() - start))
    elapsed = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=device)
    everyone = [torch.zeros_like(elapsed) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, elapsed)
    return start_s, [round(float(seconds), 9) for seconds in everyone]


def _wait_until(end: float) -> None:
    """Until `time.perf_counter()` is `end`."""
    if (left := end - time.perf_counter()) > SPIN_S:
        time.sleep(left - SPIN_S)
    while time.perf_counter() < end:
        pass
