"""Padded batches in headgrid's coordinates, against plain loops over rows; and the calls that a stage gets for them."""

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from adapter_models import positions
from torch import Tensor

from headgrid.errors import InvalidInput
from headgrid.layout.layout import parse_layout
from headgrid.models.driver import pieces, places
from headgrid.models.padding import Past, Turn, check_positions, nothing, read_turn
from headgrid.spec.model import ModelSpec

VOCABULARY = 100
LAYOUTS = ("n1m4:batch", "n1m3:sequence", "n2m2:gather", "tp2", "n2m3:batch")


def batch(draw: random.Random, *, right: bool) -> tuple[Tensor, Tensor]:
    """Random ids and a mask: padding on the left, and with `right` behind some texts too."""
    rows, columns = draw.randint(1, 5), draw.randint(1, 12)
    mask = torch.zeros(rows, columns, dtype=torch.int64)
    for row in range(rows):
        stop = draw.randint(1, columns) if right else columns
        mask[row, draw.randint(0, stop - 1) : stop] = 1
    return torch.randint(0, VOCABULARY, (rows, columns)), mask


def texts(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [[int(i) for i, there in zip(*row, strict=True) if there] for row in zip(ids, mask, strict=True)]


def read(ids: Tensor, mask: Tensor | None, past: Past, where: Tensor | None = None) -> Turn:
    return read_turn(ids, mask, where, past, VOCABULARY)


def test_rows_are_told_from_their_padding(budget: Callable[[int, int], int]) -> None:
    draw = random.Random(0)
    for _ in range(budget(300, 3000)):
        ids, mask = batch(draw, right=True)
        turn = read(ids, mask, nothing(len(ids)))
        aligned = turn.aligned(ids)
        assert [row[:count] for row, count in zip(aligned.tolist(), turn.counts, strict=True)] == texts(ids, mask)
        assert turn.after.lengths == tuple(mask.sum(1).tolist()) and turn.after.columns == ids.shape[1]
        first = tuple(int(row.nonzero()[0]) for row in mask)
        assert turn.firsts == first == turn.after.shifts, "without position_ids positions are columns"
        assert read(ids, mask, nothing(len(ids)), positions(mask)).after.shifts == (0,) * len(ids)


def test_a_batch_in_chunks_is_the_batch(budget: Callable[[int, int], int]) -> None:
    """Whatever the chunks, the rows' tokens follow each other; some chunks hold nothing of a row."""
    draw = random.Random(1)
    for _ in range(budget(300, 3000)):
        ids, mask = batch(draw, right=False)
        where, past, got = positions(mask), nothing(len(ids)), [[] for _ in ids]
        while past.columns < ids.shape[1]:
            stop = min(ids.shape[1], past.columns + draw.randint(1, 4))
            part = ids[:, past.columns : stop]
            turn = read(part, mask[:, :stop], past, where[:, past.columns : stop])
            assert turn.starts == tuple(map(len, got))
            for row, count in enumerate(turn.counts):
                got[row] += turn.aligned(part)[row, :count].tolist()
            past = turn.after
        assert got == texts(ids, mask) and not past.gaps
        columns = draw.randint(0, past.columns)
        assert past.cropped(columns).lengths == tuple(mask[:, :columns].sum(1).tolist())


@pytest.mark.parametrize("text", LAYOUTS)
def test_every_new_token_is_computed_once(text: str, budget: Callable[[int, int], int]) -> None:
    draw, layout = random.Random(2), parse_layout(text)
    kinds: Counter[str] = Counter()
    for _ in range(budget(200, 2000)):
        turn = _turn(draw)
        wanted = sorted(draw.sample(range(turn.columns), draw.randint(1, turn.columns)))
        done: Counter[tuple[int, int]] = Counter()
        for piece in pieces(turn, layout):
            rows = piece.micro_batch.rows()
            kinds["decoding" if piece.decoding else "alone" if len(rows) < len(turn.counts) else "together"] += 1
            for row in rows:
                start = turn.starts[row] if piece.decoding else piece.start
                assert start == turn.starts[row] and piece.count >= turn.counts[row]
            for place, row, which in places(turn, piece, wanted):
                assert rows[place // piece.count] == row
                token = place % piece.count
                assert token == wanted[which] - turn.firsts[row] and 0 <= token < turn.counts[row]
                done[row, wanted[which]] += 1
        tokens = {
            (row, column)
            for row, (first, count) in enumerate(zip(turn.firsts, turn.counts, strict=True))
            for column in wanted
            if first <= column < first + count
        }
        assert done == dict.fromkeys(tokens, 1)
    assert {"decoding", "alone", "together"} <= set(kinds), "all kinds were drawn"


def _turn(draw: random.Random) -> Turn:
    """A turn behind pasts of the same or different lengths, of one or several tokens each."""
    rows, columns = draw.randint(1, 6), draw.choice((1, 1, draw.randint(2, 6)))
    lengths = tuple(draw.randint(0, 5) for _ in range(rows)) if draw.random() < 0.6 else (draw.randint(0, 3),) * rows
    firsts = tuple(draw.randint(0, columns - 1) if columns > 1 else 0 for _ in range(rows))
    past = Past(5, lengths, (0,) * rows)
    return Turn(past, columns, firsts, tuple(columns - first for first in firsts), past)


IDS = torch.arange(1, 9).view(2, 4)
WHOLE = torch.ones(2, 4, dtype=torch.int64)
SEEN = read(IDS, torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]), nothing(2)).after
CONTINUED = torch.tensor([[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1]])


def _hole() -> Tensor:
    mask = WHOLE.clone()
    mask[1, 1] = 0
    return mask


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("attention_mask of shape", (IDS, WHOLE[:, :3], nothing(2))),
        ("attention_mask of shape", (IDS, WHOLE[None, None], nothing(2))),
        ("attention_mask of shape", (IDS, WHOLE, SEEN)),
        ("do not follow each other", (IDS, _hole(), nothing(2))),
        ("do not follow each other", (IDS, WHOLE, nothing(2), torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]]))),
        ("position_ids of shape", (IDS, WHOLE, nothing(2), torch.arange(3)[None])),
        ("the cache holds 2", (IDS, torch.ones(2, 8), SEEN)),
        ("the cache holds 2", (IDS, None, SEEN)),
        ("does not follow its last", (IDS, CONTINUED, SEEN, torch.arange(5, 9)[None])),
        ("3 sequences for a cache of 2", (torch.ones(3, 1, dtype=torch.int64), None, SEEN)),
        ("input_ids from 1 to 100", (IDS.masked_fill(IDS == 8, 100), WHOLE, nothing(2))),
        ("input_ids from -1 to 8", (IDS.masked_fill(IDS == 3, -1), WHOLE, nothing(2))),
    ],
)
def test_what_cannot_be_told_is_refused(words: str, arguments: tuple) -> None:
    with pytest.raises(InvalidInput, match=words):
        read(*arguments)
    assert read(IDS, CONTINUED, SEEN).after.lengths == (8, 6), "the same with nothing wrong"


def _model(**fields: object) -> ModelSpec:
    sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4}
    rest = {"mlp_hidden_size": 8, "vocab_size": VOCABULARY, "max_positions": 8}
    return ModelSpec(name="tiny", **{**sizes, **rest, **fields})  # type: ignore[arg-type]


def test_learned_positions_start_at_0_and_end() -> None:
    learned, rotary = _model(positions="learned"), _model()
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    by_column, counted = read(IDS, mask, nothing(2)), read(IDS, mask, nothing(2), positions(mask))
    check_positions(counted, learned)
    check_positions(by_column, rotary)
    with pytest.raises(InvalidInput, match="row 1 starts at position 2"):
        check_positions(by_column, learned)
    longer = read(torch.ones(1, 9, dtype=torch.int64), None, nothing(1))
    check_positions(longer, rotary)
    with pytest.raises(InvalidInput, match="9 tokens, but tiny has 8 positions"):
        check_positions(longer, learned)


def test_windows_and_crops_do_not_go_with_padding_between_tokens() -> None:
    right = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    past = read(IDS, right, nothing(2), positions(right)).after
    mask = torch.cat([right, torch.ones(2, 1, dtype=torch.int64)], dim=1)
    turn = read(IDS[:, :1], mask, past, torch.tensor([[4], [2]]))
    check_positions(turn, _model())
    with pytest.raises(InvalidInput, match="padding between the tokens"):
        check_positions(turn, _model(sliding_window=3))
    with pytest.raises(InvalidInput, match="cannot be cropped"):
        turn.after.cropped(3)
