"""Is a checkpoint on a layout the single-device model? Every layer and the logits, against the fp64 reference.

Every rank runs this. The sequences to verify are divided among the ranks, which compute the reference of their own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from headgrid.experiment.design import allowed_multiple
from headgrid.experiment.generate import loaded
from headgrid.experiment.model_job import Events, Listener
from headgrid.experiment.observe import as_predicted
from headgrid.experiment.verify import (
    ORDERS,
    Trace,
    Truth,
    channel_order,
    compared,
    finite,
    judge,
    reordered,
)
from headgrid.experiment.worker import gather_json
from headgrid.layout.memory import predict
from headgrid.layout.shards import stage_layers
from headgrid.layout.traffic import decode_collectives, prefill_collectives
from headgrid.models.model import Model
from headgrid.reference import Reference
from headgrid.runtime.collectives import Recorder
from headgrid.runtime.engine import Engine
from headgrid.runtime.residual import Sharded
from headgrid.runtime.stage import Stage, StageCall
from headgrid.spec.workload import Workload

TARGET = "headgrid.experiment.verify_model:work"
_MOST_STATES_BYTES = 1 << 30
_SENSITIVE = 0.1  # how far halved scores must move the results, or an error in the attention would not show


class Layers:
    """Hidden states of all tokens after each layer, put together from what ranks hold: [layers, b, s, D]."""

    def __init__(self, model: Model, engine: Engine, workload: Workload) -> None:
        """Watches the stages of `engine` from now on."""
        shape = model.spec.num_layers, workload.batch, workload.seq, model.spec.hidden_size
        self.states = torch.zeros(shape, dtype=torch.promote_types(model.dtype, torch.float32), device=model.device)
        first = stage_layers(model.spec, model.layout)[engine.mesh.at.pp].start
        for stage in engine.path.stages:
            stage.watch = lambda index, call, x, stage=stage: self._keep(stage, first + index, call, x)

    def _keep(self, stage: Stage, layer: int, call: StageCall, x: Tensor) -> None:
        """Each token from one of the ranks that hold it."""
        tp = stage.mesh.tp
        if not isinstance(stage.residual, Sharded) and tp.index:
            return
        own = stage.residual_of(call.queries.count).own(call.tokens)
        rows = torch.tensor(call.micro_batch.rows(), device=x.device)
        places = torch.arange(own.start, own.stop, device=x.device)
        row, position = rows[places // call.queries.count], places % call.queries.count + call.queries.start
        self.states[layer, row, position] = x.to(self.states.dtype)


class Truths:
    """The references of this rank's sequences, and what they say of the layout's results."""

    def __init__(self, model: Model, ids: Sequence[Sequence[int]], rank: int, ranks: int) -> None:
        """Sequences rank, rank + ranks, ... are this rank's."""
        self.model, self.ids, self.mine = model, ids, range(rank, len(ids), ranks)
        spec, device = model.spec, model.device

        def whole(name: str) -> Tensor:
            """As the run holds it: what a narrower dtype loses of the weights is not the layout's error."""
            return model.pretrained.whole(name).to(device, model.dtype)

        orders = [reordered(whole, spec.hidden_size, order) for order in range(ORDERS)]
        self.exact = Reference(spec, whole, torch.float64, device)
        fp8 = model.layout.linears == "fp8"
        self.plain = [Reference(spec, get, model.dtype, device, fp8_linears=fp8) for get in orders]
        self.unquantised = [Reference(spec, whole, model.dtype, device)] * fp8
        self.other = Reference(replace(spec, attention_scale=spec.scale / 2), whole, model.dtype, device)
        self.layers = torch.zeros(spec.num_layers, 3, dtype=torch.float64, device=device)
        self.moved = torch.zeros(2, dtype=torch.float64, device=device)

    def logits(self, tokens: Tensor, states: Tensor | None, outputs: int) -> Truth:
        """Of the last `outputs` tokens of each prompt followed by `tokens` [b, steps], for all sequences on all ranks.

        `states` are the layers' results, of which the errors are added up.
        """
        models = 1 + ORDERS + len(self.unquantised)
        shape = models, len(self.ids), outputs, self.model.spec.output_size
        every = torch.zeros(shape, dtype=torch.float64, device=self.model.device)
        for i in self.mine:
            text = torch.tensor([*self.ids[i], *tokens[i].tolist()])[None]
            count = min(outputs, text.shape[1])
            for k, found in enumerate(self._final(text, i, states)):
                every[k, i, :count] = found[0, -count:]
        every, self.layers, self.moved = (self.model.world.all_reduce(x) for x in (every, self.layers, self.moved))
        return Truth(every[0], every[1 : 1 + ORDERS], every[1 + ORDERS :] if self.unquantised else None)

    def _final(self, text: Tensor, i: int, states: Tensor | None) -> Iterator[Tensor]:
        """Logits of the fp64 reference, of the plain model in its orders, and if that has FP8 linears of one without;
        layers are compared on the prompt.
        """
        both = self.exact.hidden_states(text), self.plain[0].hidden_states(text)
        exact = plain = torch.empty(0)
        for layer, (exact, plain) in enumerate(zip(*both, strict=True)):
            if layer and states is not None:
                self._compare_layer(layer - 1, states[layer - 1, i], exact[0].double(), plain[0].double(), i)
        result = self.exact.head(exact)
        moved = self.other.logits(text, text.shape[1]).double() - result
        self.moved += torch.stack([moved.square().sum(), result.square().sum()])
        yield result
        yield self.plain[0].head(plain).double()
        for order in range(1, ORDERS):
            yield self._in_own_order(self.plain[order].logits(text, text.shape[1]).double(), order)
        yield from (model.logits(text, text.shape[1]).double() for model in self.unquantised)

    def _compare_layer(self, layer: int, ours: Tensor, exact: Tensor, plain: Tensor, i: int) -> None:
        length = len(self.ids[i])
        differences = ours[:length].double() - exact[:length], plain[:length] - exact[:length], exact[:length]
        self.layers[layer] += torch.stack([each.square().sum() for each in differences])

    def _in_own_order(self, x: Tensor, order: int) -> Tensor:
        """Logits have one order only; hidden states are put back."""
        if self.model.spec.head == "vocabulary":
            return x
        places, back = channel_order(self.model.spec.hidden_size, order).to(x.device), torch.empty_like(x)
        back[..., places] = x
        return back

    def per_layer(self) -> list[dict[str, float | None]]:
        """Relative L2 error of the hidden states after each layer, and that of the plain model in the same dtype.

        Empty where hidden states were too large to be kept.
        """
        sizes = self.layers[:, 2].sqrt()
        errors = (self.layers[:, :2].sqrt() / sizes[:, None]).tolist() if sizes.any() else []
        return [
            {"layer": k, "relative_error": finite(ours), "floor": finite(floor)}
            for k, (ours, floor) in enumerate(errors)
        ]

    @property
    def sensitivity(self) -> float | None:
        """How far halved scores would move the logits; None where that overflows."""
        return finite((self.moved[0] / self.moved[1]).sqrt().item())


def work(rank: int, ranks: int, payload: dict[str, Any], listener: Listener | None = None) -> None:
    """Load, run, compare, tell. `payload` as from `Settled.payload`, with ids, decode_steps, the path of the events."""
    events = Events(rank, payload["events"], listener)
    model, loading = loaded(payload, events)
    ids, steps = payload["ids"], payload["decode_steps"]
    encoder = model.spec.head == "none"
    workload = model.workload(ids, every_token=True) if encoder else model.workload(ids, decode_steps=steps)
    engine = model.engine(workload)
    events.tell("phase", name="the layout's prefill and decode")
    states, traffic, trace = _run(model, engine, workload, ids)
    events.tell("phase", name="the single-device reference in fp64")
    truths = Truths(model, ids, rank, ranks)
    truth = truths.logits(trace.tokens[:, :-1], states, max(map(len, ids)) if encoder else 1 + steps)
    verdict = _verdict(model, trace, truth, truths, traffic, engine, workload)
    events.tell("done", **verdict, **loading)


def _run(
    model: Model, engine: Engine, workload: Workload, ids: Sequence[Sequence[int]]
) -> tuple[Tensor | None, dict[str, bool], Trace]:
    """The layout's results on every rank: hidden states after each layer, whether it issued the predicted collectives,
    and logits [b, 1 + steps, vocab_size] with the tokens chosen (an encoder's: every token's [b, s, D] without).
    """
    args, batch = (model.spec, model.layout, workload, model.world.index), workload.batch
    size = workload.batch * workload.seq * model.spec.hidden_size * model.spec.num_layers * 8
    layers = Layers(model, engine, workload) if size <= _MOST_STATES_BYTES else None
    recorder = Recorder()
    with engine.mesh.observed(recorder):
        engine.prefill(model.prompts(ids))
    traffic = {"prefill": as_predicted(recorder.issued, prefill_collectives(*args))}
    for stage in engine.path.stages:
        stage.watch = None
    logits, tokens = [engine.logits.clone()], [engine.tokens.clone()]
    for _ in range(workload.decode_steps):
        recorder = Recorder()
        with engine.mesh.observed(recorder):
            engine.decode(1)
        traffic["decode"] = traffic.get("decode", True) and as_predicted(recorder.issued, decode_collectives(*args))
        logits.append(engine.logits.clone())
        tokens.append(engine.tokens.clone())
    states = model.world.all_reduce(layers.states) if layers is not None else None
    found = logits[0] if workload.every_token else torch.stack(logits, dim=1)
    return states, traffic, Trace(model.everywhere(found, batch), model.everywhere(torch.stack(tokens, dim=1), batch))


def _verdict(
    model: Model,
    trace: Trace,
    truth: Truth,
    truths: Truths,
    traffic: dict[str, bool],
    engine: Engine,
    workload: Workload,
) -> dict[str, Any]:
    """The fields of the answer."""
    memory, unlike = _memory(model, engine, workload)
    everyone = gather_json(traffic, model.device)
    others = [phase for phase in traffic if not all(each[phase] for each in everyone)]
    broken = unlike + [f"{phase} issues other collectives than predicted" for phase in others]
    if workload.every_token:
        judged = judge_states(trace, truth, workload, model.world.size, broken)
    else:
        judged = judge(trace, truth, workload.dtype, model.world.size, sensitive=True, broken=broken)
    whole = judged["whole"]
    return {
        "verdict": "verified" if judged["verified"] else "failed",
        **{key: whole[key] for key in ("relative_error", "bound", "max_abs_error", "floor")},
        "unquantised_floor": whole.get("unquantised_floor"),
        **{key: judged[key] for key in ("reason", "phases", "greedy")},
        "per_layer": truths.per_layer(),
        "collectives_as_predicted": not others,
        "memory_as_predicted": not unlike,
        "memory_per_rank": memory,
        "sensitivity": truths.sensitivity,
        "sensitive": (truths.sensitivity or 0) > max(_SENSITIVE, whole["bound"]),
        "sequences": workload.batch,
    }


def judge_states(trace: Trace, truth: Truth, workload: Workload, ranks: int, broken: Sequence[str]) -> dict[str, Any]:
    """As `judge`, for an encoder's hidden states [b, s, D], of each sequence its own tokens."""
    own = torch.arange(workload.seq) < torch.tensor(workload.lengths)[:, None]
    found = trace.logits[own], truth.reference[own], truth.floors[:, own]
    unquantised = None if truth.unquantised is None else truth.unquantised[:, own]
    phase = compared(*found, allowed_multiple(workload.dtype, ranks), unquantised)
    reasons = [*broken, *["the error is above its bound"] * (not phase["passed"])]
    found = {"verified": not reasons, "reason": "; ".join(reasons) or None, "greedy": None}
    return found | {"phases": {"prefill": phase}, "whole": phase}


def _memory(model: Model, engine: Engine, workload: Workload) -> tuple[list[dict[str, int]], list[str]]:
    """Bytes of weights and cache of every rank, and what is not as predicted."""
    mine = {
        "parameters_bytes": sum(x.numel() * x.element_size() for x in model.weights.values()),
        "kv_cache_bytes": engine.cache.size_bytes,
    }
    everyone, broken = gather_json(mine, model.device), []
    for rank, found in enumerate(everyone):
        expected = asdict(predict(model.spec, model.layout, workload, rank))
        broken += [f"{key} of rank {rank} is not as predicted" for key in found if found[key] != expected[key]]
    return everyone, broken
