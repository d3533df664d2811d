"""Decode's small collectives as loads from the memory of the other GPUs of a host, within the kernels that need them.

A sum over ranks, the residual's addition and the next norm are one kernel, and so are each all-to-all of the exchange
`batch` with the copies around it. NCCL takes 10 to 14 us for each of these sums and exchanges, whatever is sent, and
every kernel around them 2 more: together half of a layer's time when the cache is small. Sums are made in fp32, of fp16
too, which PyTorch's own symmetric-memory reductions refuse.
"""

from typing import Any

import torch
from torch import Tensor

from headgrid.layout.batching import MicroBatch
from headgrid.layout.layout import Layout
from headgrid.runtime.collectives import Axis
from headgrid.runtime.exchange import Core, Slices
from headgrid.runtime.hidden import Hidden
from headgrid.runtime.kernels import power_of_two
from headgrid.runtime.layer import Layer, Norm
from headgrid.runtime.quantised import Input, Weight, linear_into
from headgrid.runtime.stage import Stage, StageCall
from headgrid.spec.model import ModelSpec

LARGEST_BYTES = 4 << 20
"""Hidden states of a step beyond which NCCL's all-reduce, which sends each byte less often, is as fast."""


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
        self.window = Window(tp, 2 * tokens * width, dtype, device)
        self.rooms = self.window.local.view(2, tokens, width)

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
            D=u * axis.size, **self._constants(u),
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
            D=q.shape[3], **self._constants(w),
        )  # fmt: skip
        return q

    def _constants(self, width: int) -> dict[str, int]:
        """What the kernels are compiled for, for slices of this width."""
        block = power_of_two(width)
        return {
            "RANK": self.window.axis.index,
            "SIZE": self.window.axis.size,
            "W": width,
            "W_BLOCK": block,
            "HEADS": max(1, min(32, 2048 // block)),
            "num_warps": 4,
        }


class DirectStage(Stage):
    """A stage that decodes with its collectives in `Sums` and, where it may, in `Shuffle`."""

    def __init__(self, stage: Stage, plan: tuple[MicroBatch, ...]) -> None:
        """The stage's weights and cache; collective over the ranks that share its layers. See `direct_stage`."""
        super().__init__(
            stage.model, stage.layout, stage.mesh, stage.weights, stage.cache, stage.owned, stage.positions
        )
        tokens = max(mb.size for mb in plan)
        self.sums = Sums(self.mesh.tp, tokens, self.model, self.dtype, self.device)
        self.shuffles: dict[MicroBatch, Shuffle] = {}
        even = len({*self.slices.qk_widths, *self.slices.v_widths}) == 1
        if self.layout.exchange == "batch" and even and not self.model.qk_norm and tokens <= self.sums.window.blocks:
            for mb in plan:
                self.shuffles[mb] = Shuffle(self.mesh.tp_slice, mb, self.slices, self.dtype, self.device)
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
        shuffle = self.shuffles.get(call.micro_batch)
        if shuffle is None:
            return super()._attended(layer, index, hidden, call)
        linear_into(shuffle.projections, self._before(hidden, layer.attention_norm, call), *layer.qkv)
        self._positioned(shuffle.projections.unsqueeze(1), layer, index, call)
        return shuffle(self._core(index, call))


def direct_stage(stage: Stage, plan: tuple[MicroBatch, ...]) -> DirectStage | None:
    """The stage with which this one's decode goes directly through peers' memory; None where it cannot.

    All ranks of the stage decide alike: it takes what `suits`, on GPUs of one host that reach each other's memory.
    """
    most = max((mb.size for mb in plan), default=0)
    fits = suits(stage.model, stage.layout, most, stage.dtype)
    if not (fits and stage.device.type == "cuda" and reachable(stage.mesh.tp)):
        return None
    return DirectStage(stage, plan)


def suits(model: ModelSpec, layout: Layout, sequences: int, dtype: torch.dtype) -> bool:
    """Whether decode steps of at most so many sequences can go through peers' memory.

    It takes plain sums (no biases or norms behind them) of replicated hidden states, steps of up to `LARGEST_BYTES`, a
    power of two of ranks (the kernels index them as a block of Triton's), and no fp64: the kernels compute in fp32.
    """
    plain = model.norm_placement == "pre" and not {"o", "mlp"} & set(model.linear_bias)
    plain = plain and (layout.residual, layout.output) == ("replicated", "reduce")
    small = 0 < sequences * model.hidden_size * dtype.itemsize <= LARGEST_BYTES and model.hidden_size <= 1 << 14
    return plain and small and dtype != torch.float64 and power_of_two(layout.tp) == layout.tp > 1


def reachable(axis: Axis) -> bool:
    """Whether all ranks of the axis are GPUs of this host that can read each other's memory."""
    count = torch.cuda.device_count()
    if len({rank // count for rank in axis.ranks}) > 1:  # ranks are numbered host by host
        return False
    return all(torch.cuda.can_device_access_peer(a, b) for a in range(count) for b in range(count) if a != b)
