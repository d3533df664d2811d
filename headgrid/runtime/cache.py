"""The KV cache of one rank, carved out of an arena that the layouts of a comparison take turns in."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headgrid.layout.memory import CacheShape


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys [layers, rows, positions, K, d] and values [layers, rows, positions, K, u] that this rank keeps.

    Positions come before heads, as projections leave them: writing is then one contiguous copy (3.6 TB/s on an H200,
    against 1.5 with heads first), and reading a head in pieces of d elements is as fast.
    """

    keys: Tensor
    values: Tensor

    @property
    def size_bytes(self) -> int:
        """Bytes of both."""
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values))


def carve(arena: Tensor, shape: CacheShape) -> KVCache:
    """A cache of the given shape at the start of the flat `arena`. Whatever was there is overwritten in use."""
    split, stop = math.prod(shape.keys), shape.elements
    return KVCache(arena[:split].view(shape.keys), arena[split:stop].view(shape.values))


def new_arena(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Flat memory for the largest cache. Poisoned with NaN: a key that was never written cannot go unnoticed."""
    return torch.full((elements,), float("nan"), dtype=dtype, device=device)
