"""Reruns a layout once for every collective that one rank issued, each time with noise on that one result."""

from typing import Any

import torch
from case import Case
from torch import Tensor

from headgrid.layout.span import Span
from headgrid.runtime.collectives import Issued
from headgrid.runtime.engine import Engine


def corrupted_steps(case: Case) -> int:
    """Decode steps that are corrupted, after the prefill: with stages two, so that some are in flight across tokens.

    One more step stays clean and is the witness of tokens that went astray in the last of them.
    """
    return 2 if case.layout.pp > 1 else 1


class Corrupter:
    """An observer that alters the `target`-th result it sees, in place, and remembers all of them.

    A rank embeds only the tokens in its own shard of the vocabulary, so a token is altered to another one of these.
    """

    def __init__(self, target: int | None, vocabulary: Span) -> None:
        self.target, self.vocabulary = target, vocabulary
        self.announced = 0
        self.seen: list[Issued] = []

    def before(self, issued: Issued) -> None:
        self.announced += 1

    def after(self, issued: Issued, result: Tensor) -> None:
        if len(self.seen) == self.target:
            if result.is_floating_point():
                noise = torch.randn(result.shape, generator=torch.Generator().manual_seed(self.target))
                result += noise.to(result.dtype)
            else:
                start, size = self.vocabulary.start, len(self.vocabulary)
                result.copy_(start + (result - start + 1) % size)
        self.seen.append(issued)


def _logits(case: Case, engine: Engine, tokens: Tensor, corrupter: Corrupter) -> Tensor:
    """Logits of prefill and of every step [1 + steps + 1, rows, vocab] on this rank; zeros before the last stage."""
    with engine.mesh.observed(corrupter):
        engine.prefill(tokens)
        prefill = engine.logits.clone()
        decode = engine.decode(corrupted_steps(case), keep_logits=True).logits
    witness = engine.decode(1, keep_logits=True).logits
    return torch.cat([prefill[None], *(x for x in (decode, witness) if x is not None)])


def run_corruptions(case: Case, engine: Engine, tokens: Tensor, rank: int) -> dict[str, Any]:
    """The clean run, and how far each corrupted run moved this rank's logits. `issued` are the corrupted rank's."""

    def logits(target: int | None) -> tuple[Tensor, Corrupter]:
        corrupter = Corrupter(target, engine.stage.vocab[engine.mesh.tp.index])
        return _logits(case, engine, tokens, corrupter), corrupter

    (clean, watch), (again, _) = logits(None), logits(None)
    count = torch.tensor([len(watch.seen)])
    torch.distributed.broadcast(count, case.corrupted_rank or 0)
    runs = (logits(index if rank == case.corrupted_rank else None)[0] for index in range(int(count)))
    return {
        "issued": [(i.kind, i.axis, i.bytes) for i in watch.seen],
        "announced": watch.announced,
        "noise_floor": (again - clean).norm().item(),
        "moved": [((run - clean).norm() / clean.norm().clamp_min(1e-9)).item() for run in runs],
    }
