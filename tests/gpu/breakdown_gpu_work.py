"""What two GPU ranks do: run each layout's breakdown behind its verification's warm-up; rank 0 leaves the records."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from headgrid.experiment.breakdown.measure import breakdown
from headgrid.layout.layout import parse_layout
from headgrid.layout.memory import cache_shape
from headgrid.runtime.cache import new_arena
from headgrid.runtime.engine import Engine
from headgrid.runtime.layer import load
from headgrid.runtime.mesh import GroupPool, Mesh
from headgrid.runtime.weights import draw
from headgrid.spec.model import ModelSpec, find_model
from headgrid.spec.workload import Workload

MODEL = replace(find_model("seed"), name="seed, 8 layers", num_layers=8)
WORKLOAD = Workload(batch=32, seq=2048, decode_steps=12, dtype="float16")


def prompts() -> torch.Tensor:
    return torch.randint(0, MODEL.vocab_size, (32, 2048), generator=torch.Generator().manual_seed(3))


def engine(model: ModelSpec, text: str, pool: GroupPool) -> Engine:
    """Warm, and with its decode captured, as the worker leaves it."""
    layout, device = parse_layout(text), torch.device("cuda", torch.cuda.current_device())
    weights = load(
        model, layout, pool.rank, lambda name, shard: draw(model, 0, name, shard, dtype=torch.float16, device=device)
    )
    arena = new_arena(cache_shape(model, layout, WORKLOAD, pool.rank).elements, torch.float16, device)
    made = Engine(model, layout, WORKLOAD, Mesh(layout, pool), weights, arena)
    for _ in range(2):
        made.prefill(prompts())
        made.decode(2)
    made.capture()
    return made


def run(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    """Every layout in turn; rank 0 leaves `<folder>/<k>.json` for the k-th."""
    pool, folder = GroupPool(rank), Path(payload["folder"])
    for k, text in enumerate(payload["layouts"]):
        found = breakdown(engine(MODEL, text, pool), MODEL, WORKLOAD, prompts(), folder if rank == 0 else None)
        if rank == 0:
            (folder / f"{k}.json").write_text(json.dumps(found))
        torch.cuda.empty_cache()
