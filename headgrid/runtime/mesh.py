"""The process groups of a layout. Groups are values that are passed on; nothing here is global."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from headgrid.layout.layout import Axis as AxisName
from headgrid.layout.layout import Coordinates, Layout
from headgrid.runtime.collectives import Axis, Observer


class GroupPool:
    """Process groups by their ranks, so that the layouts of a comparison share communicators and their memory.

    torch's DeviceMesh makes new groups for every mesh, also for axes of one rank: 320 groups for the five default
    arms on 16 ranks, against 23 here.
    """

    def __init__(self, rank: int) -> None:
        """`rank` is this process's global rank."""
        self.rank = rank
        self._groups: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup | None] = {}

    def axis(self, name: str, groups: Sequence[tuple[int, ...]], channel: str = "") -> Axis:
        """This rank's group among `groups`. All ranks must call this in the same order with the same groups.

        A `channel` of its own gives a separate communicator over the same ranks.
        """
        for ranks in groups:
            key = (channel, ranks)
            if len(ranks) > 1 and key not in self._groups:
                group = dist.new_group(list(ranks))
                self._groups[key] = group if isinstance(group, dist.ProcessGroup) else None
        mine = next(ranks for ranks in groups if self.rank in ranks)
        return Axis(name, mine, self.rank, self._groups.get((channel, mine)))

    def close(self) -> None:
        """End every group that was made here; its axes are of no use then. Collective over all ranks of the default
        group: none may still be under way in one of them.
        """
        for group in filter(None, self._groups.values()):
            dist.destroy_process_group(group)
        self._groups.clear()


@dataclass(frozen=True, slots=True)
class StageAxes:
    """What one stage needs to compute: its place, and the axes that share a layer."""

    at: Coordinates
    tp: Axis
    tp_slice: Axis


class Mesh:
    """The axes of one layout, seen from one rank: `tp_head`, `tp_slice`, `tp` (both together), `pp`, `pp_back`."""

    def __init__(self, layout: Layout, pool: GroupPool) -> None:
        """Create or share the groups; collective over all ranks of the default group."""
        self.layout, self.rank = layout, pool.rank
        self.at = layout.coordinates(pool.rank)
        names: tuple[AxisName, ...] = ("tp_slice", "tp", "pp")
        if layout.weights == "gathered":  # only there do head groups reduce among themselves
            names = (*names, "tp_head")
        axes = {name: pool.axis(name, layout.axis_ranks(name)) for name in names}
        # Tokens flow back on a communicator of their own: on a shared one, a token that waits behind the next
        # hidden state, and that hidden state behind the token, could block each other.
        self.pp_back = pool.axis("pp_back", layout.axis_ranks("pp"), channel="back")
        self.tp_slice, self.tp, self.pp = axes["tp_slice"], axes["tp"], axes["pp"]
        self.tp_head = axes.get("tp_head")

    @property
    def stage(self) -> StageAxes:
        """The axes of a stage whose weights stay where they are."""
        return StageAxes(self.at, self.tp, self.tp_slice)

    @property
    def stage_over_heads(self) -> StageAxes:
        """The axes of a stage whose slices have been gathered: head groups share a layer, there are no slices."""
        assert self.tp_head is not None
        at = Coordinates(self.at.dp, self.at.pp, self.at.head_group, 0)
        return StageAxes(at, self.tp_head, Axis("none", (self.rank,), self.rank, None))

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All axes."""
        found = (self.tp_slice, self.tp, self.pp, self.pp_back, self.tp_head)
        return tuple(axis for axis in found if axis is not None)

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Report every collective on these axes to `observer` inside the block."""
        for axis in self.axes:
            axis.observers.append(observer)
        try:
            yield
        finally:
            for axis in self.axes:
                axis.observers.remove(observer)
