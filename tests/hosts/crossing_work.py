"""A rank that torchrun started: what its host puts on the cable in a prefill, by the kernel's count. Prints JSON.

Arguments: layouts, and how often each prefill runs.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from headgrid.layout.layout import parse_layout
from headgrid.layout.memory import cache_shape
from headgrid.runtime import launch
from headgrid.runtime.cache import new_arena
from headgrid.runtime.engine import Engine
from headgrid.runtime.layer import load
from headgrid.runtime.mesh import GroupPool, Mesh
from headgrid.runtime.weights import draw
from headgrid.spec.model import find_model
from headgrid.spec.workload import Workload

MODEL = find_model("seed-small")
WORKLOAD = Workload(batch=8, seq=64, decode_steps=1, dtype="float32")


def engine_of(text: str, pool: GroupPool) -> Engine:
    """A layout of the model with drawn weights."""
    layout = parse_layout(text)

    def weight(name: str, shard: Any) -> torch.Tensor:
        return draw(MODEL, 0, name, shard, dtype=torch.float32, device=torch.device("cpu"))

    mesh = Mesh(layout, pool)
    arena = new_arena(cache_shape(MODEL, layout, WORKLOAD, pool.rank).elements, torch.float32, torch.device("cpu"))
    return Engine(MODEL, layout, WORKLOAD, mesh, load(MODEL, layout, pool.rank, weight, mesh.tp), arena)


def sent_bytes() -> int:
    """On all interfaces but the loopback, since this host began."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    return sum(int(line.split(":")[1].split()[8]) for line in lines if not line.strip().startswith("lo:"))


def main(layouts: list[str], times: int) -> None:
    """Of each layout the bytes that this host sends in all the prefills, from a barrier to a barrier."""
    with launch.joined("gloo"):
        pool = GroupPool(launch.torchrun_rank()[0])
        prompts = torch.arange(WORKLOAD.batch * WORKLOAD.seq).view(WORKLOAD.batch, -1) % MODEL.vocab_size
        found: dict[str, int] = {}
        for text in layouts:
            engine = engine_of(text, pool)
            engine.prefill(prompts)
            dist.barrier()
            before = sent_bytes()
            for _ in range(times):
                engine.prefill(prompts)
            dist.barrier()
            found[text] = sent_bytes() - before
        if launch.place().local_rank == 0:
            sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[2:], int(sys.argv[1]))
