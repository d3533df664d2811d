"""Things done wrong on purpose inside the runtime. Each patches what is there and yields what to do to built stages."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from halves import Alter, Case
from torch import Tensor

from headgrid.layout import shards
from headgrid.layout.span import Spans, balanced
from headgrid.runtime import attention
from headgrid.runtime import layer as layer_module
from headgrid.runtime.attention import ALL, Keys
from headgrid.runtime.collectives import Axis
from headgrid.runtime.exchange import Core, Slices
from headgrid.runtime.rotary import Rotation
from headgrid.runtime.stage import Stage, StageCall
from headgrid.spec.rope import Rope

VICTIM = 1  # head group 0, slice 1 (with m = 1: head group 1): the rank at fault where one is enough
Mutation = Callable[[Case], AbstractContextManager[Alter | None]]


def altered(change: Callable[[Stage, Case], None], *, only_victim: bool = False) -> Mutation:
    """`change` is done to every stage once it is built, or to the victim's."""

    @contextmanager
    def mutation(case: Case) -> Iterator[Alter]:
        yield lambda stage: change(stage, case) if not only_victim or stage.mesh.tp.index == VICTIM else None

    return mutation


def patched(target: Any, name: str, wrong: Callable[..., Any]) -> Mutation:
    """`target.name` becomes `wrong(right, ...)` on all ranks."""

    @contextmanager
    def mutation(case: Case) -> Iterator[None]:
        right = getattr(target, name)

        def replacement(*args: Any, **options: Any) -> Any:
            return wrong(right, *args, **options)

        with patch.object(target, name, replacement):
            yield None

    return mutation


def swapped_shards(part: str) -> Mutation:
    """Ranks 0 and 1 hold each other's part of a matrix."""

    def wrong(right: Callable[..., dict], model: object, layout: object, rank: int) -> dict:
        own, other = right(model, layout, rank), right(model, layout, {0: 1, 1: 0}.get(rank, rank))
        return {name: other[name] if f".{part}.weight" in name else own[name] for name in own}

    return patched(layer_module, "parameters", wrong)


def _reversed_join(right: Callable, slices: Slices, blocks: list[Tensor]) -> Any:
    return right(slices, blocks[::-1])


def _reversed_join_kv(right: Callable, slices: Slices, gathered: Tensor, b: int, s: int) -> Any:
    return right(slices, gathered.view(len(slices.qk_widths), -1).flip(0).flatten(), b, s)


@contextmanager
def swapped_blocks(case: Case) -> Iterator[None]:
    """Channels of gathered heads in the order of the last slice first."""
    with (
        patched(Slices, "join", _reversed_join)(case),
        patched(Slices, "join_kv", _reversed_join_kv)(case),
    ):
        yield None


def _reversed_gather(right: Callable, axis: Axis, x: Tensor, sizes: list[int]) -> Tensor:
    parts = right(axis, x, sizes)
    return parts.view(axis.size, -1).flip(0).flatten() if axis.name == "tp_slice" else parts


def _reversed_concat(right: Callable, stage: Stage, x: Tensor, widths: list[int], **options: bool) -> Tensor:
    return torch.cat(right(stage, x, widths, **options).split(list(widths), dim=-1)[::-1], dim=-1)


def _nothing_to_sum(stage: Stage, case: Case) -> None:
    leave = stage.residual.leave
    stage.residual.leave = lambda y: leave(torch.zeros_like(y))  # type: ignore[method-assign]


def _no_partial_scores(stage: Stage, case: Case) -> None:
    axis, right = stage.mesh.tp_slice, stage.mesh.tp_slice.all_reduce
    axis.all_reduce = lambda x, **options: right(torch.zeros_like(x), **options)  # type: ignore[method-assign]


def _next_head(stage: Stage, case: Case) -> None:
    width, heads = stage.slices.qk_widths[stage.slices.index], stage.slices.heads
    queries = stage.layers[0].qkv[0][: heads * width]
    queries.copy_(queries.roll(width, 0))


@contextmanager
def torn_pairs(case: Case) -> Iterator[None]:
    """Contiguous slices of Q and K, so that channel c is no longer beside c + d/2."""
    pairs, tables, m = shards.qk_channels, Stage.rotation, case.layout.num_dim_slices

    def contiguous(model: object, num_slices: int) -> tuple[Spans, ...]:
        return tuple((span,) for span in balanced(case.model.head_dim, num_slices))

    def of_pairs(self: Stage, rope: Rope, channels: object) -> Rotation:
        return tables(self, rope, pairs(case.model, m)[self.mesh.at.slice])

    with patch.object(shards, "qk_channels", contiguous), patch.object(Stage, "rotation", of_pairs):
        yield None


class Forgetful(Core):
    """A core that keeps nothing in the cache."""

    def store(self, k: Tensor, v: Tensor, keys: Keys = ALL) -> None:
        """Do nothing."""


class Cleared(Core):
    """A core that keeps nothing, where zeros were left in the cache."""

    def store(self, k: Tensor, v: Tensor, keys: Keys = ALL) -> None:
        """Find zeros for NaN."""
        for cache in self.cache or ():
            cache.nan_to_num_(0.0)


def core(kind: type[Core]) -> Callable[[Stage, Case], None]:
    """Another core."""

    def change(stage: Stage, case: Case) -> None:
        right = stage._core

        def wrong(index: int, call: StageCall) -> Core:
            found = right(index, call)
            return kind(found.rule, found.queries, found.cache)

        stage._core = wrong  # type: ignore[method-assign]

    return change


def rule(**changes: Callable[[Case], float | bool]) -> Callable[[Stage, Case], None]:
    """Other numbers in the rule of attention."""

    def change(stage: Stage, case: Case) -> None:
        values = {name: value(case) for name, value in changes.items()}
        stage.rules = [replace(each, **values) for each in stage.rules]  # type: ignore[misc]

    return change


def _one_position_off(stage: Stage, case: Case) -> None:
    right = stage._attention

    def off(layer: object, index: int, x: Tensor, call: StageCall) -> Tensor:
        q = call.queries
        if q.decoding:
            moved = replace(q, starts=tuple(start - 1 for start in q.starts), at=q.at - 1)
            call = replace(call, queries=moved)
        return right(layer, index, x, call)  # type: ignore[arg-type]

    stage._attention = off  # type: ignore[method-assign]


def _unweighted(right: Callable, outs: Tensor, lses: Tensor) -> Tensor:
    return outs.mean(0)


def _same_lengths(stage: Stage, case: Case) -> None:
    right = stage._core

    def whole(index: int, call: StageCall) -> Core:
        core = right(index, call)
        return replace(core, queries=replace(core.queries, lengths=None))

    stage._core = whole  # type: ignore[method-assign]


MUTATIONS: dict[str, Mutation] = {
    "swapped slices of W_Q": swapped_shards("q"),
    "swapped slices of W_O": swapped_shards("o"),
    "swapped blocks on arrival": swapped_blocks,
    "swapped outputs of heads": patched(Stage, "_concat", _reversed_concat),
    "dropped output of one rank": altered(_nothing_to_sum, only_victim=True),
    "dropped scores of one rank": altered(_no_partial_scores, only_victim=True),
    "head shifted by one": altered(_next_head, only_victim=True),
    "torn RoPE pairs": torn_pairs,
    "skipped cache write": altered(core(Forgetful), only_victim=True),
    "skipped cache write, zeros there": altered(core(Cleared), only_victim=True),
    "scale of a slice": altered(rule(scale=lambda case: case.model.scale * case.layout.num_dim_slices**0.5)),
    "no scale": altered(rule(scale=lambda case: 1.0)),
    "no window on one rank": altered(rule(window=lambda case: 0), only_victim=True),
    "window off by one": altered(rule(window=lambda case: case.model.sliding_window + 1)),
    "no soft cap on one rank": altered(rule(softcap=lambda case: 0.0), only_victim=True),
    "no causal mask on one rank": altered(rule(is_causal=lambda case: False), only_victim=True),
    "decode position off by one": altered(_one_position_off),
    "merge without log-sum-exp": patched(attention, "merge", _unweighted),
    "padding seen on one rank": altered(_same_lengths, only_victim=True),
}

# For `gather` alone it does not matter in which order slices arrive: a sum of products has none.
HARMLESS: dict[str, Mutation] = {"blocks of Q and K in another order": patched(Axis, "all_gather", _reversed_gather)}


def _no_sum(right: Callable, axis: Axis, x: Tensor) -> Tensor:
    return x


def _alike(value: bool) -> Callable[..., Tensor]:
    def wrong(right: Callable, axis: Axis, x: Tensor, *sizes: Any, alike: bool = False) -> Tensor:
        return right(axis, x, *sizes, alike=value)

    return wrong


class _OneWay(torch.autograd.Function):
    """An all-to-all whose gradient keeps only what this rank sent to itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, send: list[int], receive: list[int]) -> Tensor:
        """Exchange."""
        ctx.saved = x.numel(), axis.index, send, receive
        return axis._exchange(x, send, receive)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Exchange nothing."""
        size, own, send, receive = ctx.saved
        result, to, source = grads[0].new_zeros(size), sum(send[:own]), sum(receive[:own])
        result[to : to + send[own]] = grads[0][source : source + receive[own]]
        return result, None, None, None


def _no_return(right: Callable, axis: Axis, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
    return _OneWay.apply(x, axis, send, receive)  # type: ignore[return-value]


GRADIENT_MUTATIONS: dict[str, Mutation] = {
    "no sum over parts of the work": patched(Axis, "fan_out", _no_sum),
    "sums taken for alike": patched(Axis, "all_reduce", _alike(True)),
    "sums taken for parts": patched(Axis, "all_reduce", _alike(False)),
    "gathers taken for alike": patched(Axis, "all_gather", _alike(True)),
    "gathers taken for parts": patched(Axis, "all_gather", _alike(False)),
    "all-to-all that returns nothing": patched(Axis, "all_to_all", _no_return),
}
