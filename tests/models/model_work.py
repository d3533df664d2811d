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
    found: dict[str, Any] = {"tokens": [[] for _ in ids]}
    with load(folder, layout) as model:
        if steps:
            watched = _Watched(model)
            found["tokens"] = model.generate(ids, steps, stop_tokens=()).tokens
            found["logits"] = watched.logits(len(ids))
            watched.end()
        found["whole"] = model.logits([[*prompt, *new] for prompt, new in zip(ids, found["tokens"], strict=True)])
    return found


def generations(folder: str, layout: str, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `Model.generate` gives for the arguments of each call, one after the other on one model."""
    with load(folder, layout) as model:
        return {"found": [generation(model, **call) for call in calls]}


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
    with load(folder, layout) as model:
        model.save(to)
    return {}


def groups(folder: str, layout: str, ids: Ids) -> dict[str, Any]:
    """Process groups of this rank before, with, and after a model, whether another one then finds the same, and what
    the closed one says.
    """
    counts, models = [_num_groups()], [load(folder, layout), load(folder, layout)]
    found = [model.generate(ids, 3, stop_tokens=()).tokens for model in models]
    counts.append(_num_groups())
    models[0].close()
    counts.append(_num_groups())
    found.append(models[1].generate(ids, 3, stop_tokens=()).tokens)
    refused = generation(models[0], ids=ids, max_new_tokens=1)["refused"]
    for model in models:
        model.close()
    return {"counts": [*counts, _num_groups()], "found": found, "refused": refused, "left": len(models[0].weights)}


def _num_groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)
