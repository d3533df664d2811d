"""The KV cache of a sharded transformers model: a `transformers.Cache` of which each rank holds its part."""

from typing import NoReturn

import torch
from torch import Tensor
from transformers import Cache

from headgrid.errors import InvalidInput
from headgrid.layout.batching import cache_rows, cached_positions, owned_rows
from headgrid.layout.layout import Layout
from headgrid.layout.memory import cache_shape
from headgrid.layout.span import Span
from headgrid.models.padding import Past, Turn, nothing
from headgrid.runtime.cache import KVCache, carve, new_arena
from headgrid.runtime.mesh import Mesh
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

_LEAST_ROOM = 64


class ShardedCache(Cache):
    """Keys and values as the layout's exchange divides them, with room that grows as texts do.

    It is one model's; only that model's `forward` writes it. All ranks call its methods in turn, as they call the
    model: `reorder_cache` (beam search) and its like move rows between ranks where the exchange is `batch`.
    """

    def __init__(
        self, model: ModelSpec, layout: Layout, mesh: Mesh, dtype: torch.dtype, device: torch.device, room: int = 0
    ) -> None:
        """Empty, for `room` positions at first (0: as many as are needed); nothing is allocated yet."""
        super().__init__(layers=[])
        self.model, self.layout, self.mesh, self.dtype, self.device = model, layout, mesh, dtype, device
        self.past, self.room, self.kv = nothing(0), room, None
        self._first_room = room

    kv: KVCache | None
    past: Past

    def take(self, turn: Turn) -> tuple[KVCache, Span]:
        """The cache with room for the tokens of `turn`, and the rows of it that this rank keeps."""
        needed, rows = turn.past.longest + turn.longest, len(turn.counts)
        if self.kv is None:
            self.room = max(needed, self._first_room or _LEAST_ROOM)
            self.kv = self._new(rows)
        elif needed > self.room:
            self.room = max(needed, 2 * self.room)
            old, self.kv = self.kv, self._new(rows)
            for part, was in ((self.kv.keys, old.keys), (self.kv.values, old.values)):
                part[:, :, : was.shape[2]] = was
        return self.kv, self._owned(rows)

    def keep(self, turn: Turn) -> None:
        """The tokens of `turn` have been written."""
        self.past = turn.after

    def _owned(self, rows: int) -> Span:
        return owned_rows(self.layout, rows, self.mesh.rank)

    def _new(self, rows: int) -> KVCache:
        workload = Workload(batch=rows, seq=self.room, decode_steps=0)
        shape = cache_shape(self.model, self.layout, workload, self.mesh.rank)
        return carve(new_arena(shape.elements, self.dtype, self.device), shape)

    @property
    def size_bytes(self) -> int:
        """Bytes that this rank holds."""
        return 0 if self.kv is None else self.kv.size_bytes

    def select(self, rows: list[int]) -> None:
        """Make it the cache of these rows, in this order; a row may be there several times."""
        if self.kv is not None:
            owners = [cache_rows(self.layout, Span(0, count)) for count in (len(self.past.lengths), len(rows))]
            old, kv = self.kv, self._new(len(rows))
            used = cached_positions(self.layout, self.past.longest, self.mesh.at.slice)
            for part, was in ((kv.keys, old.keys), (kv.values, old.values)):
                self._move(part[:, :, :used], was[:, :, :used], rows, *owners)
            self.kv = kv
        self.past = self.past.selected(rows)

    def _move(self, new: Tensor, old: Tensor, rows: list[int], were: tuple[Span, ...], are: tuple[Span, ...]) -> None:
        """Fill this rank's rows of `new` [layers, rows, ...] from `old`: some may be with other slices of the group."""
        if len(are) == 1:
            new.copy_(old.index_select(1, torch.tensor(rows, device=old.device)))
            return
        j, row_elements = self.mesh.at.slice, old[:, :1].numel() if old.shape[1] else new[:, :1].numel()
        wanted = [[row for row in rows[own.start : own.stop] if _in(were[j], row)] for own in are]
        arriving = [[k for k, row in enumerate(rows[are[j].start : are[j].stop]) if _in(own, row)] for own in were]
        mine = [old[:, [row - were[j].start for row in each]].transpose(0, 1).reshape(-1) for each in wanted]
        receive = [len(each) * row_elements for each in arriving]
        received = self.mesh.tp_slice.all_to_all(torch.cat(mine), [len(x) for x in mine], receive)
        for places, part in zip(arriving, received.split(receive), strict=True):
            if places:
                new[:, places] = part.view(len(places), len(new), *new.shape[2:]).transpose(0, 1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i becomes what row `beam_idx[i]` was."""
        rows = beam_idx.tolist()
        if rows != list(range(len(self.past.lengths))):
            self.select(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        self.select(torch.arange(len(self.past.lengths))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, one after the other."""
        self.select([row for row in range(len(self.past.lengths)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -`tokens_to_remove` columns; a positive number is how many are to stay."""
        columns = self.past.columns
        self.past = self.past.cropped(tokens_to_remove if tokens_to_remove > 0 else columns + tokens_to_remove)

    def reset(self) -> None:
        """Forget the past; the memory stays for a batch of as many rows."""
        self.past = nothing(len(self.past.lengths))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the past, padding included."""
        return self.past.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that a mask has after `query_length` more, and where they start."""
        return self.past.columns + int(query_length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def update(self, *args: object, **kwargs: object) -> NoReturn:
        """Raise InvalidInput: another model's layers cannot write here."""
        raise InvalidInput("this cache is of a sharded model", why="only that model's forward writes it")

    def __len__(self) -> int:
        """Layers of the model."""
        return self.model.num_layers

    def __repr__(self) -> str:
        """Its layout, and how full it is."""
        rows = len(self.past.lengths)
        return f"ShardedCache({self.layout}, rows={rows}, columns={self.past.columns}, room={self.room})"

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first call."""
        return len(self.past.lengths) or -1

    @property
    def is_initialized(self) -> bool:
        """Whether memory has been allocated."""
        return self.kv is not None


def _in(span: Span, index: int) -> bool:
    return span.start <= index < span.stop
