"""Things done wrong on purpose, each on real ranks. A comparison that accepts one of them proves nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from cases import Case
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headgrid.layout import shards
from headgrid.layout.span import balanced
from headgrid.runtime import attention, stage
from headgrid.runtime.collectives import Axis
from headgrid.runtime.engine import Engine
from headgrid.runtime.exchange import Slices
from headgrid.runtime.stage import Rotation, Stage

Alter = Callable[[Engine], None]
VICTIM = 1  # head group 0, slice 1: the rank at fault where one is enough


def _nothing(engine: Engine) -> None:
    pass


@contextmanager
def inject(case: Case, rank: int) -> Iterator[Alter]:
    """Patches in place inside the block; yields what is to be done to the engine once it is built."""
    if not case.fault:
        yield _nothing
        return
    with FAULTS[case.fault](case, rank) as alter:
        yield alter or _nothing


def _swapped_slices(part: str) -> Callable[[Case, int], object]:
    """Slices 0 and 1 of head group 0 hold each other's columns of W_Q or rows of W_O."""

    @contextmanager
    def fault(case: Case, rank: int) -> Iterator[None]:
        def parameters(model: object, layout: object, at: int) -> dict[str, shards.Shard]:
            own = shards.parameters(model, layout, at)  # type: ignore[arg-type]
            other = shards.parameters(model, layout, 1 - at) if at in (0, 1) else own  # type: ignore[arg-type]
            return {name: other[name] if f".{part}.weight" in name else own[name] for name in own}

        with patch.object(stage, "parameters", parameters):
            yield

    return fault


@contextmanager
def _dropped_partial_sum(case: Case, rank: int) -> Iterator[Alter]:
    """One rank adds nothing to what W_O makes of all heads."""

    def alter(engine: Engine) -> None:
        output = engine.stage._output
        engine.stage._output = lambda out, *o: output(torch.zeros_like(out), *o)  # type: ignore[method-assign]

    yield alter if rank == VICTIM else _nothing


@contextmanager
def _shifted_head(case: Case, rank: int) -> Iterator[Alter]:
    """One rank's query heads are one further than its neighbours believe."""

    def alter(engine: Engine) -> None:
        width, heads = engine.stage.slices.qk_widths[engine.stage.slices.index], engine.stage.slices.heads
        for layer in engine.stage.layers:
            queries = layer.qkv[0][: heads * width]
            queries.copy_(queries.roll(width, 0))

    yield alter if rank == VICTIM else _nothing


@contextmanager
def _torn_pairs(case: Case, rank: int) -> Iterator[None]:
    """Contiguous slices of Q and K, so that channel c is no longer beside c + d/2."""

    def contiguous(model: object, num_slices: int) -> tuple[shards.Spans, ...]:
        return tuple((span,) for span in balanced(case.model.head_dim, num_slices))

    whole_pairs, tables = shards.qk_channels, Stage.rotation

    def of_whole_pairs(self: Stage, channels: object) -> Rotation:
        return tables(self, whole_pairs(case.model, case.layout.num_dim_slices)[self.mesh.at.slice])

    with patch.object(shards, "qk_channels", contiguous), patch.object(Stage, "rotation", of_whole_pairs):
        yield


@contextmanager
def _reversed_frequencies(case: Case, rank: int) -> Iterator[Alter]:
    """One rank turns its pairs by the angles of others."""

    def alter(engine: Engine) -> None:
        (rotation,) = engine.stage.rotations
        engine.stage.rotations = [Rotation(rotation.cos.flip(-1), rotation.sin.flip(-1))]

    yield alter if rank == VICTIM else _nothing


def _skipped_store(phase: str, leftover: float) -> Callable[[Case, int], object]:
    """One rank forgets to write the cache; what it reads instead is what was left there."""

    @contextmanager
    def fault(case: Case, rank: int) -> Iterator[Alter]:
        store = attention.store

        def forgetful(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: attention.Position | None) -> None:
            if ("prefill" if position is None else "decode") == phase:
                for part in (keys, values):
                    part.nan_to_num_(leftover)
            else:
                store(k, v, keys, values, position)

        with patch.object(attention, "store", forgetful if rank == VICTIM else store):
            yield _nothing

    return fault


@contextmanager
def _wrong_scale(case: Case, rank: int) -> Iterator[Alter]:
    """The scale of a slice, 1/sqrt(d/m), instead of the head's."""

    def alter(engine: Engine) -> None:
        engine.stage.scale *= case.layout.num_dim_slices**0.5

    yield alter


@contextmanager
def _swapped_rows(case: Case, rank: int) -> Iterator[Alter]:
    """The right logits, in the wrong order of sequences: what a comparison of sums or sets would accept."""

    def alter(engine: Engine) -> None:
        choose = engine._choose
        engine._choose = lambda logits, mb: choose(logits.flip(0), mb)  # type: ignore[method-assign]

    yield alter


@contextmanager
def _swapped_vocabulary(case: Case, rank: int) -> Iterator[Alter]:
    """The right logits, the vocabulary's shards put together in the wrong order."""

    def alter(engine: Engine) -> None:
        choose, shift = engine._choose, len(engine.stage.vocab[0])
        engine._choose = lambda logits, mb: choose(logits.roll(shift, 1), mb)  # type: ignore[method-assign]

    yield alter


@contextmanager
def _no_mask(case: Case, rank: int) -> Iterator[None]:
    """One rank's prefill also looks ahead."""

    def unmasked(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).transpose(1, 2)

    with patch.object(attention, "prefill", unmasked if rank == VICTIM else attention.prefill):
        yield


@contextmanager
def _reversed_columns(case: Case, rank: int) -> Iterator[Alter]:
    """Every rank takes the heads' outputs in reverse order."""

    def alter(engine: Engine) -> None:
        for layer in engine.stage.layers:
            layer.o[0].copy_(layer.o[0].flip(1))

    yield alter


@contextmanager
def _everything_gathered(case: Case, rank: int) -> Iterator[None]:
    """Right, but wasteful: every slice gathers Q, K and V whole, and drops what it need not hold."""

    def wasteful(slices: Slices, axis: Axis, rows: object, projections: Tensor, attend: Callable) -> Tensor:
        b, s, _ = projections.shape
        sizes = [b * s * width for width in slices.row_widths]
        parts = axis.all_gather(projections.reshape(-1), sizes).split(sizes)
        triples = [slices.split(part.view(b, s, -1), r) for r, part in enumerate(parts)]
        q, k, v = (torch.cat(pieces, dim=-1) for pieces in zip(*triples, strict=True))
        start = sum(slices.v_widths[: slices.index])
        cached = v[..., start : start + slices.v_widths[slices.index]]
        return attend(q, k, cached).flatten(2)

    with patch.dict(stage.EXCHANGES, {"gather": wasteful}):
        yield


WASTEFUL = "everything gathered"
FAULTS: dict[str, Callable[[Case, int], object]] = {
    "slices of W_Q swapped": _swapped_slices("q"),
    "slices of W_O swapped": _swapped_slices("o"),
    "partial sum dropped": _dropped_partial_sum,
    "query heads shifted": _shifted_head,
    "RoPE pairs torn": _torn_pairs,
    "RoPE frequencies reversed": _reversed_frequencies,
    "prefill not cached, poison left": _skipped_store("prefill", float("nan")),
    "decode not cached, poison left": _skipped_store("decode", float("nan")),
    "prefill not cached, zeros left": _skipped_store("prefill", 0.0),
    "decode not cached, zeros left": _skipped_store("decode", 0.0),
    "scale of a slice": _wrong_scale,
    "no causal mask": _no_mask,
    "columns of W_O reversed": _reversed_columns,
    "sequences swapped": _swapped_rows,
    "vocabulary shards swapped": _swapped_vocabulary,
    WASTEFUL: _everything_gathered,
}
