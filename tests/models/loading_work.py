"""What real ranks do with a checkpoint: load it, save it, and tell what that took."""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_cases import TORCH, allocated, opened, part_of
from torch import Tensor

from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.shards import parameters
from headgrid.models.save import save
from headgrid.models.stream import STAGE_BYTES, load, whole
from headgrid.runtime.collectives import Axis


@dataclass(frozen=True)
class Run:
    """One load. `alone`: every rank by itself. `save_to`: and then a save; `check`: and a comparison."""

    layout: str
    dtype: str = "bfloat16"
    stage_bytes: int = STAGE_BYTES
    alone: bool = False
    check: bool = False
    save_to: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Took:
    """What a rank needed: bytes from read calls, by its own count too; memory above what it had and its share."""

    read_bytes: int
    counted_bytes: int
    above_share_bytes: int
    seconds: float
    wrong: tuple[str, ...]
    save_above_bytes: int = 0


def measure(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    """Do all `runs` with the checkpoint in `folder`, and leave what each took in `<rank>.pt` of `results`."""
    warm = torch.ones(ranks, device=payload["runs"][0].device)
    dist.all_to_all_single(warm, warm.clone())  # connections and their buffers belong to the base process
    found: list[Took] = []
    for run in payload["runs"]:
        dist.barrier()
        everyone = (rank,) if run.alone else range(ranks)
        found.append(_done(Path(payload["folder"]), run, Axis("world", everyone, rank, dist.group.WORLD)))
    torch.save(found, Path(payload["results"]) / f"{rank}.pt")


def _done(folder: Path, run: Run, axis: Axis) -> Took:
    rank, dtype, layout = axis.ranks[axis.index], TORCH[run.dtype], parse_layout(run.layout)
    source = opened(folder)
    views: dict[str, Tensor] = {}
    before, start = _read_bytes(), time.perf_counter()

    def loading() -> None:
        views.update(allocated(source.model, layout, rank, dtype, run.device)[0])
        with source.checkpoint as checkpoint:
            load(checkpoint, source.sources, source.model, layout, axis, views, stage_bytes=run.stage_bytes)

    above, seconds = _peak_bytes(loading), time.perf_counter() - start
    read = _read_bytes() - before
    share = sum(x.numel() * x.element_size() for x in views.values())
    wrong = _wrong(folder, layout, rank, views) if run.check else ()

    def saving() -> None:
        if run.save_to is not None:
            save(run.save_to, folder, source.sources, source.model, layout, axis, views, dtype)

    return Took(read, source.checkpoint.bytes_read, above - share, seconds, wrong, _peak_bytes(saving))


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _peak_bytes(do: Callable[[], None]) -> int:
    """The most memory that this process holds meanwhile, above what it holds before."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs have freed is no longer its own
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the most that it held, starts anew
    before = _status_bytes("VmRSS")
    do()
    return _status_bytes("VmHWM") - before


def _read_bytes() -> int:
    """All bytes that this process has had from read calls."""
    return int(Path("/proc/self/io").read_text().split()[1])


def _wrong(folder: Path, layout: Layout, rank: int, views: dict[str, Tensor]) -> tuple[str, ...]:
    """Which tensors differ from a part of the whole one, read alone."""
    source = opened(folder)
    with source.checkpoint as checkpoint:
        return tuple(
            name
            for name, shard in parameters(source.model, layout, rank).items()
            if not torch.equal(
                views[name].cpu(),
                part_of(whole(checkpoint, source.sources, name, shard.shape), shard).to(views[name].dtype),
            )
        )
