"""Where a comparison's weights come from: drawn by their indices, or read from a checkpoint."""

import json
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from headgrid.experiment.design import Design
from headgrid.layout.layout import Layout
from headgrid.layout.shards import Shard, parameters
from headgrid.models.pretrained import Pretrained, open_pretrained
from headgrid.runtime.collectives import Axis
from headgrid.runtime.layer import Weights, load
from headgrid.runtime.mesh import GroupPool
from headgrid.runtime.weights import draw


class Source(Protocol):
    """The weights of one model."""

    @property
    def identity(self) -> str:
        """What they are: equal for equal weights."""
        ...

    def local(self, layout: Layout) -> Weights:
        """This rank's part under a layout. All ranks call it together."""
        ...

    def whole(self, name: str) -> Tensor:
        """One whole tensor, in the run's dtype."""
        ...


@dataclass(frozen=True, slots=True)
class Drawn:
    """Weights made from a seed."""

    design: Design
    pool: GroupPool
    dtype: torch.dtype
    device: torch.device

    @property
    def identity(self) -> str:
        """Model and seed."""
        return json.dumps([self.design.model.to_dict(), self.design.protocol.seed], sort_keys=True)

    def _draw(self, name: str, shard: Shard) -> Tensor:
        seed = self.design.protocol.seed
        return draw(self.design.model, seed, name, shard, dtype=self.dtype, device=self.device)

    def local(self, layout: Layout) -> Weights:
        """Drawn slice by slice."""
        tp = self.pool.axis("tp", layout.axis_ranks("tp"))
        return load(self.design.model, layout, self.pool.rank, self._draw, tp)

    def whole(self, name: str) -> Tensor:
        """Drawn as a whole."""
        return self._draw(name, parameters(self.design.model, Layout(), 0)[name])


@dataclass(frozen=True, slots=True)
class Stored:
    """Weights of a checkpoint."""

    pretrained: Pretrained
    pool: GroupPool
    world: Axis
    dtype: torch.dtype
    device: torch.device

    @property
    def identity(self) -> str:
        """Model, and of every tensor its name, dtype, shape and place in its file (not its numbers)."""
        tensors = [repr(tensor) for tensor in self.pretrained.checkpoint.tensors.values()]
        return json.dumps([self.pretrained.spec.to_dict(), tensors], sort_keys=True)

    def local(self, layout: Layout) -> Weights:
        """Read together with the other ranks, each byte once."""
        tp = self.pool.axis("tp", layout.axis_ranks("tp"))
        return self.pretrained.local(layout, self.world, self.dtype, self.device, tp=tp)

    def whole(self, name: str) -> Tensor:
        """Read as a whole."""
        return self.pretrained.whole(name).to(self.device, self.dtype)


def weights_of(design: Design, pool: GroupPool, dtype: torch.dtype, device: torch.device) -> Source:
    """The weights that a design names, as this rank gets them. All ranks call it together."""
    if design.checkpoint is None:
        return Drawn(design, pool, dtype, device)
    world = pool.axis("world", [tuple(range(design.ranks))])
    return Stored(open_pretrained(design.checkpoint), pool, world, dtype, device)
