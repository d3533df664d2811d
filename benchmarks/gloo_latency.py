"""Latency of gloo collectives of 16 KiB between ranks of this host: the source of the figures in docs/log.md.

Run: python benchmarks/gloo_latency.py 16
"""

import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist

from headgrid.runtime.launch import Job, run

CALLS = 50


def measure(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    x = torch.ones(4096)
    gathered, exchanged = x.new_empty(4096 * ranks), torch.empty_like(x)
    operations = {
        "all_reduce": lambda: dist.all_reduce(x),
        "all_gather": lambda: dist.all_gather_into_tensor(gathered, x),
        "all_to_all": lambda: dist.all_to_all_single(exchanged, x),
        "barrier": dist.barrier,
    }
    lines = []
    for name, operation in operations.items():
        dist.barrier()
        start = time.perf_counter()
        for _ in range(CALLS):
            operation()
        lines.append(f"{name}: {(time.perf_counter() - start) / CALLS * 1e3:.1f} ms")
    if rank == 0:
        with open(payload["out"], "w") as out:
            out.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile("r") as out:
        run(Job("gloo_latency:measure", {"out": out.name}, int(sys.argv[1]), "gloo"))
        print(out.read(), end="")
