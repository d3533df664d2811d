"""Backward through a layout: gradients of every stored weight, complete on the rank that stores it.

Within a stage, autograd runs each collective's counterpart (`collectives`). Between stages, gradients of hidden states
travel back as hidden states travelled forth: all micro-batches forward, then all backward in reverse order (GPipe;
Huang et al. 2019). What several ranks store a copy of is summed over them where each has seen a part of the work.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headgrid.layout.batching import Call, prefill_calls, replica_rows
from headgrid.layout.gradients import copies_of_kv_heads, ends_of_pipelines, summed_over
from headgrid.layout.layout import Layout
from headgrid.layout.legal import check_training
from headgrid.layout.shards import head_shard
from headgrid.runtime.collectives import Axis, Observer, Posted, Receipt
from headgrid.runtime.layer import Weights
from headgrid.runtime.mesh import GroupPool, Mesh
from headgrid.runtime.prefill import prefill_of
from headgrid.runtime.stage import Stage
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

Loss = Callable[[Tensor, list[int]], Tensor]
"""From logits [b, seq, vocab_size] of some rows of the batch, and these rows, to their part of the loss: a scalar that
depends on nothing else, so that all ranks that compute it agree.
"""


@dataclass(frozen=True, slots=True)
class _Pass:
    """A micro-batch on its way: what came in, what went out."""

    call: Call
    arrived: Tensor | None
    left: Tensor


class Trainer:
    """Forward and backward of one layout on this rank. All ranks of the layout must call the same methods in turn."""

    def __init__(
        self, model: ModelSpec, layout: Layout, workload: Workload, mesh: Mesh, pool: GroupPool, weights: Weights
    ) -> None:
        """`weights` as from `layer.load`; they stay the caller's, and may be updated in place between calls.

        Raises InvalidLayout as `layout.legal.check_training` does.
        """
        check_training(model, layout, workload)
        rows = replica_rows(layout, workload.batch)[mesh.at.dp]
        self.workload = replace(workload, every_token=True, decode_steps=0)
        self.model, self.layout, self.mesh = model, layout, mesh
        self.leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        self.stage = Stage(model, layout, mesh.stage, self.leaves, None, rows)
        self.path = prefill_of(layout, mesh, self.stage, self.workload)
        self.rows, self.plan = rows, prefill_calls(layout, workload, mesh.at.dp)
        self.sums = _Sums(model, layout, mesh, pool)
        self._sent: list[tuple[Posted | None, Tensor]] = []

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Report every collective of `gradients` to `observer` inside the block."""
        axes = tuple(self.sums.axes.values())
        for axis in axes:
            axis.observers.append(observer)
        try:
            with self.mesh.observed(observer):
                yield
        finally:
            for axis in axes:
                axis.observers.remove(observer)

    def gradients(self, tokens: Tensor, loss: Loss) -> tuple[Tensor, Weights]:
        """The loss and its gradients for `tokens` [batch, seq] (int64, the same on every rank).

        The loss is the sum over all rows of the batch of what `loss` gives for them. Gradients have the names, shapes
        and dtypes of the weights; those of copies are equal. The loss is that of this replica's rows, and 0 on ranks
        that are not of the last stage.
        """
        for leaf in self.leaves.values():
            leaf.grad = None
        mine = tokens[self.rows.start : self.rows.stop].to(self.stage.device)
        with torch.enable_grad():
            passes = [self._forward(mine, call, loss) for call in self.plan]
        for one in reversed(passes):
            self._backward(one)
        self._finish_sends()
        total = sum((one.left.detach() for one in passes if self.stage.last), torch.zeros((), device=self.stage.device))
        return total, self.sums.complete({name: _gradient(leaf) for name, leaf in self.leaves.items()})

    def _forward(self, tokens: Tensor, call: Call, loss: Loss) -> _Pass:
        mb = call.micro_batch
        arrived = None if self.stage.first else self._receive(call).requires_grad_()
        x = tokens[[row - self.rows.start for row in mb.rows()]] if arrived is None else arrived
        y = self.path.forward(x, call)
        if self.stage.last:
            return _Pass(call, arrived, loss(y.view(mb.size, self.workload.seq, -1), mb.rows()))
        self._send(self.mesh.pp, y.detach(), self.mesh.at.pp + 1)
        return _Pass(call, arrived, y)

    def _backward(self, one: _Pass) -> None:
        if self.stage.last:
            one.left.backward()
        else:
            receipt = self.mesh.pp_back.start_receive(torch.empty_like(one.left), self.mesh.at.pp + 1)
            torch.autograd.backward(one.left, receipt.wait())
        if one.arrived is not None:
            self._send(self.mesh.pp_back, _gradient(one.arrived), self.mesh.at.pp - 1)

    def _receive(self, call: Call) -> Tensor:
        """Hidden states of this rank's tokens from the stage before."""
        shape = (self.path.hidden_tokens(call), self.model.hidden_size)
        x = torch.empty(shape, dtype=self.stage.residual_dtype, device=self.stage.device)
        receipt: Receipt = self.mesh.pp.start_receive(x, self.mesh.at.pp - 1)
        return receipt.wait()

    def _send(self, axis: Axis, x: Tensor, to: int) -> None:
        x = x.contiguous()
        self._sent.append((axis.start_send(x, to), x))

    def _finish_sends(self) -> None:
        for work, _ in self._sent:
            if work is not None:
                work.wait()
        self._sent.clear()


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


class _Sums:
    """Adds up the gradients of weights of which several ranks hold a copy, as `layout.gradients` says."""

    def __init__(self, model: ModelSpec, layout: Layout, mesh: Mesh, pool: GroupPool) -> None:
        """Create or share the groups; collective over all ranks of the default group."""
        self.model, self.layout = model, layout
        groups = {name: layout.axis_ranks(name) for name in ("dp", "tp", "tp_slice", "tp_head")}
        groups |= {"pp_ends": ends_of_pipelines(layout), "kv_copies": copies_of_kv_heads(model, layout)}
        self.axes = {name: pool.axis(name, ranks) for name, ranks in groups.items()}
        own = head_shard(model, layout, mesh.at.head_group, mesh.at.slice)
        self.q_rows = len(own.heads) * own.qk_width

    def complete(self, gradients: Weights) -> Weights:
        """The sums, in place. Every rank of the layout must call it."""
        for name, gradient in gradients.items():
            for axis in summed_over(self.model, self.layout, name):
                self.axes[axis].all_reduce(gradient[self.q_rows :] if axis == "kv_copies" else gradient)
        return gradients
