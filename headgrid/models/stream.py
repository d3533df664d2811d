"""Loading a checkpoint on all ranks at once: each reads its share of a chunk, and one all-to-all hands out the parts.

What is read where, and which elements go to whom, is decided by `chunks`; here it is carried out. Beside its own
tensors a rank holds a share as it is stored, what it sends and what it gets: 2 x `stage_bytes` at most. The next share
is read while this one is exchanged.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from headgrid.layout.layout import Layout
from headgrid.layout.shards import parameters
from headgrid.layout.span import Span
from headgrid.models.chunks import (
    Chunk,
    Segment,
    Share,
    Wants,
    blocks,
    check_shape,
    check_stored,
    chunks,
    readable,
    stored_shapes,
    wants,
)
from headgrid.models.names import Source
from headgrid.models.safetensors import Checkpoint
from headgrid.runtime.collectives import Axis
from headgrid.spec.model import ModelSpec

STAGE_BYTES = 32 << 20
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""What the format calls them, and torch."""
_ALIGNMENT = 64  # bytes: of any dtype, and of a cache line

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


@torch.no_grad()
def load(
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    model: ModelSpec,
    layout: Layout,
    axis: Axis,
    fill: Mapping[str, Tensor],
    progress: Progress | None = None,
    *,
    stage_bytes: int = STAGE_BYTES,
) -> None:
    """Fill this rank's tensors from the checkpoint, together with the other ranks of `axis`, all of which call this.

    `axis` names ranks of the layout: all of them, or those of a host with a disk of its own, or this one alone. They
    read each byte that any of them needs once. `fill` has a tensor or view of `local_shape` for every name of
    `parameters(model, layout, rank)`, all of one dtype (the same on all ranks) and on one device; stored numbers are
    rounded to it.

    Raises InvalidInput if the checkpoint lacks a tensor or has it in another shape or a dtype that cannot be read.
    """
    shapes = stored_shapes(model, sources)
    check_stored(checkpoint.tensors, shapes)
    check_local(fill, model, layout, axis)
    some = next(iter(fill.values()))
    everyone = wants(model, layout, axis.ranks, sources)
    needed = [tensor for name, tensor in checkpoint.tensors.items() if name in shapes]
    stream = list(chunks(needed, everyone, some.element_size(), stage_bytes))
    own, stage = as_stored(fill, everyone[axis.index]), Stage(stream, axis.index, some.device)
    done, whole_bytes = 0, sum(map(chunk_bytes, stream))
    shares = [*(chunk[axis.index] for chunk in stream), ()]
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as ahead:
        reading = ahead.submit(_read, checkpoint, stage, shares[0])
        for number, chunk in enumerate(stream):
            reading.result()
            leaving = parts_of_share(stage.matrices(shares[number]), shares[number], everyone)
            arriving = parts_of_owner(own, chunk, everyone[axis.index])
            outgoing = packed(axis, leaving, arriving, some)
            reading = ahead.submit(_read, checkpoint, stage, shares[number + 1])
            deliver(axis, outgoing, leaving, arriving)
            del outgoing  # before there is a next one
            done += chunk_bytes(chunk)
            if progress is not None:
                progress(done, whole_bytes)


def _read(checkpoint: Checkpoint, stage: "Stage", share: Share) -> None:
    for segment, place in stage.places(share):
        checkpoint.read(segment.tensor.file, segment.start_byte, place)


def whole(checkpoint: Checkpoint, sources: Mapping[str, Source], name: str, shape: Sequence[int]) -> Tensor:
    """The model's tensor `name`, of this shape, read alone: on the CPU, in the stored dtype.

    Raises InvalidInput if the checkpoint lacks it or has it in another shape or a dtype that cannot be read.
    """
    source = sources[name]
    stored = readable(checkpoint.tensors, source.name)
    across, last = source.transposed and len(shape) == 2, source.first_row + shape[0]
    held = max((last, *stored.shape[-1 if across else 0 :][:1]))  # more, where other tensors of the model are in it
    check_shape(stored, (shape[1], held) if across else (held, *shape[1:]))
    segment = Segment(stored, Span(0, stored.shape[0]) if across else Span(source.first_row, last))
    stage = Stage([((segment,),)], 0, torch.device("cpu"))
    _read(checkpoint, stage, (segment,))
    found = stage.matrices((segment,))[0]
    found = found[:, source.first_row : last].t() if across else found.reshape(tuple(shape))
    return found.clone(memory_format=torch.contiguous_format)


def check_local(tensors: Mapping[str, Tensor], model: ModelSpec, layout: Layout, axis: Axis) -> None:
    """Raise ValueError unless these are exactly the tensors that this rank owns, of one dtype and on one device."""
    shards = parameters(model, layout, axis.ranks[axis.index])
    expected = {name: shard.local_shape for name, shard in shards.items()}
    given = {name: tuple(x.shape) for name, x in tensors.items()}
    if given != expected:
        wrong = min(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
        raise ValueError(f"{wrong}: shape {given.get(wrong)} is given, the layout says {expected.get(wrong)}")
    if len({(x.dtype, x.device) for x in tensors.values()}) > 1:
        raise ValueError("tensors of more than one dtype or device")


def chunk_bytes(chunk: Chunk) -> int:
    """Stored bytes of a chunk."""
    return sum(segment.num_bytes for share in chunk for segment in share)


class Stage:
    """Host memory for one share at a time, each of its segments where its dtype is aligned, and on another device a
    copy of it there.
    """

    def __init__(self, stream: Sequence[Chunk], index: int, device: torch.device) -> None:
        """For the shares of rank number `index` of the chunks of `stream`."""
        size = max((sum(_padded(segment) for segment in chunk[index]) for chunk in stream), default=0)
        self._host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._near = self._host if device.type == "cpu" else torch.empty(size, dtype=torch.uint8, device=device)
        self._bytes = self._host.numpy().data

    def places(self, share: Share) -> Iterator[tuple[Segment, memoryview]]:
        """Each segment with its bytes on the host."""
        start = 0
        for segment in share:
            yield segment, self._bytes[start : start + segment.num_bytes]
            start += _padded(segment)

    def matrices(self, share: Share) -> list[Tensor]:
        """The segments as [rows, cols] on the device, where they are copied now: the host's memory is free again."""
        size = sum(map(_padded, share))
        if self._near is not self._host:
            self._near[:size].copy_(self._host[:size])
        return self.views(share)

    def views(self, share: Share) -> list[Tensor]:
        """The segments as [rows, cols] on the device, as they are there."""
        found: list[Tensor] = []
        start = 0
        for segment in share:
            raw = self._near[start : start + segment.num_bytes]
            found.append(raw.view(DTYPES[segment.tensor.dtype]).view(len(segment.rows), -1))
            start += _padded(segment)
        return found

    def download(self, share: Share) -> None:
        """Copy the segments from the device to the host."""
        size = sum(map(_padded, share))
        if self._near is not self._host:
            self._host[:size].copy_(self._near[:size])


def _padded(segment: Segment) -> int:
    return -(-segment.num_bytes // _ALIGNMENT) * _ALIGNMENT


Parts = list[list[Tensor]]
"""Views by rank, in the order in which they travel."""


def parts_of_share(data: Sequence[Tensor], share: Share, everyone: Sequence[Wants]) -> Parts:
    """What of a share, whose segments are `data`, belongs to each rank."""
    return [
        [data[b.segment][b.rows.start : b.rows.stop, b.cols.start : b.cols.stop] for b in blocks(share, rank_wants)]
        for rank_wants in everyone
    ]


def parts_of_owner(own: Mapping[str, Tensor], chunk: Chunk, mine: Wants) -> Parts:
    """The places in a rank's tensors, as from `as_stored`, of what it wants of each share."""
    return [
        [
            own[b.want.name][b.local_row : b.local_row + len(b.rows), b.local_col : b.local_col + len(b.cols)]
            for b in blocks(share, mine)
        ]
        for share in chunk
    ]


def as_stored(tensors: Mapping[str, Tensor], mine: Wants) -> dict[str, Tensor]:
    """Views of a rank's tensors as matrices whose rows are rows of the stored tensors."""
    found: dict[str, Tensor] = {}
    for want in (want for several in mine.values() for want in several):
        x = tensors[want.name]
        x = x[:, None] if x.dim() == 1 else x
        found[want.name] = x.t() if want.transposed else x
    return found


def packed(axis: Axis, leaving: Parts, arriving: Parts, like: Tensor) -> Tensor:
    """All that leaves for other ranks, flat, in the dtype and on the device of `like`; what stays is put in place."""
    for target, source in zip(arriving[axis.index], leaving[axis.index], strict=True):
        target.copy_(source)
    flat = like.new_empty(sum(_sizes(axis, leaving)))
    _each(flat, axis, leaving, lambda piece, view: piece.copy_(view))
    return flat


def deliver(axis: Axis, outgoing: Tensor, leaving: Parts, arriving: Parts) -> None:
    """Exchange what `packed` returned, and put in place what comes."""
    incoming = axis.all_to_all(outgoing, _sizes(axis, leaving), _sizes(axis, arriving))
    _each(incoming, axis, arriving, lambda piece, view: view.copy_(piece))


def _sizes(axis: Axis, parts: Parts) -> list[int]:
    """Elements to or from each rank; what a rank keeps does not travel."""
    return [0 if rank == axis.index else sum(view.numel() for view in views) for rank, views in enumerate(parts)]


def _each(flat: Tensor, axis: Axis, parts: Parts, do: Callable[[Tensor, Tensor], object]) -> None:
    """Call `do` with each consecutive piece of a flat tensor and the view that it stands for."""
    start = 0
    for view in (view for rank, views in enumerate(parts) if rank != axis.index for view in views):
        do(flat[start : start + view.numel()].view(view.shape), view)
        start += view.numel()
