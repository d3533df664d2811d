"""What the ranks do: the cases in turn, each rank leaving its gradients and what it issued in a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from training_cases import TrainingCase

from headgrid.runtime import training
from headgrid.runtime.collectives import Axis, Recorder
from headgrid.runtime.layer import load
from headgrid.runtime.mesh import GroupPool, Mesh
from headgrid.runtime.training import Trainer
from headgrid.runtime.weights import draw


def tokens(case: TrainingCase) -> Tensor:
    shape = (case.workload.batch, case.workload.seq)
    return torch.randint(0, case.model.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def upstream(case: TrainingCase) -> Tensor:
    """Random gradients of the logits [batch, seq, vocab_size]."""
    shape = (case.workload.batch, case.workload.seq, case.model.vocab_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@contextmanager
def _fault(name: str) -> Iterator[None]:
    if name == "gradients of parts not summed":
        with patch.object(Axis, "fan_out", lambda self, x: x), patch.object(Axis, "_scatter_sum", _own_part):
            yield
    elif name == "gradients of copies not summed":
        with patch.object(training, "summed_over", lambda model, layout, name: ("dp",)):
            yield
    else:
        yield


def _own_part(self: Axis, x: Tensor, sizes: Any) -> Tensor:
    return x.split(list(sizes))[self.index].clone()


def run(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    """Every case in turn; what rank r finds for the k-th is `<folder>/<k>.<r>.pt`."""
    pool = GroupPool(rank)
    for number, case in enumerate(payload["cases"]):
        try:
            with _fault(case.fault):
                outcome = _train(case, pool)
        except Exception as error:
            raise RuntimeError(f"in case {case.id}") from error
        torch.save(outcome, Path(payload["folder"]) / f"{number}.{rank}.pt")


def _train(case: TrainingCase, pool: GroupPool) -> dict[str, Any]:
    model, layout, dtype = case.model, case.layout, getattr(torch, case.workload.dtype)
    weights = load(model, layout, pool.rank, lambda name, shard: draw(model, 0, name, shard, dtype=dtype))
    trainer, up, recorder = (
        Trainer(model, layout, case.workload, Mesh(layout, pool), pool, weights),
        upstream(case),
        Recorder(),
    )
    with trainer.observed(recorder):
        loss, gradients = trainer.gradients(tokens(case), lambda logits, rows: (logits * up[rows]).sum())
    return {
        "loss": loss,
        "gradients": gradients,
        "issued": [(i.kind, i.axis, i.bytes) for i in recorder.issued],
        "rows": [row for row in range(trainer.rows.start, trainer.rows.stop)],
        "last": trainer.stage.last,
    }
