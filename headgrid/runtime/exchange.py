"""What the m slices of a head group do so that attention is exact. One exchange is one function in one table.

Letters: b sequences and s positions of the micro-batch; H, K query and KV heads of this head group; d the head dim;
w_r and u_r the channels of a Q/K head and of a V head in slice r, each summing to d over the slices.
An exchange gets the projections of this slice, [b, s, H w_j + K w_j + K u_j], and returns the attention output of
this slice, [b, s, H u_j]. `rows` are the numbers of sequences of the micro-batch that each slice attends to, where
they are divided. `attend` stores K and V in the cache and computes attention for the rows it is given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headgrid.runtime.collectives import Axis

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [b, s, H, d], k [b, s, K, d], v [b, s, K, u] -> [b, s, H, u]"""


@dataclass(frozen=True, slots=True)
class Slices:
    """Local numbers of heads and the widths of all slices; `index` is this rank's slice."""

    heads: int
    kv_heads: int
    qk_widths: tuple[int, ...]
    v_widths: tuple[int, ...]
    index: int

    @property
    def row_widths(self) -> list[int]:
        """Elements per token of the projections in each slice: H w_r + K w_r + K u_r."""
        return [
            (self.heads + self.kv_heads) * w + self.kv_heads * u
            for w, u in zip(self.qk_widths, self.v_widths, strict=True)
        ]

    def split(self, projections: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views q [b, s, H, w_r], k [b, s, K, w_r], v [b, s, K, u_r] of slice r's projections [b, s, ...]."""
        w, u = self.qk_widths[r], self.v_widths[r]
        q, k, v = projections.split([self.heads * w, self.kv_heads * w, self.kv_heads * u], dim=-1)
        return (
            q.unflatten(-1, (self.heads, w)),
            k.unflatten(-1, (self.kv_heads, w)),
            v.unflatten(-1, (self.kv_heads, u)),
        )

    def join(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """q [b, s, H, d], k [b, s, K, d], v [b, s, K, d] from the projections [b, s, ...] of all slices."""
        if self.qk_widths == self.v_widths:  # one copy of contiguous pieces: 3.5 TB/s on an H200, three reach 0.9
            heads = self.heads + 2 * self.kv_heads
            whole = torch.cat([block.unflatten(-1, (heads, -1)) for block in blocks], dim=-1)
            return list(whole.split([self.heads, self.kv_heads, self.kv_heads], dim=2))
        triples = [self.split(block, r) for r, block in enumerate(blocks)]
        return [torch.cat(pieces, dim=-1) for pieces in zip(*triples, strict=True)]


def own_slice(slices: Slices, axis: Axis, rows: Sequence[int], projections: Tensor, attend: Attend) -> Tensor:
    """No exchange: exact for m = 1. For m > 1 this is the softmax per slice, another function, kept as a control."""
    return attend(*slices.split(projections, slices.index)).flatten(2)


def gather(slices: Slices, axis: Axis, rows: Sequence[int], projections: Tensor, attend: Attend) -> Tensor:
    """All-gather Q and K; V stays sliced, so the result is the slice's columns of softmax(QK^T) V.

    The gathered channels are in slice order, not in the head's: Q and K alike, and a sum does not mind.
    """
    b, s, _ = projections.shape
    heads, w = slices.heads + slices.kv_heads, slices.qk_widths[slices.index]
    mine = projections[..., : heads * w].reshape(-1)
    sizes = [b * s * heads * width for width in slices.qk_widths]
    parts = axis.all_gather(mine, sizes).split(sizes)
    del mine
    qk = torch.cat([part.view(b, s, heads, width) for part, width in zip(parts, slices.qk_widths, strict=True)], dim=-1)
    del parts
    q, k = qk.split([slices.heads, slices.kv_heads], dim=2)
    v = slices.split(projections, slices.index)[2]
    return attend(q, k, v).flatten(2)


def batch(slices: Slices, axis: Axis, rows: Sequence[int], projections: Tensor, attend: Attend) -> Tensor:
    """All-to-all: slices of channels become slices of the batch, and back after attention.

    `rows[r]` sequences of the micro-batch belong to slice r. Sequences are contiguous on one side of each
    all-to-all, so each direction copies once.
    """
    s, widths, mine = projections.shape[1], slices.row_widths, rows[slices.index]
    out_widths = [slices.heads * u for u in slices.v_widths]
    receive = [mine * s * width for width in widths]
    received = axis.all_to_all(projections.view(-1), [n * s * widths[slices.index] for n in rows], receive)
    blocks = [part.view(mine, s, width) for part, width in zip(received.split(receive), widths, strict=True)]
    q, k, v = slices.join(blocks)
    del received, blocks
    out = attend(q, k, v)
    del q, k, v
    back = torch.cat([piece.reshape(-1) for piece in out.split(list(slices.v_widths), dim=-1)])
    del out
    send = [mine * s * width for width in out_widths]
    returned = axis.all_to_all(back, send, [n * s * out_widths[slices.index] for n in rows])
    return returned.view(sum(rows), s, -1)


EXCHANGES: dict[str, Callable[[Slices, Axis, Sequence[int], Tensor, Attend], Tensor]] = {
    "none": own_slice,
    "independent": own_slice,
    "gather": gather,
    "batch": batch,
}
