"""Prefill and decode of one layout: micro-batches through the pipeline, one CUDA graph per decode micro-batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from headgrid.layout.batching import (
    MicroBatch,
    decode_micro_batches,
    owned_rows,
    prefill_micro_batches,
    replica_rows,
)
from headgrid.layout.layout import Layout
from headgrid.layout.memory import cache_shape
from headgrid.runtime.attention import Position
from headgrid.runtime.cache import carve
from headgrid.runtime.collectives import Receipt
from headgrid.runtime.gathered import GatheredPrefill
from headgrid.runtime.mesh import Mesh
from headgrid.runtime.stage import Stage, Weights
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
        self, model: ModelSpec, layout: Layout, workload: Workload, mesh: Mesh, weights: Weights, arena: Tensor
    ) -> None:
        """`weights` as from `stage.load`; `arena` flat, with at least the cache's elements."""
        self.model, self.layout, self.workload, self.mesh = model, layout, workload, mesh
        cache = carve(arena, cache_shape(model, layout, workload, mesh.rank))
        owned = owned_rows(layout, workload.batch, mesh.rank)
        self.stage = Stage(model, layout, mesh.stage, weights, cache, owned)
        gathered = layout.weights == "gathered"
        self.gathered = GatheredPrefill(model, layout, mesh, self.stage, workload) if gathered else None
        self.device = self.stage.device
        self.rows = replica_rows(layout, workload.batch)[mesh.at.dp]
        self.prefill_plan = prefill_micro_batches(layout, workload, mesh.at.dp)
        self.decode_plan = decode_micro_batches(layout, workload, mesh.at.dp)
        self.tokens = torch.zeros(len(self.rows), dtype=torch.int64, device=self.device)
        self.logits = torch.zeros(len(self.rows), model.vocab_size, dtype=self.stage.dtype, device=self.device)
        self._position = Position(0, torch.zeros(1, dtype=torch.int64, device=self.device))
        self._local = {mb: self._replica_index(mb) for mb in (*self.prefill_plan, *self.decode_plan)}
        self._hidden = [self._hidden_buffer(mb.size, 1) for mb in self.decode_plan]
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def _replica_index(self, micro_batch: MicroBatch) -> Tensor:
        rows = [row - self.rows.start for row in micro_batch.rows()]
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    def _hidden_buffer(self, rows: int, queries: int) -> Tensor:
        shape = (rows, queries, self.model.hidden_size)
        return torch.empty(shape, dtype=self.stage.dtype, device=self.device)

    def _prefill_rows(self, mb: MicroBatch) -> int:
        """Sequences of a micro-batch whose hidden states this rank holds in prefill."""
        return mb.size if self.gathered is None else len(mb.parts[self.mesh.at.slice])

    @torch.inference_mode()
    def prefill(self, prompts: Tensor, observe: StageObserver | None = None) -> None:
        """Run all prompts [batch, seq] (the same on every rank, int64), fill the cache, choose the first tokens.

        On the last stage `logits` [rows, vocab_size] and `tokens` [rows] of this replica's rows are set; the first
        stage gets the tokens.
        """
        mine = prompts[self.rows.start : self.rows.stop].to(self.device)
        queries = prompts.shape[1]
        arriving = self._expect(self._prefill_rows(self.prefill_plan[0]), queries)
        for k, mb in enumerate(self.prefill_plan):
            x = mine.index_select(0, self._local[mb]) if self.stage.first else _arrived(arriving)
            if k + 1 < len(self.prefill_plan):
                arriving = self._expect(self._prefill_rows(self.prefill_plan[k + 1]), queries)
            self._hand_on(_observed(observe, "prefill", k, 0, lambda x=x, mb=mb: self._prefill_stage(x, mb)), mb)
        self._set_position(queries)
        if self.stage.last:
            self._return_tokens(self.tokens)
        elif self.stage.first:
            self.tokens.copy_(self._expect_tokens(len(self.rows)).wait())
        self._finish_sends()

    def _prefill_stage(self, x: Tensor, mb: MicroBatch) -> Tensor:
        return self.stage.forward(x, mb, None) if self.gathered is None else self.gathered.forward(x, mb)

    @torch.inference_mode()
    def decode(self, steps: int, *, keep_logits: bool = False, observe: StageObserver | None = None) -> Decoded:
        """Decode `steps` tokens greedily for every row, with micro-batches in flight across tokens.

        Continues where prefill or the last decode ended. With pp > 1 the first stage works on the next micro-batch
        while later stages finish this one; only the tokens, which return on a channel of their own, hold it up.
        """
        tokens: list[Tensor] = []
        logits: list[Tensor] = []
        work = [(step, k) for step in range(steps) for k in range(len(self.decode_plan))]
        returning: dict[int, Receipt] = {}
        arriving = self._expect(self.decode_plan[0].size, 1)
        for n, (step, k) in enumerate(work):
            mb = self.decode_plan[k]
            if k == 0 and step:
                self._set_position(self._position.host + 1)
            if not self.stage.first:
                self._hidden[k].copy_(_arrived(arriving))
            if n + 1 < len(work):
                arriving = self._expect(self.decode_plan[work[n + 1][1]].size, 1)
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
        for k, receipt in returning.items():
            self._put_tokens(self.decode_plan[k], receipt)
        self._set_position(self._position.host + 1)
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
        mb = self.decode_plan[k]
        x = self.tokens.index_select(0, self._local[mb])[:, None] if self.stage.first else self._hidden[k]
        y = self.stage.forward(x, mb, self._position)
        if self.stage.last:
            self._choose(y, mb)
        elif self.stage.first:
            self._hidden[k].copy_(y)
        return y

    def _choose(self, logits: Tensor, mb: MicroBatch) -> None:
        """Keep the logits [b, vocab_size] of these rows and their greedy tokens."""
        self.logits.index_copy_(0, self._local[mb], logits)
        self.tokens.index_copy_(0, self._local[mb], logits.argmax(-1))

    def _hand_on(self, y: Tensor, mb: MicroBatch) -> None:
        if self.stage.last:
            self._choose(y, mb)
        else:
            self._send(y)

    def _set_position(self, host: int) -> None:
        self._position = Position(host, self._position.device.fill_(host))

    def _expect(self, rows: int, queries: int) -> Receipt | None:
        """Post the receive of a micro-batch's hidden states before they are needed."""
        if self.stage.first:
            return None
        return self.mesh.pp.start_receive(self._hidden_buffer(rows, queries), self.mesh.at.pp - 1)

    def _send(self, x: Tensor) -> None:
        self._sent.append((self.mesh.pp.start_send(x, self.mesh.at.pp + 1), x))
        if len(self._sent) > 2:  # bounds the memory of hidden states under way
            self._finish_sends(keep=2)

    def _finish_sends(self, keep: int = 0) -> None:
        while len(self._sent) > keep:
            work, _ = self._sent.pop(0)
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
