"""Does a comparison fit into memory? Predicted from the layouts' pure functions, before any process starts."""

import dataclasses
from collections.abc import Sequence

from headgrid.errors import NotAvailable
from headgrid.layout.layout import Layout
from headgrid.layout.memory import Memory, predict
from headgrid.layout.peers import peers_bytes
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

_GIB = 1 << 30
OVERHEAD_BYTES = {"cpu": 128 << 20, "cuda": 6 << 30}
"""Beside tensors: libraries, communicators, CUDA graphs and workspaces, and what the fp64 reference holds."""


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """Bytes of the fullest rank: all arms' parameters, an arena for the largest cache, one arm's activations, and on
    GPUs what each arm keeps where its peers read it.

    The negative control needs no more: it is gone before the arms' weights are drawn.
    """

    parameters_bytes: int
    kv_cache_bytes: int
    activations_bytes: int
    peers_bytes: int
    overhead_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything."""
        return sum(dataclasses.astuple(self))


def worst(model: ModelSpec, layout: Layout, workload: Workload) -> Memory:
    """Of each kind of memory the most that any rank needs."""
    ranks = [dataclasses.astuple(predict(model, layout, workload, rank)) for rank in range(layout.ranks)]
    return Memory(*(max(column) for column in zip(*ranks, strict=True)))


def need(model: ModelSpec, layouts: Sequence[Layout], workload: Workload, device: str) -> Need:
    """What a comparison of these layouts needs on its fullest rank."""
    rows = [worst(model, layout, workload) for layout in layouts]
    return Need(
        sum(row.parameters_bytes for row in rows),
        max(row.kv_cache_bytes for row in rows),
        max(row.working_bytes for row in rows),
        sum(_most_for_peers(model, layout, workload) for layout in layouts) if device == "cuda" else 0,
        OVERHEAD_BYTES[device],
    )


def _most_for_peers(model: ModelSpec, layout: Layout, workload: Workload) -> int:
    return max(peers_bytes(model, layout, workload, rank) for rank in range(layout.ranks))


def largest_batch(
    model: ModelSpec, layouts: Sequence[Layout], workload: Workload, device: str, free_bytes: int, limit: int
) -> int:
    """The largest batch up to `limit` that fits, by bisection; 0 if none does."""
    low, high = 0, limit
    smallest = max(layout.dp for layout in layouts)
    while low < high:
        middle = (low + high + 1) // 2
        candidate = dataclasses.replace(workload, batch=max(middle, smallest))
        if need(model, layouts, candidate, device).total_bytes <= free_bytes:
            low = middle
        else:
            high = middle - 1
    return low if low >= smallest else 0


def ensure_fits(model: ModelSpec, layouts: Sequence[Layout], workload: Workload, device: str, free_bytes: int) -> Need:
    """The need. Raises NotAvailable with the table of what is needed and free, and the largest batch that fits."""
    wanted = need(model, layouts, workload, device)
    if wanted.total_bytes <= free_bytes:
        return wanted
    fits = largest_batch(model, layouts, workload, device, free_bytes, workload.batch)
    table = ", ".join(
        f"{name.removesuffix('_bytes').replace('_', ' ')} {value / _GIB:.2f}"
        for name, value in dataclasses.asdict(wanted).items()
    )
    raise NotAvailable(
        f"a rank needs {wanted.total_bytes / _GIB:.2f} GiB and has {free_bytes / _GIB:.2f} GiB free",
        numbers=f"GiB per rank: {table}",
        why=f"batch {workload.batch} x {workload.seq} positions in {workload.dtype}",
        legal=(f"--batch {fits}",) if fits else ("a smaller --seq", "fewer --arms", "more --ranks"),
    )
