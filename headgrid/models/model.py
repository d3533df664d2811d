"""A checkpoint on the ranks of a layout, ready to use. All ranks call the same methods with the same arguments."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from headgrid.errors import InvalidInput
from headgrid.layout.batching import replica_rows
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.legal import check
from headgrid.layout.memory import cache_shape
from headgrid.layout.products import check_products
from headgrid.layout.shards import parameters
from headgrid.models import save as saving
from headgrid.models.pretrained import Pretrained, open_pretrained
from headgrid.models.stream import Progress
from headgrid.runtime.cache import new_arena
from headgrid.runtime.collectives import Axis, barrier
from headgrid.runtime.engine import Engine
from headgrid.runtime.layer import Weights, by_name
from headgrid.runtime.mesh import GroupPool, Mesh
from headgrid.runtime.sampling import Sampling
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload, dtype_name

Ids = Sequence[Sequence[int]]
"""Token ids of sequences of any lengths."""
Listener = Callable[[list[list[int]]], None]
"""Told the tokens of each step: one for each sequence, and none for those that have ended."""
_STEPS_BETWEEN_LOOKS = 16
_WORTH_A_GRAPH = 8


@dataclass(frozen=True, slots=True)
class Generation:
    """New tokens of each sequence, a stop token included, and how long it took.

    `ttft_s` from the start of prefill until the first tokens are known on the host; `total_s` until the last.
    """

    tokens: list[list[int]]
    prompt_tokens: int
    steps: int
    ttft_s: float
    total_s: float

    @property
    def generated_tokens(self) -> int:
        """Of all sequences."""
        return sum(map(len, self.tokens))

    @property
    def tpot_s(self) -> float | None:
        """Time per output token of a sequence after its first."""
        return (self.total_s - self.ttft_s) / (self.steps - 1) if self.steps > 1 else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first ones, of all sequences."""
        rest = self.generated_tokens - len(self.tokens)
        return rest / (self.total_s - self.ttft_s) if rest > 0 else None


class Model:
    """A pretrained model on the ranks of a layout. `load` makes one; `close`, or the end of a `with`, lets go of it."""

    def __init__(
        self, pretrained: Pretrained, layout: Layout, mesh: Mesh, world: Axis, weights: Weights, pool: GroupPool
    ) -> None:
        """`weights` of this rank, as from `Pretrained.local`; `world` has all ranks of the layout; the groups of both
        and of the mesh are the pool's.
        """
        self.pretrained, self.spec, self.layout = pretrained, pretrained.spec, layout
        self.mesh, self.world, self.weights, self._pool = mesh, world, weights, pool
        self.closed = False
        some = next(iter(weights.values()))
        self.dtype, self.device = some.dtype, some.device

    def __enter__(self) -> Self:
        """The model itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close it. After an error only this rank's part is let go: the others may be waiting in a collective."""
        if kind is None:
            self.close()
        self.closed, self.weights = True, Weights()

    def close(self) -> None:
        """Let go of the weights and end the process groups that `load` made, which torch keeps otherwise for as long
        as the process lives. All ranks call it; a second call does nothing.

        A cache and its CUDA graphs are an engine's, and go with it: `generate` and `logits` keep none, and an engine
        made by hand must be gone before.
        """
        if self.closed:
            return
        self.closed, self.weights = True, Weights()
        if self.world.size > 1:
            barrier(self.device)
        self._pool.close()

    def _ensure_open(self) -> None:
        if self.closed:
            raise InvalidInput(f"{self.spec.name} is closed", legal=("load it again",))

    def engine(self, workload: Workload, sampling: Sampling | None = None, stop_tokens: Sequence[int] = ()) -> Engine:
        """Prefill and decode of one batch, with a KV cache of its own.

        Raises InvalidLayout if this layout cannot run it, InvalidInput if the model is closed.
        """
        self._ensure_open()
        check(self.spec, self.layout, workload)
        elements = cache_shape(self.spec, self.layout, workload, self.world.index).elements
        arena = new_arena(elements, self.dtype, self.device)
        return Engine(self.spec, self.layout, workload, self.mesh, self.weights, arena, stop_tokens, sampling)

    def workload(self, ids: Ids, **more: int | bool) -> Workload:
        """The workload of prompts of these lengths."""
        return workload_of(self.spec, ids, str(self.dtype).removeprefix("torch."), **more)

    def prompts(self, ids: Ids) -> Tensor:
        """The sequences behind each other's ends, [batch, longest], padded with 0."""
        longest = max(map(len, ids))
        return torch.tensor([[*each, *[0] * (longest - len(each))] for each in ids], dtype=torch.int64)

    def logits(self, ids: Ids) -> list[Tensor]:
        """Logits of every token, [length, vocab_size] of each sequence, on every rank.

        Of an encoder, the last layer's hidden states [length, hidden_size].
        """
        engine = self.engine(self.workload(ids, every_token=True))
        engine.prefill(self.prompts(ids))
        whole = self.everywhere(engine.logits, len(ids))
        return [row[: len(each)] for row, each in zip(whole, ids, strict=True)]

    def generate(
        self,
        ids: Ids,
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        stop_tokens: Sequence[int] | None = None,
        listener: Listener | None = None,
        warm_up: bool = False,
    ) -> Generation:
        """Up to `max_new_tokens` behind each prompt; the same on every rank, and on every layout with one seed.

        `stop_tokens` are the checkpoint's own by default. With a `listener` each step's tokens are looked at, which
        costs a GPU's host a wait; else every so many steps. `warm_up` runs a prefill and a step before the clock
        starts, so that no time of compiling kernels or recording graphs is in it.
        Raises InvalidInput or InvalidLayout for what cannot be run.
        """
        if max_new_tokens < 1:
            raise InvalidInput(f"max_new_tokens = {max_new_tokens}", legal=("1 or more",))
        if not self.spec.is_causal:
            raise InvalidInput(f"{self.spec.name} is bidirectional: it generates nothing", legal=("logits",))
        stops = self.pretrained.config.stop_tokens if stop_tokens is None else stop_tokens
        stops = [token for token in stops if 0 <= token < self.spec.vocab_size]  # others cannot come
        engine = self.engine(self.workload(ids, decode_steps=max_new_tokens - 1), sampling, stops)
        prompts, found = self.prompts(ids), _Found(len(ids), stops, listener)
        if warm_up:
            self._warm_up(engine, prompts)
        begun = time.perf_counter()
        engine.prefill(prompts)
        found.add(self._shared(engine, engine.tokens[None], len(ids)))
        ttft_s = time.perf_counter() - begun
        each = 1 if listener is not None else _STEPS_BETWEEN_LOOKS
        while found.steps < max_new_tokens and not found.ended:
            steps = min(each, max_new_tokens - found.steps)
            decoded = engine.decode(steps)  # which only the last stage gets
            tokens = decoded.tokens if engine.stage.last else engine.tokens.expand(steps, -1)
            found.add(self._shared(engine, tokens, len(ids)))
        total_s = time.perf_counter() - begun
        return Generation(found.tokens, sum(map(len, ids)), found.steps, ttft_s, total_s)

    def _warm_up(self, engine: Engine, prompts: Tensor) -> None:
        """Compile kernels, and on a GPU record each step as a graph where there are enough of them."""
        engine.prefill(prompts)
        if engine.workload.decode_steps:
            engine.decode(1)
        if self.device.type == "cuda" and engine.workload.decode_steps >= _WORTH_A_GRAPH:
            engine.capture()
        if self.world.size > 1:
            self.world.all_reduce(torch.zeros(1, device=self.device))

    def _shared(self, engine: Engine, tokens: Tensor, batch: int) -> list[list[int]]:
        """Tokens [steps, rows] of each last stage's rows -> [steps][batch] on every rank."""
        return self.everywhere(tokens.t(), batch).t().tolist()

    def everywhere(self, rows: Tensor, batch: int) -> Tensor:
        """What last stages have of their replica's rows [rows, ...] -> of all rows [batch, ...], on every rank."""
        if self.layout.pp == self.layout.dp == 1:
            return rows
        mine = replica_rows(self.layout, batch)[self.mesh.at.dp]
        whole = rows.new_zeros(batch, *rows.shape[1:])
        if self.mesh.at.pp == self.layout.pp - 1 and self.mesh.tp.index == 0:
            whole[mine.start : mine.stop] = rows
        return self.world.all_reduce(whole)

    def save(self, folder: Path | str, *, progress: Progress | None = None) -> None:
        """Write the model in Hugging Face format, each rank its part; tokenizer and config are copied.

        Raises InvalidInput if the folder is in use, the weights are in FP8 or the model is closed, NotAvailable if the
        disk cannot take it.
        """
        self._ensure_open()
        if self.layout.linears == "fp8":
            raise InvalidInput(
                f"{self.layout} has its matrices rounded to FP8, which is not the model that was loaded",
                legal=(f"load with the layout {replace(self.layout, linears='model')}, then save",),
            )
        views = by_name(parameters(self.spec, self.layout, self.world.index), self.weights)
        arguments = self.pretrained.sources, self.spec, self.layout, self.world, views, self.dtype
        saving.save(Path(folder), self.pretrained.folder, *arguments, progress)


class _Found:
    """New tokens as they come."""

    def __init__(self, batch: int, stops: Sequence[int], listener: Listener | None) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.steps, self._stops, self._listener = 0, frozenset(stops), listener

    @property
    def ended(self) -> bool:
        """Whether every sequence has its stop token."""
        return all(row and row[-1] in self._stops for row in self.tokens)

    def add(self, steps: list[list[int]]) -> None:
        """Tokens [steps][batch]; those behind a stop token are left out."""
        for step in steps:
            if self.ended:
                return
            self.steps += 1
            new: list[list[int]] = []
            for row, token in zip(self.tokens, step, strict=True):
                new.append([] if row and row[-1] in self._stops else [token])
                row += new[-1]
            if self._listener is not None:
                self._listener(new)


def workload_of(spec: ModelSpec, ids: Ids, dtype: str, **more: int | bool) -> Workload:
    """The workload of these prompts in a dtype. Raises InvalidInput for an empty prompt or an unknown token."""
    lengths = [len(each) for each in ids]
    if not lengths or not all(lengths):
        raise InvalidInput("a prompt has at least one token", numbers=f"lengths {lengths}")
    wrong = [x for each in ids for x in each if type(x) is not int or not 0 <= x < spec.vocab_size]
    if wrong:
        raise InvalidInput(
            f"token id {wrong[0]!r:.40} is not one of {spec.vocab_size}", legal=(f"0 to {spec.vocab_size - 1}",)
        )
    ragged = tuple(lengths) if len(set(lengths)) > 1 else ()
    sizes = {"batch": len(lengths), "seq": max(lengths), "prompt_lengths": ragged, "decode_steps": 0}
    return Workload(**sizes | more, dtype=dtype)  # type: ignore[arg-type]


def load(
    folder: Path | str,
    layout: Layout | str = "tp1",
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Model:
    """A checkpoint on the ranks of `layout`, as many as torch.distributed has (one where it is not initialised).

    Each rank reads its share and keeps its part. `dtype` is the checkpoint's own by default; the part goes to `device`,
    by default this rank's GPU where the ranks talk through NCCL, else the CPU. `progress` is told the bytes read and
    the bytes in all.

    Raises InvalidInput for a folder that is not a checkpoint of a supported model, InvalidLayout for a layout that
    cannot run it on so many ranks.
    """
    pretrained, layout = open_pretrained(folder), parse_layout(layout) if isinstance(layout, str) else layout
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    check(pretrained.spec, layout, ranks=ranks)
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    place = torch.device(device or (f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"))
    pool = GroupPool(rank)
    world = pool.axis("world", [tuple(range(ranks))])
    chosen = dtype if isinstance(dtype, torch.dtype) else torch_dtype(dtype or pretrained.dtype)
    if place.type == "cuda":
        check_products(pretrained.spec, layout)
    mesh = Mesh(layout, pool)
    weights = pretrained.local(layout, world, chosen, place, progress, tp=mesh.tp)
    return Model(pretrained, layout, mesh, world, weights, pool)


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name such as bfloat16 or bf16. Raises InvalidInput."""
    return getattr(torch, dtype_name(name))
