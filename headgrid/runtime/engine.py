"""Prefill and decode of one layout: micro-batches through the pipeline, one CUDA graph per decode micro-batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from headgrid.layout.batching import (
    Call,
    MicroBatch,
    decode_micro_batches,
    owned_rows,
    prefill_calls,
    replica_rows,
)
from headgrid.layout.layout import Layout
from headgrid.layout.memory import cache_shape
from headgrid.runtime.attention import Queries
from headgrid.runtime.cache import carve
from headgrid.runtime.collectives import Receipt
from headgrid.runtime.layer import Weights
from headgrid.runtime.mesh import Mesh
from headgrid.runtime.peers import direct_stage
from headgrid.runtime.prefill import prefill_of
from headgrid.runtime.sampling import Sampling, choose
from headgrid.runtime.stage import Stage, StageCall
from headgrid.runtime.turns import Job
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload


class StageObserver(Protocol):
    """Told when this stage starts and ends to compute a micro-batch."""

    def __call__(self, phase: str, micro_batch: int, step: int, compute: Callable[[], Tensor]) -> Tensor:
        """Call `compute` and return what it returns."""
        ...


@dataclass(frozen=True, slots=True)
class Decoded:
    """What decode produced for this replica's rows: tokens [steps, rows] and logits [steps, rows, vocab] or None.

    Only ranks of the last stage have them.
    """

    tokens: Tensor
    logits: Tensor | None


class Engine:
    """Runs one layout of a model on this rank. All ranks of the layout must call the same methods in turn."""

    def __init__(
        self,
        model: ModelSpec,
        layout: Layout,
        workload: Workload,
        mesh: Mesh,
        weights: Weights,
        arena: Tensor,
        stop_tokens: Sequence[int] = (),
        sampling: Sampling | None = None,
        *,
        direct: bool = True,
    ) -> None:
        """`weights` as from `layer.load`; `arena` flat, with at least the cache's elements. Tokens are chosen greedily
        without `sampling`. A sequence that has chosen one of `stop_tokens` repeats it from then on. `direct`: decode
        reads peers' memory where it can (`runtime.peers`), instead of calling collectives.
        """
        self.model, self.layout, self.workload, self.mesh = model, layout, workload, mesh
        self.cache = carve(arena, cache_shape(model, layout, workload, mesh.rank))
        owned = owned_rows(layout, workload.batch, mesh.rank)
        self.stage = Stage(model, layout, mesh.stage, weights, self.cache, owned, workload.cache_positions)
        self.path = prefill_of(layout, mesh, self.stage, workload)
        self.device = self.stage.device
        self.rows = replica_rows(layout, workload.batch)[mesh.at.dp]
        self.lengths = workload.lengths[self.rows.start : self.rows.stop]
        self.prefill_plan = prefill_calls(layout, workload, mesh.at.dp)
        self.decode_plan = decode_micro_batches(layout, workload, mesh.at.dp)
        self.tokens = torch.zeros(len(self.rows), dtype=torch.int64, device=self.device)
        shape = (len(self.rows), *([workload.seq] * workload.every_token), model.output_size)
        self.logits = torch.zeros(shape, dtype=self.stage.dtype, device=self.device)
        self.sampling = Sampling() if sampling is None else sampling
        self.stop_tokens = torch.tensor(list(stop_tokens), dtype=torch.int64, device=self.device)
        self.ended = torch.zeros_like(self.tokens, dtype=torch.bool)
        self._steps, self._positions = 0, torch.zeros_like(self.tokens)
        plans = {*(call.micro_batch for call in self.prefill_plan), *self.decode_plan}
        self._local = {mb: self._replica_index(mb) for mb in plans}
        self._hidden = [self._hidden_buffer(len(self.stage.residual_of(1).own(mb.size))) for mb in self.decode_plan]
        self.decoder = (direct_stage(self.stage, self.decode_plan) if direct else None) or self.stage
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._sent: list[tuple[dist.Work | None, Tensor]] = []

    def _replica_index(self, micro_batch: MicroBatch) -> Tensor:
        rows = [row - self.rows.start for row in micro_batch.rows()]
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    def _hidden_buffer(self, tokens: int) -> Tensor:
        return torch.empty(tokens, self.model.hidden_size, dtype=self.stage.residual_dtype, device=self.device)

    @torch.inference_mode()
    def prefill(self, prompts: Tensor, observe: StageObserver | None = None) -> None:
        """Run all prompts [batch, seq] (the same on every rank, int64), fill the cache, choose the first tokens.

        Of a prompt shorter than seq the rest may hold any ids. On the last stage `logits` [rows, vocab_size] and
        `tokens` [rows] of this replica's rows are set; the first stage gets the tokens. Where the workload wants every
        token's, `logits` [rows, seq, vocab_size] are all that is set.
        """
        mine = prompts[self.rows.start : self.rows.stop].to(self.device)
        self.ended.zero_()
        self._set_steps(0)
        plan, arriving = self.prefill_plan, [self._expect(self.path.hidden_tokens(self.prefill_plan[0]))]

        def compute(k: int) -> Tensor:
            x = self._ids(mine, plan[k]) if self.stage.first else _arrived(arriving.pop())
            if k + 1 < len(plan):
                arriving.append(self._expect(self.path.hidden_tokens(plan[k + 1])))
            return _observed(observe, "prefill", k, 0, lambda: self.path.forward(x, plan[k]))

        jobs = (Job(c.micro_batch, partial(compute, k), partial(self._hand_on, c)) for k, c in enumerate(plan))
        self.path.turns.run(jobs)
        self._set_steps(0)
        if self.stage.last:
            self._return_tokens(self.tokens)
        elif self.stage.first:
            self.tokens.copy_(self._expect_tokens(len(self.rows)).wait())
        self._finish_sends()

    def _ids(self, prompts: Tensor, call: Call) -> Tensor:
        return prompts[:, call.positions.start : call.positions.stop].index_select(0, self._local[call.micro_batch])

    @torch.inference_mode()
    def decode(self, steps: int, *, keep_logits: bool = False, observe: StageObserver | None = None) -> Decoded:
        """Decode `steps` tokens for every row, with micro-batches in flight across tokens.

        Continues where prefill or the last decode ended. With pp > 1 the first stage works on the next micro-batch
        while later stages finish this one; only the tokens, which return on a channel of their own, hold it up.
        Raises ValueError for a bidirectional model, or more steps than the cache has room for.
        """
        if not self.model.is_causal:
            raise ValueError(f"{self.model.name} is bidirectional: there is nothing to decode")
        if self._steps + steps > self.workload.decode_steps:
            raise ValueError(f"{self._steps} + {steps} steps, and the cache has room for {self.workload.decode_steps}")
        tokens: list[Tensor] = []
        logits: list[Tensor] = []
        work = [(step, k) for step in range(steps) for k in range(len(self.decode_plan))]
        returning: dict[int, Receipt] = {}
        arriving = self._expect(len(self._hidden[0])) if steps else None
        # What follows a single micro-batch needs its tokens. A kernel that waits for it would hold up the loading of
        # those that make the tokens, at their first use, for ever.
        early = len(self.decode_plan) > 1
        for n, (step, k) in enumerate(work):
            mb, following = self.decode_plan[k], work[n + 1 : n + 2]
            if k == 0 and step:
                self._set_steps(self._steps + 1)
            if not self.stage.first:
                self._hidden[k].copy_(_arrived(arriving))
            if following and early:
                arriving = self._expect(len(self._hidden[following[0][1]]))
            if k in returning:
                self._put_tokens(mb, returning.pop(k))
            _observed(observe, "decode", k, step, lambda k=k: self._compute(k))
            if not self.stage.last:
                self._send(self._hidden[k])
                if self.stage.first:
                    returning[k] = self._expect_tokens(mb.size)
            else:
                self._return_tokens(self.tokens.index_select(0, self._local[mb]))
                if k == len(self.decode_plan) - 1:
                    tokens.append(self.tokens.clone())
                    logits += [self.logits.clone()] * keep_logits
            if following and not early:
                arriving = self._expect(len(self._hidden[following[0][1]]))
        for k, receipt in returning.items():
            self._put_tokens(self.decode_plan[k], receipt)
        self._set_steps(self._steps + min(1, steps))
        self._finish_sends()
        empty = self.tokens.new_empty(0, len(self.rows))
        return Decoded(torch.stack(tokens) if tokens else empty, torch.stack(logits) if logits else None)

    def capture(self) -> None:
        """Record each decode micro-batch's compute as a CUDA graph. Call after a prefill and a decode (warm-up)."""
        with torch.inference_mode():
            for k in range(len(self.decode_plan)):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog asks too
                    self._eager(k)
                self._graphs.append(graph)

    def _compute(self, k: int) -> Tensor:
        if self._graphs:
            self._graphs[k].replay()
            return self._hidden[k]
        return self._eager(k)

    def _eager(self, k: int) -> Tensor:
        """Decode micro-batch k: from `tokens` or `_hidden[k]` to `_hidden[k]` or `tokens` and `logits`, in place."""
        mb, local = self.decode_plan[k], self._local[self.decode_plan[k]]
        x = self.tokens.index_select(0, local)[:, None] if self.stage.first else self._hidden[k]
        starts = tuple(self.lengths[row - self.rows.start] + self._steps for row in mb.rows())
        queries = Queries(1, starts, self._positions.index_select(0, local), decoding=True)
        y = self.decoder.forward(x, StageCall(mb, queries, range(mb.size)))
        if self.stage.last:
            self._choose(y, local, queries.at + 1)
        elif self.stage.first:
            self._hidden[k].copy_(y)
        return y

    def _choose(self, logits: Tensor, local: Tensor, positions: Tensor) -> None:
        """Keep the logits [b, vocab_size] of these rows of the replica, and the tokens chosen for these positions."""
        tokens = choose(logits, self.sampling, local + self.rows.start, positions)
        if len(self.stop_tokens):
            ended = self.ended.index_select(0, local)
            tokens = torch.where(ended, self.tokens.index_select(0, local), tokens)
            self.ended.index_copy_(0, local, ended | torch.isin(tokens, self.stop_tokens))
        self.logits.index_copy_(0, local, logits)
        self.tokens.index_copy_(0, local, tokens)

    def _hand_on(self, call: Call, y: Tensor) -> None:
        if not self.stage.last:
            self._send(y)
            return
        local, ending = self._local[call.micro_batch], call.ending(self.workload)
        if self.workload.every_token:
            self.logits[local, call.positions.start : call.positions.stop] = y.unflatten(0, (len(local), -1))
        elif ending:
            local = local if len(ending) == len(local) else local[torch.tensor(ending, device=self.device)]
            self._choose(y, local, self._positions.index_select(0, local))

    def _set_steps(self, steps: int) -> None:
        """Every sequence has so many tokens behind its prompt."""
        if not steps:
            self._positions.copy_(torch.tensor(self.lengths))
        elif steps > self._steps:
            self._positions += steps - self._steps
        self._steps = steps

    def _expect(self, tokens: int) -> Receipt | None:
        """Post the receive of a call's hidden states before they are needed."""
        if self.stage.first:
            return None
        return self.mesh.pp.start_receive(self._hidden_buffer(tokens), self.mesh.at.pp - 1)

    def _send(self, x: Tensor) -> None:
        self._sent.append((self.mesh.pp.start_send(x, self.mesh.at.pp + 1), x))
        if len(self._sent) > 2:  # bounds the memory of hidden states under way
            self._finish_sends(keep=2)

    def _finish_sends(self, keep: int = 0) -> None:
        while len(self._sent) > keep:
            work, _ = self._sent.pop(0)
            if work is not None:
                work.wait()

    def _return_tokens(self, tokens: Tensor) -> None:
        if self.layout.pp > 1:
            tokens = tokens.clone()
            self._sent.append((self.mesh.pp_back.start_send(tokens, 0), tokens))

    def _expect_tokens(self, rows: int) -> Receipt:
        return self.mesh.pp_back.start_receive(self.tokens.new_empty(rows), self.layout.pp - 1)

    def _put_tokens(self, mb: MicroBatch, receipt: Receipt) -> None:
        self.tokens.index_copy_(0, self._local[mb], receipt.wait())


def _arrived(receipt: Receipt | None) -> Tensor:
    assert receipt is not None
    return receipt.wait()


def _observed(observe: StageObserver | None, phase: str, k: int, step: int, compute: Callable[[], Tensor]) -> Tensor:
    return compute() if observe is None else observe(phase, k, step, compute)
