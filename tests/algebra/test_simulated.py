"""The simulated ranks themselves: right collectives, right gradients, and faults that end at once."""

import itertools
import time
from collections.abc import Callable

import pytest
import torch
from simulated import Mismatch, Ranks, axes
from torch import Tensor

from headgrid.layout.layout import Layout
from headgrid.runtime.collectives import Axis, Recorder

Outs = Callable[[list[Tensor]], list[Tensor]]
SIZES = [(3, 3, 3), (4, 0, 1), (0, 2), (1,) * 16, (5, 0, 0, 2, 1)]


def tp(count: int, ranks: Ranks) -> list[Axis]:
    return [mesh.tp for mesh in axes(Layout(num_head_groups=count), ranks)]


def through(ranks: Ranks, xs: list[Tensor], call: Callable[[Axis, Tensor], Tensor], ups: list[Tensor]) -> tuple:
    """Every rank's result of a collective, and the gradient of its input."""

    def job(axis: Axis) -> tuple[Tensor, Tensor]:
        x = xs[axis.index].clone().requires_grad_()
        out = call(axis, x)
        return out.detach(), torch.autograd.grad(out, x, ups[axis.index])[0]

    outs, grads = zip(*ranks.run([lambda axis=axis: job(axis) for axis in tp(len(xs), ranks)]), strict=True)
    return list(outs), list(grads)


def compare(ranks: Ranks, xs: list[Tensor], call: Callable[[Axis, Tensor], Tensor], direct: Outs) -> None:
    leaves = [x.clone().requires_grad_() for x in xs]
    expected = direct(leaves)
    ups = [torch.randn(out.shape, dtype=out.dtype) for out in expected]
    outs, grads = through(ranks, xs, call, ups)
    for actual, right in zip(outs, expected, strict=True):
        assert torch.allclose(actual, right.detach(), rtol=1e-14, atol=1e-14) and actual.shape == right.shape
    for actual, right in zip(grads, torch.autograd.grad(expected, leaves, ups), strict=True):
        assert torch.allclose(actual, right, rtol=1e-14, atol=1e-14)


def numbers(*sizes: int) -> list[Tensor]:
    return list(torch.randn(sum(sizes), dtype=torch.float64).split(sizes))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_collectives_and_their_gradients(sizes: tuple[int, ...], ranks: Ranks) -> None:
    torch.manual_seed(len(sizes))
    p, total = len(sizes), sum(sizes)
    compare(ranks, numbers(*sizes), lambda axis, x: axis.all_gather(x, sizes), lambda xs: [torch.cat(xs)] * p)
    whole = numbers(*[total] * p)
    compare(ranks, whole, lambda axis, x: axis.reduce_scatter(x, sizes), lambda xs: list(sum(xs).split(sizes)))  # type: ignore[union-attr]
    compare(ranks, whole, lambda axis, x: axis.all_reduce(x, alike=False), lambda xs: [sum(xs)] * p)  # type: ignore[list-item]
    sent = [[(r * 7 + t * 3) % 4 for t in range(p)] for r in range(p)]
    received = [list(column) for column in zip(*sent, strict=True)]

    def routed(xs: list[Tensor]) -> list[Tensor]:
        return [torch.cat(column) for column in zip(*(x.split(s) for x, s in zip(xs, sent, strict=True)), strict=True)]

    both = lambda axis, x: axis.all_to_all(x, sent[axis.index], received[axis.index])  # noqa: E731
    compare(ranks, numbers(*map(sum, sent)), both, routed)


def test_what_is_used_everywhere_collects_gradients(ranks: Ranks) -> None:
    x, ups = torch.randn(5, dtype=torch.float64), numbers(5, 5, 5)
    outs, grads = through(ranks, [x] * 3, lambda axis, x: axis.fan_out(x), ups)
    assert all(torch.equal(out, x) for out in outs)
    assert all(torch.allclose(grad, sum(ups)) for grad in grads)  # type: ignore[arg-type]


def test_calls_are_recorded(ranks: Ranks) -> None:
    recorders = [Recorder() for _ in range(4)]

    def job(axis: Axis) -> Tensor:
        axis.observers.append(recorders[axis.index])
        return axis.all_reduce(torch.ones(8))

    outs = ranks.run([lambda axis=axis: job(axis) for axis in tp(4, ranks)])
    assert all(torch.equal(out, torch.full((8,), 4.0)) for out in outs)
    assert {(call.kind, call.bytes) for recorder in recorders for call in recorder.issued} == {("all_reduce", 48)}


class Broken(Exception):
    """What the rank at fault raises."""


def _raise(axis: Axis) -> None:
    raise Broken(axis.index)


FAULTS: dict[str, tuple[Callable[[Axis], object], type[Exception]]] = {
    "raises": (_raise, Broken),
    "returns": (lambda axis: None, Mismatch),
    "calls another": (lambda axis: axis.all_gather(torch.ones(4), [4] * 4), Mismatch),
    "other dtype": (lambda axis: axis.all_reduce(torch.ones(4, dtype=torch.float64)), Mismatch),
    "other shape": (lambda axis: axis.all_reduce(torch.ones(2, 2)), Mismatch),
    "once more": (lambda axis: [axis.all_reduce(torch.ones(4)) for _ in range(2)], Mismatch),
}


@pytest.mark.parametrize(("fault", "culprit"), list(itertools.product(FAULTS, (0, 2, 3))))
def test_a_rank_at_fault_ends_all(fault: str, culprit: int, ranks: Ranks) -> None:
    wrong, kind = FAULTS[fault]

    def job(axis: Axis) -> object:
        return wrong(axis) if axis.index == culprit else axis.all_reduce(torch.ones(4))

    start = time.monotonic()
    with pytest.raises(kind):
        ranks.run([lambda axis=axis: job(axis) for axis in tp(4, ranks)])
    assert time.monotonic() - start < 1
    assert ranks.run([lambda r=r: r for r in range(4)]) == [0, 1, 2, 3]  # and the threads serve on


def test_parts_that_do_not_fit_are_refused(ranks: Ranks) -> None:
    def job(axis: Axis) -> Tensor:
        return axis.all_to_all(torch.ones(2), [1, 1], [2, 0] if axis.index else [0, 2])

    with pytest.raises(Mismatch, match="sent"):
        ranks.run([lambda axis=axis: job(axis) for axis in tp(2, ranks)])
