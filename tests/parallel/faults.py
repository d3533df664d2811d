"""Things done wrong on purpose, each on real ranks. A comparison that accepts one of them proves nothing."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from unittest.mock import patch

import torch
from case import Case
from torch import Tensor

from headgrid.layout import shards
from headgrid.layout.layout import Layout
from headgrid.layout.span import balanced
from headgrid.runtime import attention, exchange, gathered, stage
from headgrid.runtime import layer as layer_module
from headgrid.runtime.attention import ALL, Keys, Queries
from headgrid.runtime.collectives import Axis
from headgrid.runtime.engine import Engine
from headgrid.runtime.exchange import Core, Slices
from headgrid.runtime.residual import Sharded
from headgrid.runtime.rotary import Rotation
from headgrid.runtime.stage import Stage, StageCall
from headgrid.runtime.turns import Job, Turns
from headgrid.spec.rope import Rope

Alter = Callable[[Engine], None]
Inject = Callable[[Case, int], AbstractContextManager]


@dataclass(frozen=True, slots=True)
class Fault:
    """How to do it, where it must show first, and what it takes: layouts, and a workload beside the usual one."""

    inject: Inject
    shows: Literal["prefill", "decode", "tokens"] = "prefill"
    in_attention: bool = True
    same_counts: bool = True
    applies: Callable[[Layout], bool] = lambda layout: True
    workload: dict[str, Any] = field(default_factory=dict)


def victim(case: Case) -> int:
    """The rank at fault where one is enough: slice 1 of head group 0, or slice 0 where that owns the last positions."""
    return 0 if case.layout.exchange == "sequence" else 1


def _nothing(engine: Engine) -> None:
    pass


@contextmanager
def inject(case: Case, rank: int) -> Iterator[Alter]:
    """Patches in place inside the block; yields what is to be done to the engine once it is built."""
    if not case.fault or case.watched:
        yield _nothing
        return
    wrong = BESIDE[case.fault] if case.fault in BESIDE else FAULTS[case.fault].inject
    with wrong(case, rank) as alter:
        yield alter or _nothing


def _stages(engine: Engine) -> list[Stage]:
    """What computes: the stage, and with gathered weights the one that does the prefill."""
    return list(engine.path.stages)


def _swapped_slices(part: str) -> Inject:
    """Slices 0 and 1 of head group 0 hold each other's columns of W_Q or rows of W_O."""

    @contextmanager
    def fault(case: Case, rank: int) -> Iterator[None]:
        def parameters(model: object, layout: object, at: int) -> dict[str, shards.Shard]:
            own = shards.parameters(model, layout, at)  # type: ignore[arg-type]
            other = shards.parameters(model, layout, 1 - at) if at in (0, 1) else own  # type: ignore[arg-type]
            return {name: other[name] if f".{part}.weight" in name else own[name] for name in own}

        with patch.object(layer_module, "parameters", parameters):
            yield

    return fault


@contextmanager
def _dropped_partial_sum(case: Case, rank: int) -> Iterator[Alter]:
    """One rank adds nothing to what W_O makes of all heads."""

    def alter(engine: Engine) -> None:
        for each in _stages(engine):
            each._output = lambda out, *o, right=each._output: right(torch.zeros_like(out), *o)  # type: ignore

    yield alter if rank == victim(case) else _nothing


@contextmanager
def _shifted_head(case: Case, rank: int) -> Iterator[Alter]:
    """One rank's query heads are one further than its neighbours believe."""

    def alter(engine: Engine) -> None:
        width, heads = engine.stage.slices.qk_widths[engine.stage.slices.index], engine.stage.slices.heads
        for layer in engine.stage.layers:
            queries = layer.qkv[0][: heads * width]
            queries.copy_(queries.roll(width, 0))

    yield alter if rank == victim(case) else _nothing


@contextmanager
def _torn_pairs(case: Case, rank: int) -> Iterator[None]:
    """Contiguous slices of Q and K, so that channel c is no longer beside c + d/2."""

    def contiguous(model: object, num_slices: int) -> tuple[shards.Spans, ...]:
        return tuple((span,) for span in balanced(case.model.head_dim, num_slices))

    whole_pairs, tables = shards.qk_channels, Stage.rotation

    def of_whole_pairs(self: Stage, rope: Rope, channels: object) -> Rotation:
        return tables(self, rope, whole_pairs(case.model, case.layout.num_dim_slices)[self.mesh.at.slice])

    with patch.object(shards, "qk_channels", contiguous), patch.object(Stage, "rotation", of_whole_pairs):
        yield


@contextmanager
def _reversed_frequencies(case: Case, rank: int) -> Iterator[Alter]:
    """One rank turns its pairs by the angles of others."""

    def alter(engine: Engine) -> None:
        for each in _stages(engine):
            for tables in each.rotations.values():
                tables[:] = [Rotation(r.cos.flip(-1), r.sin.flip(-1), r.width) for r in tables]

    yield alter if rank == victim(case) else _nothing


def _skipped_store(phase: str, leftover: float) -> Inject:
    """One rank forgets to write the cache; what it reads instead is what was left there."""

    @contextmanager
    def fault(case: Case, rank: int) -> Iterator[Alter]:
        store = attention.store

        def forgetful(k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor], queries: Queries, keys: Keys = ALL) -> None:
            if ("decode" if queries.decoding else "prefill") == phase:
                for kept in cache:
                    kept.nan_to_num_(leftover)
            else:
                store(k, v, cache, queries, keys)

        with patch.object(attention, "store", forgetful if rank == victim(case) else store):
            yield _nothing

    return fault


@contextmanager
def _wrong_scale(case: Case, rank: int) -> Iterator[Alter]:
    """The scale of a slice, 1/sqrt(d/m), instead of the head's."""

    def alter(engine: Engine) -> None:
        for each in _stages(engine):
            each.rules = [replace(rule, scale=rule.scale * case.layout.num_dim_slices**0.5) for rule in each.rules]

    yield alter


@contextmanager
def _swapped_rows(case: Case, rank: int) -> Iterator[Alter]:
    """The right logits, in the wrong order of sequences: what a comparison of sums or sets would accept."""

    def alter(engine: Engine) -> None:
        choose = engine._choose
        engine._choose = lambda logits, *where: choose(logits.flip(0), *where)  # type: ignore[method-assign]

    yield alter


@contextmanager
def _swapped_vocabulary(case: Case, rank: int) -> Iterator[Alter]:
    """The right logits, the vocabulary's shards put together in the wrong order."""

    def alter(engine: Engine) -> None:
        choose, shift = engine._choose, len(engine.stage.vocab[0])
        engine._choose = lambda logits, *where: choose(logits.roll(shift, 1), *where)  # type: ignore[method-assign]

    yield alter


@contextmanager
def _no_mask(case: Case, rank: int) -> Iterator[None]:
    """One rank's prefill also looks ahead."""

    attend, hidden = attention.attend, exchange._hidden

    def all_seen(q: Tensor, k: Tensor, v: Tensor, queries: Queries, rule: attention.Rule) -> Tensor:
        return attend(q, k, v, queries, rule if queries.decoding else replace(rule, is_causal=False))

    def none_hidden(core: Core, *block: Any) -> Tensor | None:
        return hidden(core, *block) if core.queries.decoding else None

    if rank != victim(case):
        yield
        return
    with patch.object(attention, "attend", all_seen), patch.object(exchange, "_hidden", none_hidden):
        yield


@contextmanager
def _reversed_columns(case: Case, rank: int) -> Iterator[Alter]:
    """Every rank takes the heads' outputs in reverse order."""

    def alter(engine: Engine) -> None:
        for layer in engine.stage.layers:
            layer.o[0].copy_(layer.o[0].flip(1))

    yield alter


@contextmanager
def _wrong_owner(case: Case, rank: int) -> Iterator[None]:
    """One slice keeps the positions of its neighbour."""
    store = Core.store

    def elsewhere(self: Core, k: Tensor, v: Tensor, keys: Keys = ALL) -> None:
        store(self, k, v, Keys((keys.first + 1) % keys.stride, keys.stride))

    with patch.object(Core, "store", elsewhere if rank == victim(case) else store):
        yield


@contextmanager
def _scores_left_out(case: Case, rank: int) -> Iterator[Alter]:
    """One slice adds nothing to the scores."""

    def alter(engine: Engine) -> None:
        axis = engine.stage.mesh.tp_slice
        axis.all_reduce = lambda x, right=axis.all_reduce, **kind: right(x.zero_(), **kind)  # type: ignore

    yield alter if rank == victim(case) else _nothing


@contextmanager
def _swapped_tokens(case: Case, rank: int) -> Iterator[Alter]:
    """Ranks 0 and 1 get each other's tokens of every sum."""

    def alter(engine: Engine) -> None:
        for each in _stages(engine):
            each.residual.leave = lambda y, of=each.residual, right=each.residual.leave: right(_swapped(of.tp, y))

    yield alter


def _swapped(tp: Axis, y: Tensor) -> Tensor:
    parts = list(y.split([len(span) for span in balanced(len(y), tp.size)]))
    return torch.cat([parts[1], parts[0], *parts[2:]])


@contextmanager
def _short_row(case: Case, rank: int) -> Iterator[Alter]:
    """One rank takes the last sequence's prompt for a token shorter."""

    def alter(engine: Engine) -> None:
        engine.lengths = (*engine.lengths[:-1], engine.lengths[-1] - 1)

    yield alter if rank == victim(case) else _nothing


@contextmanager
def _forgotten_chunks(case: Case, rank: int) -> Iterator[None]:
    """One rank loses what earlier chunks of a prompt have cached."""
    store = attention.store

    def forgetful(k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor], queries: Queries, keys: Keys = ALL) -> None:
        if not queries.decoding and queries.starts:
            for kept in cache:
                kept[:, : keys.before(queries.starts[0])] = 0
        store(k, v, cache, queries, keys)

    with patch.object(attention, "store", forgetful if rank == victim(case) else store):
        yield


@contextmanager
def _never_ended(case: Case, rank: int) -> Iterator[Alter]:
    """Sequences that have chosen the stop token go on."""

    def alter(engine: Engine) -> None:
        engine.stop_tokens = engine.stop_tokens[:0]

    yield alter


@contextmanager
def _misplaced_slices(case: Case, rank: int) -> Iterator[None]:
    """One rank puts the gathered slices of a layer's weights together in the wrong order."""
    together = gathered._heads_together

    def backwards(slices: Slices, blocks: list[Tensor]) -> Tensor:
        return together(slices, blocks[::-1])

    with patch.object(gathered, "_heads_together", backwards if rank == victim(case) else together):
        yield


@contextmanager
def _everything_gathered(case: Case, rank: int) -> Iterator[None]:
    """Right, but wasteful: every slice gathers Q, K and V whole, and drops what it need not hold."""

    def wasteful(slices: Slices, axis: Axis, rows: object, projections: Tensor, core: Core) -> Tensor:
        b, s, _ = projections.shape
        sizes = [b * s * width for width in slices.row_widths]
        parts = axis.all_gather(projections.reshape(-1), sizes).split(sizes)
        triples = [slices.split(part.view(b, s, -1), r) for r, part in enumerate(parts)]
        q, k, v = (torch.cat(pieces, dim=-1) for pieces in zip(*triples, strict=True))
        start = sum(slices.v_widths[: slices.index])
        cached = v[..., start : start + slices.v_widths[slices.index]]
        return core.attend(q, k, cached).flatten(2)

    with patch.dict(stage.EXCHANGES, {"gather": wasteful}):
        yield


@contextmanager
def _chunks_together(case: Case, rank: int) -> Iterator[None]:
    """A chunk of a prompt does not wait for the end of the one before it, whose keys it needs in every layer."""
    begun = Turns._begun

    def hasty(self: Turns, waiting: deque[Job], under_way: deque) -> object:
        if waiting:
            waiting[0] = replace(waiting[0], sequences=object())
        return begun(self, waiting, under_way)

    with patch.object(Turns, "_begun", hasty):
        yield


@contextmanager
def _crowded(case: Case, rank: int) -> Iterator[Alter]:
    """Right, but one more call is under way than the layout says."""

    def alter(engine: Engine) -> None:
        engine.path.turns.at_once += 1

    yield alter


@contextmanager
def _swapped_sums(case: Case, rank: int) -> Iterator[None]:
    """Ranks 0 and 1 get each other's tokens of every sum that is scattered."""
    leave = Sharded.leave

    def swapped(self: Sharded, y: Tensor) -> Tensor:
        return leave(self, _swapped(self.tp, y))

    with patch.object(Sharded, "leave", swapped):
        yield


@contextmanager
def _positions_of_others(case: Case, rank: int) -> Iterator[None]:
    """One rank takes its sequences for as long as the next rank's are."""
    right, ranks = StageCall.of, case.layout.tp

    def wrong(self: StageCall, owner: int) -> StageCall:
        mine = right(self, owner)
        return mine if self.alone else replace(mine, queries=right(self, (owner + 1) % ranks).queries)

    with patch.object(StageCall, "of", wrong if rank == victim(case) else right):
        yield


SWAPPED_SUMS = "scattered sums of ranks swapped"
OTHERS_POSITIONS = "positions of another rank's sequences"
WASTEFUL = "everything gathered"
HASTY = "chunks of a prompt together"
CROWDED = "one call more at once"
BESIDE: dict[str, Inject] = {WASTEFUL: _everything_gathered, HASTY: _chunks_together, CROWDED: _crowded}
BESIDE |= {SWAPPED_SUMS: _swapped_sums, OTHERS_POSITIONS: _positions_of_others}
CHUNKS = {"chunk_positions": 3}
RAGGED = {"prompt_lengths": (8, 5, 3)}
FAULTS: dict[str, Fault] = {
    "slices of W_Q swapped": Fault(_swapped_slices("q")),
    "slices of W_O swapped": Fault(_swapped_slices("o")),
    "partial sum dropped": Fault(_dropped_partial_sum),
    "query heads shifted": Fault(_shifted_head),
    "RoPE pairs torn": Fault(_torn_pairs),
    "RoPE frequencies reversed": Fault(_reversed_frequencies),
    "prefill not cached, poison left": Fault(_skipped_store("prefill", float("nan")), "decode"),
    "decode not cached, poison left": Fault(_skipped_store("decode", float("nan")), "decode"),
    "prefill not cached, zeros left": Fault(_skipped_store("prefill", 0.0), "decode"),
    "decode not cached, zeros left": Fault(_skipped_store("decode", 0.0), "decode"),
    "chunks not cached, zeros left": Fault(_skipped_store("prefill", 0.0), workload=CHUNKS),
    "earlier chunks forgotten": Fault(_forgotten_chunks, workload=CHUNKS),
    "prompt taken for shorter": Fault(_short_row, "decode", same_counts=False, workload=RAGGED),
    "stop token ignored": Fault(_never_ended, "tokens", in_attention=False),
    "scale of a slice": Fault(_wrong_scale),
    "no causal mask": Fault(_no_mask, same_counts=False),
    "columns of W_O reversed": Fault(_reversed_columns),
    "sequences swapped": Fault(_swapped_rows, in_attention=False),
    "vocabulary shards swapped": Fault(_swapped_vocabulary, in_attention=False),
    "owner of positions wrong": Fault(_wrong_owner, "decode", applies=lambda layout: layout.exchange == "sequence"),
    "scores of a slice left out": Fault(_scores_left_out, applies=lambda layout: layout.exchange == "scores"),
    "tokens of ranks swapped": Fault(_swapped_tokens, applies=lambda layout: layout.residual == "sharded"),
    "gathered slices misplaced": Fault(
        _misplaced_slices, in_attention=False, applies=lambda layout: layout.weights == "gathered"
    ),
}
