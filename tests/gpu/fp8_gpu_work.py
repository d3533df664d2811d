"""What two GPU ranks with FP8 linears do: logits and collectives of each layout, left in files for the test."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headgrid.layout.layout import parse_layout
from headgrid.layout.memory import cache_shape
from headgrid.layout.traffic import Collective, prefill_collectives
from headgrid.runtime.cache import new_arena
from headgrid.runtime.collectives import Recorder
from headgrid.runtime.engine import Engine
from headgrid.runtime.layer import load
from headgrid.runtime.mesh import GroupPool, Mesh
from headgrid.runtime.weights import draw
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

MODEL = ModelSpec(
    name="two GPUs in FP8",
    num_layers=2,
    hidden_size=256,
    num_heads=8,
    num_kv_heads=8,
    head_dim=32,
    mlp_hidden_size=512,
    vocab_size=97,
    max_positions=64,
    activation="gelu_tanh",
    attention_gain=2.0,
)
UNEVEN = replace(MODEL, mlp_hidden_size=500)
WORKLOAD = Workload(batch=8, seq=24, decode_steps=4, dtype="float16")


def prompts() -> Tensor:
    return torch.randint(0, 97, (8, 24), generator=torch.Generator().manual_seed(3))


def run(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    """Every layout in turn; rank r leaves `<folder>/<k>.<r>.pt` for the k-th."""
    pool = GroupPool(rank)
    for k, text in enumerate(payload["layouts"]):
        torch.save(_outcome(text, pool), Path(payload["folder"]) / f"{k}.{rank}.pt")


def _outcome(text: str, pool: GroupPool) -> dict[str, Any]:
    layout, device = parse_layout(text), torch.device("cuda", torch.cuda.current_device())
    mesh = Mesh(layout, pool)
    arena = new_arena(cache_shape(MODEL, layout, WORKLOAD, pool.rank).elements, torch.float16, device)
    weights = load(
        MODEL, layout, pool.rank, lambda n, s: draw(MODEL, 0, n, s, dtype=torch.float16, device=device), mesh.tp
    )
    engine, recorder = Engine(MODEL, layout, WORKLOAD, mesh, weights, arena), Recorder()
    engine.prefill(prompts())
    engine.decode(1)
    engine.capture()
    with engine.mesh.observed(recorder):
        engine.prefill(prompts())
    first = engine.logits.clone(), engine.tokens.clone()
    decoded = engine.decode(WORKLOAD.decode_steps, keep_logits=True)
    logits = None
    if decoded.logits is not None:
        logits = torch.cat([first[0][None], decoded.logits]).transpose(0, 1).cpu()
    issued = Counter(Collective(call.kind, call.axis, call.bytes) for call in recorder.issued)  # type: ignore[arg-type]
    return {
        "logits": logits,
        "tokens": torch.cat([first[1][None], decoded.tokens]).t().cpu() if logits is not None else None,
        "as_predicted": issued == prefill_collectives(MODEL, layout, WORKLOAD, pool.rank),
    }
