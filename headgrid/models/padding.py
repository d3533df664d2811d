"""A padded batch of transformers, in headgrid's coordinates.

transformers computes a table of columns [rows, columns], of which a mask tells where tokens are. Here a row has its
tokens only: the first is at position 0, wherever its column is. Rotary positions and windows depend on distances
alone, so both give the same scores.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from headgrid.errors import InvalidInput
from headgrid.spec.model import ModelSpec


@dataclass(frozen=True, slots=True)
class Past:
    """What a cache holds: `columns` of padding and tokens, and of each row `lengths` tokens.

    `shifts` say what transformers calls the position of a row's first token. `gaps`: some row has padding between its
    tokens, or behind them.
    """

    columns: int
    lengths: tuple[int, ...]
    shifts: tuple[int, ...]
    gaps: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    def cropped(self, columns: int) -> "Past":
        """The first `columns` columns. Raises InvalidInput where padding is not at the start of rows only."""
        if self.gaps:
            raise InvalidInput(
                "a cache with padding behind or between the tokens of a row cannot be cropped",
                why="it does not keep which columns they were",
                legal=("padding_side='left'",),
            )
        removed = max(0, self.columns - columns)
        lengths = tuple(max(0, length - removed) for length in self.lengths)
        return Past(self.columns - removed, lengths, self.shifts)

    def selected(self, rows: list[int]) -> "Past":
        """These rows, in this order; a row may be there several times."""
        lengths, shifts = (tuple(each[row] for row in rows) for each in (self.lengths, self.shifts))
        return Past(self.columns, lengths, shifts, self.gaps)


def nothing(rows: int) -> Past:
    """The past of a batch that begins."""
    return Past(0, (0,) * rows, (0,) * rows)


@dataclass(frozen=True, slots=True)
class Turn:
    """What a call adds to a past: of row i `counts[i]` tokens, which start in the call's column `firsts[i]`."""

    past: Past
    columns: int
    firsts: tuple[int, ...]
    counts: tuple[int, ...]
    after: Past

    @property
    def starts(self) -> tuple[int, ...]:
        """The position of each row's first new token."""
        return self.past.lengths

    @property
    def longest(self) -> int:
        """The most new tokens of a row."""
        return max(self.counts, default=0)

    def aligned(self, ids: Tensor) -> Tensor:
        """The new tokens of each row without its padding: ids [rows, columns] -> [rows, longest].

        Behind the tokens of shorter rows are any ids.
        """
        if self.longest == self.columns and not any(self.firsts):
            return ids
        first = torch.tensor(self.firsts, device=ids.device)[:, None]
        places = first + torch.arange(self.longest, device=ids.device)
        return ids.gather(1, places.clamp_(max=self.columns - 1))


def read_turn(ids: Tensor, mask: Tensor | None, positions: Tensor | None, past: Past, vocab_size: int) -> Turn:
    """What these ids [rows, columns] add to `past`, by transformers' `attention_mask` and `position_ids`.

    `mask` [rows, past.columns + columns] is not 0 where tokens are, None where all columns have one; `positions`
    [rows or 1, columns] are those of the tokens, None for columns counted from the first of the past. Raises
    InvalidInput for tokens that do not follow each other, a mask that contradicts the past, or ids that no token of
    `vocab_size` has.
    """
    (rows, columns), device = ids.shape, ids.device
    if rows != len(past.lengths):
        raise InvalidInput(f"{rows} sequences for a cache of {len(past.lengths)}")
    place = torch.arange(columns, device=device)
    if mask is None:
        mask = ids.new_ones(rows, past.columns + columns)
    _check_mask(mask, rows, past.columns + columns)
    seen, new = (mask.to(device) != 0).split([past.columns, columns], dim=1)
    counted = place.expand(rows, -1) + past.columns if positions is None else _expanded(positions, rows, columns)
    offsets = counted.to(device) - place  # the same for all tokens of a row that follow each other
    low, high = offsets.masked_fill(~new, 1 << 40).amin(1), offsets.masked_fill(~new, -(1 << 40)).amax(1)
    first, last = torch.where(new, place, columns).amin(1), torch.where(new, place, -1).amax(1)
    facts = [seen.sum(1), new.sum(1), first, last, low, high, ids.amin(1), ids.amax(1)]
    *table, lowest, highest = torch.stack(facts).tolist()  # the host waits once
    if min(lowest) < 0 or max(highest) >= vocab_size:
        raise InvalidInput(f"input_ids from {min(lowest)} to {max(highest)}", legal=(f"0 to {vocab_size - 1}",))
    return _turn(past, columns, table)


def _check_mask(mask: Tensor, rows: int, columns: int) -> None:
    if tuple(mask.shape) != (rows, columns):
        raise InvalidInput(
            f"attention_mask of shape {tuple(mask.shape)}",
            numbers=f"{rows} sequences, {columns} columns with those in the cache",
            why="each column of the past and of this call has its mark: token or padding",
            legal=(f"({rows}, {columns})",),
        )


def _expanded(positions: Tensor, rows: int, columns: int) -> Tensor:
    if positions.dim() != 2 or positions.shape[0] not in (1, rows) or positions.shape[1] != columns:
        legal = (f"({rows}, {columns})", f"(1, {columns})")
        raise InvalidInput(f"position_ids of shape {tuple(positions.shape)}", legal=legal)
    return positions.expand(rows, -1)


def _turn(past: Past, columns: int, table: list[list[int]]) -> Turn:
    """From rows of `table`: marks of the past, new tokens, first and last column, least and largest offset."""
    shifts, gaps = list(past.shifts), past.gaps
    for row, (seen, count, first, last, low, high) in enumerate(zip(*table, strict=True)):
        length = past.lengths[row]
        if seen != length:
            raise InvalidInput(
                f"attention_mask marks {seen} tokens of row {row} in the past, and the cache holds {length}",
                why="without a mask every column counts as a token" if seen == past.columns else "",
                legal=("the mask of the calls before, continued",),
            )
        if not count:
            gaps |= length > 0
            continue
        if last - first + 1 != count or low != high:
            raise InvalidInput(
                f"the {count} new tokens of row {row} do not follow each other",
                numbers=f"columns {first} to {last}, positions minus columns {low} to {high}",
                why="a row is one text, without holes in its mask or its positions",
                legal=("pad on the left", "pad on the right", "one row for each text"),
            )
        shift = low + first - length
        if length and shift != shifts[row]:
            raise InvalidInput(
                f"position {low + first} of row {row} does not follow its last, {shifts[row] + length - 1}",
                why="padding between the tokens of a row does not count as positions",
                legal=("position_ids as generate makes them: attention_mask.cumsum(-1) - 1",),
            )
        gaps |= last + 1 < columns or (length > 0 and first > 0)
        shifts[row] = shift
    _, counts, firsts, *_ = table
    lengths = tuple(length + count for length, count in zip(past.lengths, counts, strict=True))
    after = Past(past.columns + columns, lengths, tuple(shifts), gaps)
    return Turn(past, columns, tuple(firsts), tuple(counts), after)


def check_positions(turn: Turn, model: ModelSpec) -> None:
    """Raise InvalidInput where this model would see the positions of a turn otherwise than as distances."""
    if model.positions == "learned":
        wrong = [row for row, shift in enumerate(turn.after.shifts) if shift and turn.after.lengths[row]]
        if wrong:
            raise InvalidInput(
                f"row {wrong[0]} starts at position {turn.after.shifts[wrong[0]]}",
                why=f"{model.name} has learned positions; here each text starts at 0",
                legal=("position_ids as generate makes them: attention_mask.cumsum(-1) - 1", "pad on the right"),
            )
        if turn.after.longest > model.max_positions:
            raise InvalidInput(f"{turn.after.longest} tokens, but {model.name} has {model.max_positions} positions")
    if model.sliding_window and turn.after.gaps and turn.past.columns:
        raise InvalidInput(
            "padding between the tokens of a row",
            why=f"{model.name} has a sliding window, in which transformers counts padding too",
            legal=("pad on the left",),
        )
