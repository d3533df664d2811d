"""Which bytes of a checkpoint each rank reads, and to whom it hands which part of them. Pure numbers, no torch.

A checkpoint is a stream of stored rows: those that somebody needs, in the order of files and bytes. It is cut into
chunks, and each chunk into one contiguous share per rank. A rank reads its share and hands every rank the elements
that this one owns, so that all ranks together read each byte once, however finely the owners cut rows and columns.
Both sides derive from the same plan what goes where and in which order, so nothing but elements is sent. Saving is
the same exchange backwards.

A stored tensor counts as a matrix [rows, cols] here, a vector as one with a single column.
"""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from headgrid.errors import InvalidInput
from headgrid.layout.layout import Layout
from headgrid.layout.shards import Shard, parameters
from headgrid.layout.span import Span, Spans, total
from headgrid.models.names import Source
from headgrid.models.safetensors import StoredTensor
from headgrid.spec.model import ModelSpec

READABLE = ("F16", "BF16", "F32", "F64")
_ONE = (Span(0, 1),)


@dataclass(frozen=True, slots=True)
class Placed:
    """Consecutive indices along a stored dim, and where the first of them is in the owner's tensor."""

    span: Span
    local: int


class Cut:
    """The indices of a stored dim that a rank owns."""

    def __init__(self, spans: Spans, offset: int) -> None:
        """`spans` in the owner's order; its index k is the stored index k + `offset`."""
        placed: list[Placed] = []
        local = 0
        for span in spans:
            placed += [Placed(span.shift(offset), local)] if len(span) else []
            local += len(span)
        self.placed = tuple(sorted(placed, key=lambda place: place.span))
        self.size = local
        self._starts = [place.span.start for place in self.placed]
        self._before = [0]
        for place in self.placed:
            self._before.append(self._before[-1] + len(place.span))

    def below(self, stop: int) -> int:
        """How many of the indices are below `stop`."""
        k = bisect_right(self._starts, stop) - 1
        return self._before[k] + min(stop - self._starts[k], len(self.placed[k].span)) if k >= 0 else 0

    def within(self, outer: Span) -> Iterator[Placed]:
        """Those of the indices that are in `outer`, counted from its start."""
        for place in self.placed[max(0, bisect_right(self._starts, outer.start) - 1) :]:
            start, stop = max(place.span.start, outer.start), min(place.span.stop, outer.stop)
            if start < stop:
                yield Placed(Span(start - outer.start, stop - outer.start), place.local + start - place.span.start)
            elif place.span.start >= outer.stop:
                return


@dataclass(frozen=True, slots=True)
class Want:
    """The part of a stored tensor that a rank keeps in its own tensor `name`: these rows x these columns.

    `transposed`: rows of the stored tensor are columns of the rank's.
    """

    name: str
    transposed: bool
    rows: Cut
    cols: Cut


Wants = Mapping[str, Sequence[Want]]
"""Of one rank, by the names of stored tensors."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of a stored tensor."""

    tensor: StoredTensor
    rows: Span

    @property
    def start_byte(self) -> int:
        """Where it begins in its file."""
        return self.tensor.start_byte + self.rows.start * self.tensor.row_bytes

    @property
    def num_bytes(self) -> int:
        """Its size in its file."""
        return len(self.rows) * self.tensor.row_bytes


Share = tuple[Segment, ...]
"""What one rank reads of a chunk."""
Chunk = tuple[Share, ...]
"""One share per rank."""


@dataclass(frozen=True, slots=True)
class Block:
    """Elements that go from a share to an owner: rows x cols of its segment number `segment`, rows counted from that
    one's first. In the owner's tensor (transposed, if `want` says so) they begin at `local_row`, `local_col`.
    """

    segment: int
    want: Want
    rows: Span
    cols: Span
    local_row: int
    local_col: int

    @property
    def num_elements(self) -> int:
        """Elements in it."""
        return len(self.rows) * len(self.cols)


def stored_shapes(model: ModelSpec, sources: Mapping[str, Source]) -> dict[str, tuple[int, ...]]:
    """The shape of every stored tensor that `sources` speaks of, in the order of the model's tensors.

    Raises ValueError if they do not cover a stored tensor exactly once.
    """
    parts: dict[str, list[tuple[int, int, int, bool]]] = {}
    for name, shard in parameters(model, Layout(), 0).items():
        source, (rows, cols) = sources[name], (*shard.shape, 0)[:2]
        parts.setdefault(source.name, []).append((source.first_row, rows, cols, source.transposed and bool(cols)))
    return {name: _joined(name, sorted(found)) for name, found in parts.items()}


def _joined(name: str, parts: list[tuple[int, int, int, bool]]) -> tuple[int, ...]:
    end = 0
    for first, rows, cols, transposed in parts:
        if first != end or (cols, transposed) != parts[0][2:]:
            raise ValueError(f"{name}: the model's tensors do not cover it exactly once: {parts}")
        end += rows
    _, _, cols, transposed = parts[0]
    if not cols:
        return (end,)
    return (cols, end) if transposed else (end, cols)


def check_stored(tensors: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InvalidInput by name unless every needed tensor is there, of its shape and of a dtype that can be read."""
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise InvalidInput(
            f"the checkpoint lacks {missing[0]}",
            numbers=f"{len(missing)} of {len(shapes)} tensors of the model are not among its {len(tensors)}",
        )
    for name, shape in shapes.items():
        check_shape(readable(tensors, name), shape)


def readable(tensors: Mapping[str, StoredTensor], name: str) -> StoredTensor:
    """The stored tensor `name`. Raises InvalidInput if there is none, or its dtype cannot be read."""
    if name not in tensors:
        raise InvalidInput(f"the checkpoint lacks {name}", numbers=f"it is not among its {len(tensors)} tensors")
    if tensors[name].dtype not in READABLE:
        why = "quantised weights are not supported"
        raise InvalidInput(f"{name} is stored as {tensors[name].dtype}", why=why, legal=READABLE)
    return tensors[name]


def check_shape(stored: StoredTensor, shape: Sequence[int]) -> None:
    """Raise InvalidInput unless the stored tensor has this shape."""
    if stored.shape != tuple(shape):
        numbers = f"stored {list(stored.shape)}, by the config {list(shape)}"
        raise InvalidInput(f"{stored.name} has another shape than the model's config says", numbers=numbers)


def wants(model: ModelSpec, layout: Layout, ranks: Sequence[int], sources: Mapping[str, Source]) -> list[Wants]:
    """What each of `ranks` keeps. Replicas, which keep the same, share one value."""
    cuts: dict[tuple[Spans, int], Cut] = {}  # most layers are cut alike
    places: dict[int, Wants] = {}
    found: list[Wants] = []
    for rank in ranks:
        like = layout.rank(replace(layout.coordinates(rank), dp=0))
        if like not in places:
            places[like] = _wants(parameters(model, layout, like), sources, cuts)
        found.append(places[like])
    return found


def _wants(shards: Mapping[str, Shard], sources: Mapping[str, Source], cuts: dict[tuple[Spans, int], Cut]) -> Wants:
    found: dict[str, list[Want]] = {}
    for name, shard in shards.items():
        source = sources[name]
        rows, cols = (_cut(cuts, shard.rows, source.first_row), _cut(cuts, shard.cols or _ONE, 0))
        transposed = source.transposed and shard.cols is not None
        want = Want(name, transposed, cols if transposed else rows, rows if transposed else cols)
        found.setdefault(source.name, []).append(want)
    return found


def _cut(cuts: dict[tuple[Spans, int], Cut], spans: Spans, offset: int) -> Cut:
    key = spans, offset
    if key not in cuts:
        cuts[key] = Cut(spans, offset)
    return cuts[key]


def chunks(
    tensors: Collection[StoredTensor], everyone: Sequence[Wants], element_bytes: int, stage_bytes: int
) -> Iterator[Chunk]:
    """The stream of `tensors`, which are in the order of their bytes, for ranks that want `everyone[rank]`.

    Elements travel with `element_bytes` each. No rank gets more than `stage_bytes` of a chunk, nor reads and hands on
    more than that together, except for single rows that are larger.
    """
    distinct = list({id(rank_wants): rank_wants for rank_wants in everyone}.values())
    copies = [sum(rank_wants is other for other in everyone) for rank_wants in distinct]
    room = _Room(len(everyone), len(distinct), stage_bytes)
    for tensor in tensors:
        demand = _demand(tensor, distinct, copies, element_bytes)
        for span in demand.rows:
            start = span.start
            while start < span.stop:
                stop = room.furthest(demand, Span(start, span.stop))
                if stop == start and room.segments:
                    yield _shares(room.segments, room.costs, len(everyone))
                    room = _Room(len(everyone), len(distinct), stage_bytes)
                    continue
                stop = max(stop, start + 1)
                room.add(demand, Span(start, stop))
                start = stop
    if room.segments:
        yield _shares(room.segments, room.costs, len(everyone))


@dataclass(frozen=True, slots=True)
class _Demand:
    """What is wanted of a stored tensor: by which ranks (equal ones once), and the rows that any of them wants.

    `cost` is what a row costs the rank that reads it, on average: bytes read and handed on.
    """

    tensor: StoredTensor
    wants: Sequence[Sequence[Want]]
    rows: Spans
    cost: float
    element_bytes: int

    def bytes_to_each(self, rows: Span) -> list[int]:
        """What each rank gets of these rows."""
        return [
            self.element_bytes
            * sum((want.rows.below(rows.stop) - want.rows.below(rows.start)) * want.cols.size for want in mine)
            for mine in self.wants
        ]


def _demand(tensor: StoredTensor, distinct: Sequence[Wants], copies: Sequence[int], element_bytes: int) -> _Demand:
    wanted = [tuple(rank_wants.get(tensor.name, ())) for rank_wants in distinct]
    handed_on = sum(
        count * want.rows.size * want.cols.size for mine, count in zip(wanted, copies, strict=True) for want in mine
    )
    rows = union(place.span for mine in wanted for want in mine for place in want.rows.placed)
    cost = tensor.row_bytes + element_bytes * handed_on / max(1, total(rows))
    return _Demand(tensor, wanted, rows, cost, element_bytes)


def union(spans: Iterable[Span]) -> Spans:
    """The indices that are in any of the spans, each once, in ascending order."""
    found: list[Span] = []
    for span in sorted(spans):
        if found and span.start <= found[-1].stop:
            found[-1] = Span(found[-1].start, max(span.stop, found[-1].stop))
        else:
            found.append(span)
    return tuple(found)


class _Room:
    """A chunk that is being filled, and what may still be added to it."""

    def __init__(self, ranks: int, distinct: int, stage_bytes: int) -> None:
        self.segments: list[Segment] = []
        self.costs: list[float] = []
        self._left = float(ranks * stage_bytes)
        self._left_of_each = [stage_bytes] * distinct

    def furthest(self, demand: _Demand, rows: Span) -> int:
        """Where to stop so that as many of the rows as possible fit: rows.start if none does."""

        def too_many(stop: int) -> bool:
            part = Span(rows.start, stop)
            each = zip(demand.bytes_to_each(part), self._left_of_each, strict=True)
            return len(part) * demand.cost > self._left or any(size > left for size, left in each)

        if not too_many(rows.stop):
            return rows.stop
        return rows.start + bisect_right(range(rows.start + 1, rows.stop + 1), False, key=too_many)

    def add(self, demand: _Demand, rows: Span) -> None:
        """Add these rows."""
        self.segments.append(Segment(demand.tensor, rows))
        self.costs.append(demand.cost)
        self._left -= len(rows) * demand.cost
        each = zip(self._left_of_each, demand.bytes_to_each(rows), strict=True)
        self._left_of_each = [left - size for left, size in each]


def _shares(segments: Sequence[Segment], costs: Sequence[float], ranks: int) -> Chunk:
    """The segments in one contiguous share per rank, cut at rows, each of about the same cost."""
    whole = sum(len(segment.rows) * cost for segment, cost in zip(segments, costs, strict=True))
    shares: list[list[Segment]] = [[] for _ in range(ranks)]
    before, rank = 0.0, 0
    for segment, cost in zip(segments, costs, strict=True):
        start = segment.rows.start
        while start < segment.rows.stop:
            fits = round((whole * (rank + 1) / ranks - before) / cost)
            stop = segment.rows.stop if rank == ranks - 1 else min(start + max(0, fits), segment.rows.stop)
            if stop > start:
                shares[rank].append(Segment(segment.tensor, Span(start, stop)))
            before += (stop - start) * cost
            rank += stop < segment.rows.stop
            start = stop
    return tuple(tuple(share) for share in shares)


def blocks(share: Share, rank_wants: Wants) -> list[Block]:
    """What goes from this share to a rank with these wants, in the order in which it travels."""
    return [
        Block(index, want, rows.span, cols.span, rows.local, cols.local)
        for index, segment in enumerate(share)
        for want in rank_wants.get(segment.tensor.name, ())
        for rows in want.rows.within(segment.rows)
        for cols in want.cols.placed
    ]
