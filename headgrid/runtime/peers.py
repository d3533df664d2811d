"""Decode's small collectives as loads from the memory of the other GPUs of a host, within the kernels that need them.

A sum over ranks, the residual's addition and the next norm are one kernel, and so are each collective of the exchanges
`batch`, `gather` and `sequence` with the copies, the cache write or the merging around it. NCCL takes 10 to 14 us for
each of these sums and exchanges, whatever is sent, and every kernel around them 2 more: together half of a layer's time
when the cache is small. Sums are made in fp32, of fp16 too, which PyTorch's own symmetric-memory reductions refuse.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headgrid.layout.batching import MicroBatch
from headgrid.layout.peers import ROOMS, exchanges, suits
from headgrid.runtime.attention import Keys
from headgrid.runtime.collectives import Axis
from headgrid.runtime.exchange import Core, Slices
from headgrid.runtime.hidden import Hidden
from headgrid.runtime.hosts import host_id
from headgrid.runtime.kernels import power_of_two
from headgrid.runtime.layer import Layer, Norm
from headgrid.runtime.quantised import Input, Weight, linear_into
from headgrid.runtime.stage import Stage, StageCall
from headgrid.spec.model import ModelSpec


def _kernels() -> Any:
    from headgrid.runtime.kernels import peers_triton  # Triton exists only where there is a GPU

    return peers_triton


class Window:
    """Memory of which each rank of an axis holds a part that all of them can read, with a pad for their signals."""

    def __init__(self, axis: Axis, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        """Collective over the axis. `local` is this rank's part, flat, of as many elements on every rank."""
        import torch.distributed._symmetric_memory as symmetric

        assert axis.group is not None
        self.axis, self.local = axis, symmetric.empty(elements, dtype=dtype, device=device)
        torch.cuda.synchronize(device)  # the pad is zeroed behind what is queued: not after a peer's first signal
        self._handle = symmetric.rendezvous(self.local, axis.group)
        assert self._handle.rank == axis.index
        self.pointers: tuple[Any, Any] = self._handle.buffer_ptrs_dev, self._handle.signal_pad_ptrs_dev
        self.blocks = symmetric.get_signal_pad_size() // 4 // axis.size
        """Programs of a kernel that can meet their twins: one word of the pad for each and each rank."""


class Sums:
    """Sums over the ranks that share a layer, added to the hidden states and normed in one kernel.

    There are two rooms for products that wait for their sum, and each half of a layer has its own: a room is written
    again only after all ranks have met for the other one's sum, and so have read it.
    """

    def __init__(self, tp: Axis, tokens: int, model: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        """Collective over `tp`, for up to `tokens` tokens a call."""
        self.model, width = model, model.hidden_size
        self.window = Window(tp, ROOMS * tokens * width, dtype, device)
        self.rooms = self.window.local.view(ROOMS, tokens, width)

    def put(self, room: int, x: Input, weight: Weight, tokens: int) -> None:
        """x [T, local] times weight [D, local], this rank's part of a sum, into a room."""
        linear_into(self.rooms[room, :tokens], x, weight)

    def fold(self, room: int, x: Tensor, norm: Norm | None) -> Tensor:
        """x [T, D] += the sum over ranks of what is in the room; returns its norm [T, D], or x where there is none."""
        axis, mine = self.window.axis, self.rooms[room, : len(x)]
        issued = axis.issue("all_reduce", 2 * (axis.size - 1) * mine.numel() * mine.element_size() // axis.size)
        (count, width), (weight, shift) = x.shape, norm or (x, None)
        out, block = torch.empty_like(mine), power_of_two(width)
        _kernels().sum_add_norm[(min(count, self.window.blocks),)](
            *self.window.pointers, mine.storage_offset(), x, weight, weight if shift is None else shift, out,
            count, width, self.model.norm_eps,
            RANK=axis.index, SIZE=axis.size, NORM=norm is not None, RMS=self.model.norm == "rms",
            SHIFT=shift is not None, UNIT=self.model.norm_unit_offset,
            BLOCK=block, num_warps=min(16, max(4, block // 512)),
        )  # fmt: skip
        return axis.done(issued, out if norm is not None else x)


class Shuffle:
    """The exchange `batch` of one decode micro-batch: slices of channels to whole heads of own sequences, and back."""

    def __init__(self, axis: Axis, micro_batch: MicroBatch, slices: Slices, dtype: torch.dtype, device: torch.device):
        """Collective over `axis`, whose slices are all of the same width."""
        self.slices, self.parts, self.width = slices, micro_batch.parts, slices.row_widths[0]
        self.most = max(len(part) for part in self.parts)
        self.mine = len(self.parts[axis.index])
        self.first = sum(len(part) for part in self.parts[: axis.index])
        sent, whole = micro_batch.size * self.width, slices.heads * sum(slices.v_widths)
        self.window = Window(axis, sent + self.most * whole, dtype, device)
        self.projections = self.window.local[:sent].view(micro_batch.size, self.width)
        self.attended = self.window.local[sent:].view(self.most, slices.heads, -1)
        owners = [(r, place) for r, part in enumerate(self.parts) for place in range(len(part))]
        self.owners, self.places = torch.tensor(owners, dtype=torch.int64, device=device).t().contiguous()

    def __call__(self, core: Core) -> Tensor:
        """From `projections` [b, ...] of this slice to its channels of the attention output [b, H u]."""
        axis, heads, u = self.window.axis, self.slices.heads, self.slices.v_widths[0]
        size = self.window.local.element_size()
        issued = axis.issue("all_to_all", (len(self.owners) - self.mine) * self.width * size)
        q = self._to_rows(core)
        axis.done(issued, q)
        if self.mine:
            core.attend_stored(q, self.attended[: self.mine, None])
        issued = axis.issue("all_to_all", self.mine * heads * u * (axis.size - 1) * size)
        out = q.new_empty(len(self.owners), heads * u)
        _kernels().to_channels[(len(out),)](
            *self.window.pointers, out, self.owners, self.places, self.attended.storage_offset(), heads,
            D=u * axis.size, **_constants(axis, u),
        )  # fmt: skip
        return axis.done(issued, out)

    def _to_rows(self, core: Core) -> Tensor:
        """The queries [b_j, 1, H, d] of own sequences; their keys and values go into the cache."""
        slices, w = self.slices, self.slices.qk_widths[0]
        q = self.window.local.new_empty(self.mine, 1, slices.heads, sum(slices.qk_widths))
        assert core.cache is not None
        k, v = core.cache
        _kernels().to_rows[(self.most,)](
            *self.window.pointers, q, k, v, core.queries.at, self.first, self.mine,
            k.stride(0), k.stride(1), v.stride(0), v.stride(1), slices.heads, slices.kv_heads,
            D=q.shape[3], **_constants(self.window.axis, w),
        )  # fmt: skip
        return q


class Gather:
    """The exchange `gather` of one decode micro-batch: every slice gets whole heads of Q and K, and keeps its V."""

    kernel = "to_keys"

    def __init__(self, axis: Axis, micro_batch: MicroBatch, slices: Slices, dtype: torch.dtype, device: torch.device):
        """Collective over `axis`, whose slices are all of the same width."""
        self.slices, b, width = slices, micro_batch.size, slices.row_widths[0]
        self.window = Window(axis, b * width, dtype, device)
        self.projections = self.window.local.view(b, width)

    def __call__(self, core: Core) -> Tensor:
        """From `projections` [b, ...] of this slice to its channels of the attention output [b, H u]."""
        slices, b = self.slices, len(self.projections)
        q = self.join(core, b * (slices.heads + slices.kv_heads) * slices.qk_widths[0])
        out = q.new_empty(b, 1, slices.heads, slices.v_widths[0])
        core.attend_stored(q, out)
        return out.view(b, -1)

    def join(self, core: Core, sent: int) -> Tensor:
        """The queries [b, 1, H, d] of all sequences; their keys and values go into the cache. Each other rank needs
        `sent` elements of this one.
        """
        slices, axis, b = self.slices, self.window.axis, len(self.projections)
        issued = axis.issue("all_gather", (axis.size - 1) * sent * self.projections.element_size())
        q = self.projections.new_empty(b, 1, slices.heads, sum(slices.qk_widths))
        assert core.cache is not None
        k, v = core.cache
        getattr(_kernels(), self.kernel)[(b,)](
            *self.window.pointers, q, k, v, core.queries.at, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            slices.heads, slices.kv_heads, D=q.shape[3], **_constants(axis, slices.qk_widths[0]),
        )  # fmt: skip
        return axis.done(issued, q)


class Spread(Gather):
    """The exchange `sequence` of one decode micro-batch: every slice gets all channels and attends with all queries to
    the positions that it keeps; then each merges its channels from all slices' parts.
    """

    kernel = "to_all"

    def __init__(self, axis: Axis, micro_batch: MicroBatch, slices: Slices, dtype: torch.dtype, device: torch.device):
        """Collective over `axis`, whose slices are all of the same width."""
        super().__init__(axis, micro_batch, slices, dtype, device)
        b, whole = micro_batch.size, micro_batch.size * slices.heads * sum(slices.v_widths)
        self.parts = Window(axis, whole + b * slices.heads, torch.float32, device)
        self.attended = self.parts.local[:whole].view(b, 1, slices.heads, -1)
        self.sums = self.parts.local[whole:].view(b, 1, slices.heads)

    def __call__(self, core: Core) -> Tensor:
        """From `projections` [b, ...] of this slice to its channels of the attention output [b, H u]."""
        axis, heads, u = self.window.axis, self.slices.heads, self.slices.v_widths[0]
        q = self.join(core, self.projections.numel())
        core.attend_kept(q, Keys(axis.index, axis.size), (self.attended, self.sums))
        issued = axis.issue("all_to_all", (axis.size - 1) * len(q) * heads * (u + 1) * self.sums.element_size())
        out = q.new_empty(len(q), heads * u)
        _kernels().merge_parts[(len(q),)](
            *self.parts.pointers, out, self.attended.numel(), heads, D=u * axis.size, **_constants(axis, u)
        )
        return axis.done(issued, out)


def _constants(axis: Axis, width: int) -> dict[str, int]:
    """What the kernels of exchanges are compiled for, for slices of this width."""
    block, heads = power_of_two(width), 2048 // power_of_two(width)
    sizes = {"RANK": axis.index, "SIZE": axis.size, "W": width, "W_BLOCK": block}
    return sizes | {"HEADS": max(1, min(32, heads)), "num_warps": 4}


_EXCHANGES: dict[str, Callable[..., Shuffle | Gather]] = {"batch": Shuffle, "gather": Gather, "sequence": Spread}


class DirectStage(Stage):
    """A stage that decodes with its collectives in `Sums` and, where it may, in one of `_EXCHANGES`."""

    def __init__(self, stage: Stage, plan: tuple[MicroBatch, ...]) -> None:
        """The stage's weights and cache; collective over the ranks that share its layers. See `direct_stage`."""
        super().__init__(
            stage.model, stage.layout, stage.mesh, stage.weights, stage.cache, stage.owned, stage.positions
        )
        tokens = max(mb.size for mb in plan)
        self.sums = Sums(self.mesh.tp, tokens, self.model, self.dtype, self.device)
        self.exchanges: dict[MicroBatch, Shuffle | Gather] = {}
        if exchanges(self.model, self.layout) and tokens <= self.sums.window.blocks:
            make = _EXCHANGES[self.layout.exchange]
            for mb in plan:
                self.exchanges[mb] = make(self.mesh.tp_slice, mb, self.slices, self.dtype, self.device)
        self._room: int | None = None

    def apply(self, layer: Layer, index: int, hidden: Hidden, call: StageCall) -> None:
        """Both halves of a layer; what they add waits in a room until the next norm or the stage's end."""
        self.sums.put(0, self._attended(layer, index, hidden, call), layer.o[0], call.tokens)
        self._room = 0
        self.sums.put(
            1, self.activated(self._before(hidden, layer.mlp_norm, call), *layer.up), layer.down[0], call.tokens
        )
        self._room = 1
        if self.watch is not None:
            self.watch(index, call, self.settled(hidden))

    def settled(self, hidden: Hidden) -> Tensor:
        """The hidden states with what waits in a room."""
        if self._room is not None:
            self.sums.fold(self._room, hidden.x, None)
            self._room = None
        return hidden.x

    def _before(self, hidden: Hidden, norm: Norm, call: StageCall) -> Input:
        """What a half of a layer gets: all tokens [T, D], normed, with the last half's sum."""
        if self._room is None:
            return super()._before(hidden, norm, call)
        room, self._room = self._room, None
        return self.sums.fold(room, hidden.x, norm)

    def _attended(self, layer: Layer, index: int, hidden: Hidden, call: StageCall) -> Tensor:
        """Attention before W_O: [T, H u]."""
        exchange = self.exchanges.get(call.micro_batch)
        if exchange is None:
            return super()._attended(layer, index, hidden, call)
        linear_into(exchange.projections, self._before(hidden, layer.attention_norm, call), *layer.qkv)
        self._positioned(exchange.projections.unsqueeze(1), layer, index, call)
        return exchange(self._core(index, call))


def direct_stage(stage: Stage, plan: tuple[MicroBatch, ...]) -> DirectStage | None:
    """The stage with which this one's decode goes directly through peers' memory; None where it cannot.

    All ranks of the stage decide alike: it takes what `suits`, on GPUs of one host that reach each other's memory.
    """
    most = max((mb.size for mb in plan), default=0)
    fits = suits(stage.model, stage.layout, most, stage.dtype.itemsize)
    if not (fits and stage.device.type == "cuda" and reachable(stage.mesh.tp, stage.device)):
        return None
    return DirectStage(stage, plan)


def reachable(axis: Axis, device: torch.device) -> bool:
    """Whether all ranks of the axis are GPUs of one host that can read each other's memory. Collective over the axis.

    Ranks say which host they are on: their numbers do not tell it where a launcher uses some of a host's GPUs.
    """
    mine = torch.tensor([int(host_id(), 16)], dtype=torch.int64, device=device)
    if len(set(axis.all_gather(mine, [1] * axis.size).tolist())) > 1:
        return False
    count = torch.cuda.device_count()  # each rank looks at the GPUs that it sees, which may be its own alone
    able = all(torch.cuda.can_device_access_peer(a, b) for a in range(count) for b in range(count) if a != b)
    told = torch.tensor([able and count >= axis.size], dtype=torch.int64, device=device)
    return all(axis.all_gather(told, [1] * axis.size).tolist())
