"""What gloo ranks do: watch each layout, whole or with a fault; rank 0 leaves the records."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from headgrid.experiment.breakdown.measure import breakdown
from headgrid.layout.layout import parse_layout
from headgrid.layout.memory import cache_shape
from headgrid.runtime.cache import new_arena
from headgrid.runtime.engine import Engine
from headgrid.runtime.layer import load
from headgrid.runtime.mesh import GroupPool, Mesh
from headgrid.runtime.stage import Stage
from headgrid.runtime.weights import draw
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

MODEL = ModelSpec(
    name="watched",
    num_layers=4,
    hidden_size=64,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    mlp_hidden_size=128,
    vocab_size=97,
    max_positions=128,
    qk_norm=True,
)
WORKLOAD = Workload(batch=8, seq=48, decode_steps=6, dtype="float32")
PLANTED_S = 0.3
FAULT_LAYER, FAULT_RANK = 2, 1


def busy(seconds: float) -> None:
    """Compute for so long, by this thread's own clock."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


FAULTS: dict[str, Callable[[float], None]] = {"computes": busy, "sleeps": time.sleep}


@contextmanager
def planted(fault: str | None, rank: int) -> Iterator[None]:
    """One rank does something else for `PLANTED_S` in one layer of prefill, before its products."""
    original = Stage.apply

    def slow(self: Stage, layer: Any, index: int, hidden: Any, call: Any) -> None:
        if rank == FAULT_RANK and index == FAULT_LAYER and call.queries.count > 1 and fault is not None:
            FAULTS[fault](PLANTED_S)
        original(self, layer, index, hidden, call)

    with patch.object(Stage, "apply", slow):
        yield


def engine(text: str, pool: GroupPool) -> Engine:
    layout = parse_layout(text)
    weights = load(MODEL, layout, pool.rank, lambda name, shard: draw(MODEL, 0, name, shard, dtype=torch.float32))
    arena = new_arena(cache_shape(MODEL, layout, WORKLOAD, pool.rank).elements, torch.float32, torch.device("cpu"))
    return Engine(MODEL, layout, WORKLOAD, Mesh(layout, pool), weights, arena)


def run(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    """Each case (layout, fault) in turn; rank 0 leaves `<folder>/<k>.json` for the k-th."""
    pool, folder = GroupPool(rank), Path(payload["folder"])
    prompts = torch.randint(0, 97, (8, 48), generator=torch.Generator().manual_seed(3))
    for k, (text, fault) in enumerate(payload["cases"]):
        made = engine(text, pool)
        made.prefill(prompts)
        tokens = made.tokens.clone()
        with planted(fault, rank):
            found = breakdown(made, MODEL, WORKLOAD, prompts, folder if rank == 0 else None)
        made.prefill(prompts)
        assert torch.equal(tokens, made.tokens), "watching changes nothing"
        assert "apply" not in vars(made.stage) and not any(axis.observers or axis.timing for axis in made.mesh.axes)
        if rank == 0:
            (folder / f"{k}.json").write_text(json.dumps(found))
