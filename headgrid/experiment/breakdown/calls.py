"""Collectives as ranks saw them: which calls belong together, what was waiting and what was transfer, rows of a table.

A call takes a rank from its own start until it has what it wants: it waits for the last rank, then the data travel.
The rank that comes last waits for nobody, so the shortest of the ranks' times is the transfer, and what another rank
takes longer is waiting. That needs no clock that ranks have in common, which profilers do not promise.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from headgrid.layout.layout import Layout


@dataclass(frozen=True, slots=True)
class Call:
    """One collective on one rank; times in nanoseconds, None where they cannot be known.

    `layer` counts those of the model from 0; None for embedding, logits and messages. `exposed` is the part of its
    time at which the rank computes nothing, `hidden` the rest. `gathers`: it fetches a layer's weights.
    """

    kind: str
    axis: str
    bytes: int
    layer: int | None = None
    gathers: bool = False
    time: int | None = None
    exposed: int | None = None
    hidden: int | None = None

    def to_json(self) -> list[Any]:
        """As ranks tell each other."""
        return [
            self.kind, self.axis, self.bytes, self.layer, self.gathers, self.time, self.exposed, self.hidden
        ]  # fmt: skip


def role(call: Call, layout: Layout) -> str:
    """What a call is for, in the words of the literature and of the seed."""
    if call.axis in ("pp", "pp_back"):
        return "hidden states between stages" if call.axis == "pp" else "tokens back to the first stage"
    if call.gathers:
        return "weight gather"
    if call.layer is None:
        return "embedding and logits"
    if call.axis == "tp_slice":
        return "intra-group exchange"
    if call.kind == "all_reduce":
        return "TP all-reduce" if layout.num_dim_slices == 1 else f"{_across(layout)} reduce"
    if layout.attention == "dp-attention":
        return "rows of data-parallel attention"
    if layout.residual == "sharded":
        return "sequence-parallel residual"
    return f"{_across(layout)} concatenation"


def _across(layout: Layout) -> str:
    """What the axis that shares a layer goes across: head groups and their slices, or the slices of the only group."""
    return "inter-group" if layout.num_head_groups > 1 else "inter-slice"


def transfers(per_rank: Sequence[Sequence[Call]], layout: Layout) -> list[list[int | None]] | str:
    """For each rank's each call the transfer's time, ns: the shortest of the group's. Or why calls do not match."""
    groups: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    for rank, calls in enumerate(per_rank):
        seen: dict[Any, int] = defaultdict(int)
        for place, call in enumerate(calls):
            members = _members(call, rank, layout)
            number = seen[members]
            seen[members] += 1
            groups[(members, number)].append((rank, place))
    found: list[list[int | None]] = [[None] * len(calls) for calls in per_rank]
    for (members, number), places in groups.items():
        if sorted(rank for rank, _ in places) != sorted(members[1]):
            return f"call {number} on {members[0]} among ranks {members[1]} was issued by {len(places)} of them"
        times = [per_rank[rank][place].time for rank, place in places]
        shortest = None if None in times else min(time for time in times if time is not None)
        for rank, place in places:
            found[rank][place] = shortest
    return found


def _members(call: Call, rank: int, layout: Layout) -> tuple[str, tuple[int, ...]]:
    """The axis and the ranks that take part in a call; of a message its sender, then its receiver."""
    axis: Any = "pp" if call.axis == "pp_back" else call.axis
    ranks = next(group for group in layout.axis_ranks(axis) if rank in group)
    if call.kind not in ("send", "recv"):
        return call.axis, ranks
    if call.axis == "pp_back":
        return call.axis, (ranks[-1], ranks[0])
    at = ranks.index(rank)
    return call.axis, (rank, ranks[at + 1]) if call.kind == "send" else (ranks[at - 1], rank)


def rows(per_rank: Sequence[Sequence[Call]], layout: Layout) -> tuple[list[dict[str, Any]], str | None]:
    """One row for each kind, axis and role, and why nothing is known of waiting and transfer, if it is not.

    `ranks` issue such calls: `calls` and `bytes` are all of theirs; times, in seconds, are means over them, and null
    where one of the calls has none. `bus_bytes_per_s` is the bus bandwidth of nccl-tests: what a rank must send,
    2 (n - 1)/n of an all-reduce's buffer, (n - 1)/n of what is gathered, scattered or exchanged, all of a message,
    over the transfer's time. `layers` has the distribution of a layer's `time_s` and `exposed_s` over layers.
    """
    shortest = transfers(per_rank, layout)
    reason = shortest if isinstance(shortest, str) else None
    found: dict[tuple[str, str, str], list[list[tuple[Call, int | None]]]] = {}
    for rank, calls in enumerate(per_rank):
        for place, call in enumerate(calls):
            key = (role(call, layout), call.kind, call.axis)
            mine = found.setdefault(key, [[] for _ in per_rank])[rank]
            mine.append((call, None if isinstance(shortest, str) else shortest[rank][place]))
    return [_row(key, [mine for mine in ranks if mine]) for key, ranks in sorted(found.items())], reason


def _row(key: tuple[str, str, str], ranks: Sequence[Sequence[tuple[Call, int | None]]]) -> dict[str, Any]:
    every = [pair for mine in ranks for pair in mine]

    def mean(of: Callable[[Call, int | None], int | None]) -> float | None:
        values = [of(call, transfer) for call, transfer in every]
        return None if None in values else _seconds(sum(v for v in values if v is not None) / len(ranks))

    size, transfer_s = sum(call.bytes for call, _ in every), mean(lambda call, transfer: transfer)
    return {
        "role": key[0],
        "collective": key[1],
        "axis": key[2],
        "ranks": len(ranks),
        "calls": len(every),
        "bytes": size,
        "time_s": mean(lambda call, transfer: call.time),
        "wait_s": mean(lambda call, transfer: _less(call.time, transfer)),
        "transfer_s": transfer_s,
        "exposed_s": mean(lambda call, transfer: call.exposed),
        "hidden_s": mean(lambda call, transfer: call.hidden),
        "bus_bytes_per_s": round(size / len(ranks) / transfer_s) if transfer_s else None,
        "layers": _layers([[call for call, _ in mine] for mine in ranks]),
    }


def _less(time: int | None, transfer: int | None) -> int | None:
    return None if time is None or transfer is None else time - transfer


def _layers(ranks: Iterable[Sequence[Call]]) -> dict[str, Any] | None:
    """Of each layer the mean over the ranks that have it; of these the median and the largest with its layer."""
    of_layers: dict[int, list[list[Call]]] = defaultdict(list)
    for calls in ranks:
        mine: dict[int, list[Call]] = defaultdict(list)
        for call in calls:
            if call.layer is not None:
                mine[call.layer].append(call)
        for layer, listed in mine.items():
            of_layers[layer].append(listed)
    if not of_layers:
        return None
    return {"count": len(of_layers)} | {
        name: _distribution({layer: [_sum(calls, field) for calls in listed] for layer, listed in of_layers.items()})
        for name, field in (("time_s", "time"), ("exposed_s", "exposed"))
    }


def _sum(calls: Sequence[Call], field: str) -> int | None:
    values = [getattr(call, field) for call in calls]
    return None if None in values else sum(values)


def _distribution(of_layers: dict[int, list[int | None]]) -> dict[str, Any] | None:
    means: dict[int, float] = {}
    for layer, values in sorted(of_layers.items()):
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        means[layer] = fmean(known)
    slowest = max(means, key=lambda layer: means[layer])
    return {"median": _seconds(median(means.values())), "max": _seconds(means[slowest]), "max_layer": slowest}


def _seconds(nanoseconds: float) -> float:
    return round(nanoseconds / 1e9, 10)
