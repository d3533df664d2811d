"""Where ranks sit: which axes of a layout stay inside a host, and how many bytes cross from one host to another.

`hosts` is the host of each rank, numbered in the order of ranks: (0, 0, 1, 1) for two ranks on each of two hosts.
Bytes that cross are those of rings in the order of ranks (all-reduce, all-gather, reduce-scatter), of direct messages
otherwise. gloo sends these of equal parts; uneven ones go as direct messages, so more of them crosses, and a library
that reduces inside hosts first sends less.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from headgrid.layout.layout import Axis, Layout
from headgrid.layout.traffic import Collective, decode_collectives, prefill_collectives
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

Hosts = Sequence[int]


@dataclass(frozen=True, slots=True)
class Crossing:
    """What all ranks together send along one mesh axis in a phase: within hosts, and from host to host."""

    axis: str
    inside_bytes: int
    across_bytes: int


def host_numbers(ids: Sequence[object]) -> tuple[int, ...]:
    """Each rank's host, numbered by first appearance, from any names of hosts."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(ids))}
    return tuple(numbers[name] for name in ids)


def spans_hosts(layout: Layout, axis: Axis, hosts: Hosts) -> bool:
    """Whether any group along the axis has ranks on several hosts."""
    return any(len({hosts[rank] for rank in group}) > 1 for group in layout.axis_ranks(axis))


def across_bytes(layout: Layout, hosts: Hosts, rank: int, call: Collective) -> int:
    """Of the bytes that `rank` sends in a call, those that leave its host."""
    if call.kind == "recv":
        return 0
    ranks = _group(layout, call.axis, rank)
    place = ranks.index(rank)
    if call.kind == "all_to_all":  # parts for others, taken as equal
        away = sum(hosts[other] != hosts[rank] for other in ranks)
        return call.bytes * away // (len(ranks) - 1)
    follower = ranks[(place + 1) % len(ranks)]
    return call.bytes if hosts[follower] != hosts[rank] else 0


@lru_cache(maxsize=4096)  # the same for every call
def _group(layout: Layout, axis: str, rank: int) -> tuple[int, ...]:
    """The ranks of a call, in order; tokens go back from the last stage to the first, which follows it."""
    name: Axis = "pp" if axis == "pp_back" else axis  # type: ignore[assignment]
    return next(group for group in layout.axis_ranks(name) if rank in group)


def crossings(model: ModelSpec, layout: Layout, workload: Workload, hosts: Hosts, phase: str) -> tuple[Crossing, ...]:
    """Of one prefill of the batch or one decode step, axis by axis in the order of their names."""
    sums: dict[str, list[int]] = {}
    predicted = prefill_collectives if phase == "prefill" else decode_collectives
    for rank in range(layout.ranks):
        for call, count in predicted(model, layout, workload, rank).items():
            if call.kind != "recv":
                across = across_bytes(layout, hosts, rank, call)
                row = sums.setdefault(call.axis, [0, 0])
                row[0] += count * (call.bytes - across)
                row[1] += count * across
    return tuple(Crossing(axis, *sums[axis]) for axis in sorted(sums))


def slices_apart(layout: Layout, hosts: Hosts) -> str | None:
    """A sentence for a layout whose slice axis does not stay inside hosts; None where it does."""
    if layout.num_dim_slices == 1 or not spans_hosts(layout, "tp_slice", hosts):
        return None
    sizes = sorted({list(hosts).count(host) for host in hosts})
    return (
        f"The slice axis of {layout} spans hosts: {layout.num_dim_slices} slices of every head, and hosts of"
        f" {' or '.join(map(str, sizes))} ranks; what slices exchange in every layer goes through the network."
        f" It stays inside where the slices divide the ranks of a host."
    )
