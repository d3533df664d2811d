"""What two GPU ranks do: logits, gradients and collectives of each layout, left in files for the test to judge."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from headgrid.layout.layout import parse_layout
from headgrid.layout.memory import cache_shape
from headgrid.layout.traffic import Collective, decode_collectives, prefill_collectives
from headgrid.runtime import attention
from headgrid.runtime.attention import Keys
from headgrid.runtime.cache import new_arena
from headgrid.runtime.collectives import Recorder
from headgrid.runtime.engine import Engine
from headgrid.runtime.exchange import Core
from headgrid.runtime.layer import load
from headgrid.runtime.mesh import GroupPool, Mesh
from headgrid.runtime.peers import Sums
from headgrid.runtime.training import Trainer
from headgrid.runtime.weights import draw
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

MODEL = ModelSpec(
    name="two GPUs",
    num_layers=2,
    hidden_size=128,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    mlp_hidden_size=300,
    vocab_size=97,
    max_positions=64,
    qk_norm=True,
    linear_bias=("qkv", "o", "mlp"),
    attention_gain=2.0,
)
PLAIN = replace(MODEL, name="plain", qk_norm=False, linear_bias=("qkv",), norm="rms", num_kv_heads=4, gated_mlp=True)
"""Decode can go through peers' memory: no biases or norms behind sums."""
WORKLOAD = Workload(
    batch=4, seq=24, decode_steps=4, dtype="float32", prompt_lengths=(24, 5, 17, 1), chunk_positions=16, chunk_tokens=64
)


def prompts() -> Tensor:
    return torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(3))


def upstream() -> Tensor:
    return torch.randn(4, 24, 97, generator=torch.Generator().manual_seed(4))


def run(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    """Every layout in turn; rank r leaves `<folder>/<k>.<r>.pt` for the k-th."""
    pool = GroupPool(rank)
    for k, text in enumerate(payload["layouts"]):
        found = _generate(MODEL, text, pool)
        if parse_layout(text).communication == "exposed":
            found |= _gradients(text, pool)
        torch.save(found, Path(payload["folder"]) / f"{k}.{rank}.pt")


def run_direct(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    """Every layout of the plain model, with its collectives, through peers' memory, and there with a fault."""
    pool = GroupPool(rank)
    for k, text in enumerate(payload["layouts"]):
        found = {"collectives": _generate(PLAIN, text, pool, direct=False), "peers": _generate(PLAIN, text, pool)}
        with patch.object(Sums, "put", _other_room):
            found["fault"] = _generate(PLAIN, text, pool)
        with patch.object(Core, "attend_kept", _unweighted):
            found["unweighted"] = _generate(PLAIN, text, pool)
        torch.save(found, Path(payload["folder"]) / f"{k}.{rank}.pt")


def run_cold(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    """One sequence through a pipeline in fresh processes: three steps in one call, then the same again one by one."""
    layout, device = parse_layout("pp2"), torch.device("cuda", torch.cuda.current_device())
    workload = replace(WORKLOAD, batch=1, prompt_lengths=())
    arena = new_arena(cache_shape(PLAIN, layout, workload, rank).elements, torch.float32, device)
    engine = Engine(PLAIN, layout, workload, Mesh(layout, GroupPool(rank)), _weights(PLAIN, "pp2", rank), arena)
    engine.prefill(prompts()[:1])
    together = engine.decode(3).tokens.cpu()
    engine.prefill(prompts()[:1])
    single = [engine.decode(1).tokens.cpu() for _ in range(3)]
    torch.save((together, torch.cat(single)), Path(payload["folder"]) / f"{rank}.pt")


def _other_room(self: Sums, room: int, x: Tensor, weight: Tensor, tokens: int) -> None:
    torch.mm(x, weight.t(), out=self.rooms[1 - room, :tokens])


def _unweighted(self: Core, q: Tensor, keys: Keys, into: tuple[Tensor, Tensor]) -> None:
    """Every slice's part counts alike, whatever its keys weigh."""
    attention.attend_part_one(q, *self.cache, self.queries, self.rule, keys, into)  # type: ignore[misc]
    into[1].zero_()


def _weights(model: ModelSpec, text: str, rank: int) -> dict[str, Tensor]:
    return load(model, parse_layout(text), rank, lambda n, s: draw(model, 0, n, s, dtype=torch.float32, device="cuda"))


def _generate(model: ModelSpec, text: str, pool: GroupPool, *, direct: bool = True) -> dict[str, Any]:
    layout, device = parse_layout(text), torch.device("cuda", torch.cuda.current_device())
    arena = new_arena(cache_shape(model, layout, WORKLOAD, pool.rank).elements, torch.float32, device)
    weights = _weights(model, text, pool.rank)
    engine = Engine(model, layout, WORKLOAD, Mesh(layout, pool), weights, arena, direct=direct)
    recorders = Recorder(), Recorder()
    with engine.mesh.observed(recorders[0]):
        engine.prefill(prompts())
    with engine.mesh.observed(recorders[1]):
        engine.decode(1)
    engine.capture()
    engine.prefill(prompts())
    first = engine.tokens.clone(), engine.logits.clone()
    decoded = engine.decode(4, keep_logits=True)
    args = (model, layout, WORKLOAD, pool.rank)
    predicted = prefill_collectives(*args), decode_collectives(*args)
    issued = [Counter(Collective(i.kind, i.axis, i.bytes) for i in r.issued) for r in recorders]  # type: ignore[arg-type]
    logits = torch.cat([first[1][None], decoded.logits]) if decoded.logits is not None else None
    return {
        "as_predicted": issued == list(predicted),
        "tokens": torch.cat([first[0][None], decoded.tokens]).cpu(),
        "logits": None if logits is None else logits.cpu(),
        "rows": (engine.rows.start, engine.rows.stop),
        "last": engine.stage.last,
        "decoder": type(engine.decoder).__name__,
    }


def _gradients(text: str, pool: GroupPool) -> dict[str, Any]:
    layout, workload = parse_layout(text), replace(WORKLOAD, decode_steps=0, chunk_positions=0, prompt_lengths=())
    trainer = Trainer(MODEL, layout, workload, Mesh(layout, pool), pool, _weights(MODEL, text, pool.rank))
    up = upstream().cuda()
    _, gradients = trainer.gradients(prompts(), lambda logits, rows: (logits * up[rows]).sum())
    return {"gradients": {name: gradient.cpu() for name, gradient in gradients.items()}}
