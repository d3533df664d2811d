"""What ranks with FP8 linears do: weights, logits, collectives and memory of each run, left in files for the test."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from watch import Allocations

from headgrid.experiment.observe import Settle
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.memory import cache_shape, predict
from headgrid.layout.quantised import is_quantised
from headgrid.layout.shards import Shard, parameters
from headgrid.layout.span import indices
from headgrid.layout.traffic import Collective, decode_collectives, prefill_collectives
from headgrid.runtime import quantised
from headgrid.runtime.cache import new_arena
from headgrid.runtime.collectives import Axis, Recorder
from headgrid.runtime.engine import Engine
from headgrid.runtime.layer import load
from headgrid.runtime.mesh import GroupPool, Mesh
from headgrid.runtime.meter import LiveBytes
from headgrid.runtime.weights import draw
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

SEED = 5
_SIZES: dict[str, Any] = {
    **{"num_layers": 2, "hidden_size": 64, "num_heads": 6, "num_kv_heads": 6, "head_dim": 10, "mlp_hidden_size": 199},
    **{"vocab_size": 61, "max_positions": 40, "attention_gain": 2.0},
}
MODELS = {
    "gpt": ModelSpec(
        name="gpt", linear_bias=("qkv", "o", "mlp"), positions="learned", activation="gelu_tanh", **_SIZES
    ),
    "llama": ModelSpec(
        name="llama",
        norm="rms",
        gated_mlp=True,
        activation="silu",
        linear_bias=("qkv",),
        **_SIZES | {"num_heads": 12},
    ),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One layout of a model; `fault` names something that is done wrong on purpose."""

    layout: str
    model: str = "gpt"
    dtype: str = "float32"
    fault: str = ""

    @property
    def workload(self) -> Workload:
        return Workload(batch=7, seq=24, decode_steps=3, dtype=self.dtype)  # type: ignore[arg-type]

    @property
    def spec(self) -> ModelSpec:
        return MODELS[self.model]


def prompts(one: Run) -> Tensor:
    shape = one.workload.batch, one.workload.seq
    return torch.randint(0, one.spec.vocab_size, shape, generator=torch.Generator().manual_seed(SEED))


def run(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    """Every run in turn; rank r leaves `<folder>/<k>.<r>.pt` for the k-th."""
    torch.set_num_threads(1)
    pool = GroupPool(rank)
    for k, values in enumerate(payload["runs"]):
        one = Run(*values)
        with _wrong(one.fault):
            torch.save(_outcome(one, pool), Path(payload["folder"]) / f"{k}.{rank}.pt")


@contextmanager
def _wrong(fault: str) -> Iterator[None]:
    """Scales of the rank's own part of each row, though others hold the rest of it."""
    if fault != "own scales":
        yield
        return

    def alone(layout: Layout, name: str, part: Tensor, tp: Axis | None) -> dict[str, Tensor]:
        with mock.patch.object(quantised, "rows_are_cut", lambda *_: False):
            return quantised.as_kept(layout, name, part, tp)

    with mock.patch("headgrid.runtime.layer.as_kept", alone):
        yield


def _engine(one: Run, pool: GroupPool) -> tuple[Engine, int]:
    """The engine, and the elements of the largest tensor that came to be while its weights were loaded."""
    model, layout, workload, dtype = one.spec, parse_layout(one.layout), one.workload, getattr(torch, one.dtype)
    mesh = Mesh(layout, pool)
    with Allocations() as watch:
        weights = load(model, layout, pool.rank, partial(weight, one), mesh.tp)
    if one.fault == "scales of other rows":
        for name in weights:
            weights[name] = weights[name].roll(1) if name.endswith("mlp.down.scale") else weights[name]
    elements = cache_shape(model, layout, workload, pool.rank).elements
    arena = new_arena(elements, dtype, torch.device("cpu"))
    return Engine(model, layout, workload, mesh, weights, arena), watch.largest


def _outcome(one: Run, pool: GroupPool) -> dict[str, Any]:
    (engine, largest), tokens, recorders = _engine(one, pool), prompts(one), (Recorder(), Recorder())
    args = one.spec, engine.layout, one.workload, pool.rank
    with engine.mesh.observed(recorders[0]), engine.mesh.observed(Settle()), LiveBytes() as live:
        engine.prefill(tokens)
    first = engine.logits.clone(), engine.tokens.clone()
    with engine.mesh.observed(recorders[1]):
        decoded = engine.decode(1, keep_logits=True)
    more = engine.decode(one.workload.decode_steps - 1, keep_logits=True)
    predicted, logits = [prefill_collectives(*args), decode_collectives(*args)], None
    if decoded.logits is not None and more.logits is not None:
        logits = torch.cat([first[0][None], decoded.logits, more.logits]).transpose(0, 1)
    return {
        "logits": logits,
        "tokens": torch.cat([first[1][None], decoded.tokens, more.tokens]).t() if logits is not None else None,
        "as_predicted": [_issued(r) == p for r, p in zip(recorders, predicted, strict=True)],
        "gathered_bytes": sum(call.bytes for call in recorders[0].issued if call.axis == "tp_slice"),
        "weights": dict(engine.stage.weights),
        "largest": largest,
        "measured": {
            "parameters_bytes": sum(x.numel() * x.element_size() for x in engine.stage.weights.values()),
            "kv_cache_bytes": engine.cache.size_bytes,
            "communication_buffer_bytes": recorders[0].largest_buffer_bytes,
            "activations_peak_bytes": live.peak_bytes,
        },
        "predicted": asdict(predict(*args)),
    }


def _issued(recorder: Recorder) -> Counter[Collective]:
    return Counter(Collective(call.kind, call.axis, call.bytes) for call in recorder.issued)  # type: ignore[arg-type]


def weight(one: Run, name: str, shard: Shard) -> Tensor:
    """A shard of a tensor; rows of matrices differ in size by up to 8, as drawn ones hardly do."""
    found = draw(one.spec, SEED, name, shard, dtype=getattr(torch, one.dtype))
    if shard.cols is None or not is_quantised(parse_layout("tp1:fp8"), name):
        return found
    rows = torch.tensor(indices(shard.rows))
    return found * torch.exp2((5 * rows % 7 - 3) / 2).to(found.dtype)[:, None]


def whole_weight(one: Run, name: str) -> Tensor:
    """The whole tensor of which the ranks have shards."""
    return weight(one, name, parameters(one.spec, Layout(), 0)[name])
