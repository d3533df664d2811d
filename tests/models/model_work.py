"""What the ranks of a pool do: each job in turn, every rank leaving what its function returned in a file.

Nothing is judged here; the process of the tests does that.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import standing_ranks
import torch
import torch.distributed as dist
from torch import Tensor

from headgrid.errors import HeadgridError
from headgrid.models.model import Ids, Model, load
from headgrid.runtime.engine import Decoded, Engine
from headgrid.runtime.sampling import Sampling

Ranks = Callable[..., standing_ranks.Outcomes]
"""`(count, name, **arguments)`: what the function `name` of this module returns on each of so many ranks."""


def serve(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    """The job: calls of this module's functions by name, as they come."""

    def do(call: tuple[str, dict[str, Any]]) -> dict[str, Any]:
        name, arguments = call
        return globals()[name](**arguments)

    standing_ranks.serve(rank, Path(payload["folder"]), do)


def _close(model: Model) -> None:
    """End the model's process groups, of which a launch would have hundreds otherwise."""
    dist.barrier()
    for group in {axis.group for axis in (*model.mesh.axes, model.world)} - {None}:
        dist.destroy_process_group(group)


class _Watched:
    """Keeps the logits of whatever engine a model makes from now on: [rows, 1 + steps, vocab_size] of a replica."""

    def __init__(self, model: Any) -> None:
        self.model, self.make, self.kept = model, model.engine, list[Tensor]()
        model.engine = self.engine

    def engine(self, *arguments: Any) -> Engine:
        engine: Any = self.make(*arguments)
        prefill, decode = engine.prefill, engine.decode

        def prefilling(prompts: Tensor) -> None:
            prefill(prompts)
            self.kept = [engine.logits.clone()]

        def decoding(steps: int) -> Decoded:
            found = decode(steps, keep_logits=True)
            logits = found.logits if found.logits is not None else engine.logits.expand(steps, -1, -1)  # not the last
            self.kept += list(logits)
            return found

        engine.prefill, engine.decode = prefilling, decoding
        return engine

    def end(self) -> None:
        """Leave the model's next engines alone."""
        self.model.engine = self.make

    def logits(self, batch: int) -> Tensor:
        """Of all rows, on every rank."""
        return self.model.everywhere(torch.stack(self.kept, dim=1), batch)


def greedy(folder: str, layout: str, ids: Ids, steps: int) -> dict[str, Any]:
    """`steps` greedy tokens behind each prompt with the logits they were chosen from, and then the logits of all
    tokens, the new ones included, by one prefill. Without `steps` only the latter.
    """
    model = load(folder, layout)
    found: dict[str, Any] = {"tokens": [[] for _ in ids]}
    if steps:
        watched = _Watched(model)
        found["tokens"] = model.generate(ids, steps, stop_tokens=()).tokens
        found["logits"] = watched.logits(len(ids))
        watched.end()
    found["whole"] = model.logits([[*prompt, *new] for prompt, new in zip(ids, found["tokens"], strict=True)])
    _close(model)
    return found


def generations(folder: str, layout: str, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `Model.generate` gives for the arguments of each call, one after the other on one model."""
    model = load(folder, layout)
    found = [generation(model, **call) for call in calls]
    _close(model)
    return {"found": found}


def generation(model: Model, *, hear: bool = False, draw: dict[str, Any] | None = None, **call: Any) -> dict[str, Any]:
    """Tokens and steps, and with `hear` what a listener was told; or the block of a refusal."""
    heard: list[list[list[int]]] = []
    listener = heard.append if hear else None
    try:
        done = model.generate(**call, sampling=Sampling(**draw) if draw else None, listener=listener)
    except HeadgridError as error:
        return {"refused": error.block()}
    return {"tokens": done.tokens, "steps": done.steps, "heard": heard}


def saved(folder: str, layout: str, to: str) -> dict[str, Any]:
    """Load a checkpoint on one layout, and save it from there."""
    model = load(folder, layout)
    model.save(to)
    _close(model)
    return {}
