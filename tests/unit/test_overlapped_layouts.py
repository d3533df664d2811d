"""Layouts whose communication is overlapped: notation, refusals, and plans in which calls can take turns."""

import itertools
from dataclasses import replace

import pytest
from grid import model

from headgrid.errors import InvalidLayout
from headgrid.layout.batching import Call, pieces, prefill_calls
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.legal import check, check_training
from headgrid.layout.traffic import prefill_collectives
from headgrid.spec.workload import Workload

TEXTS = (
    *("tp2pp2:overlapped", "tp4:sharded+overlapped", "tp2dp2:overlapped", "n2m2:gather+concat+overlapped"),
    *("n2m2:batch+overlapped", "n2m2pp2:sequence+sharded+fp32+overlapped", "n1m3:scores+overlapped"),
    *("n2m2:batch+gathered+overlapped", "n2m2pp2:batch+gathered+sharded+overlapped"),
)
SPEC = replace(model(8, 4, 16), max_positions=12)


def workload(batch: int, chunk: int = 16_384, positions: int = 0) -> Workload:
    return Workload(batch=batch, seq=10, decode_steps=2, chunk_tokens=chunk, chunk_positions=positions)


@pytest.mark.parametrize("text", TEXTS)
def test_the_notation_says_it(text: str) -> None:
    layout = parse_layout(text)
    assert str(layout) == text
    assert layout.communication == "overlapped"
    exposed = parse_layout(text.replace("+overlapped", "").replace(":overlapped", ""))
    assert exposed.communication == "exposed"
    assert exposed != layout
    assert exposed == parse_layout(f"{exposed}{'+' if ':' in str(exposed) else ':'}exposed")


@pytest.mark.parametrize("text", ["tp1", "pp2", "dp4", "n1m4:batch+gathered", "n1m2pp2:batch+gathered"])
def test_there_must_be_something_to_overlap(text: str) -> None:
    with pytest.raises(InvalidLayout) as caught:
        parse_layout(f"{text}{'+' if ':' in text else ':'}overlapped")
    assert text in caught.value.block()
    assert caught.value.legal == (text,)


@pytest.mark.parametrize(
    ("text", "too_few", "enough"),
    [
        ("tp2:overlapped", 1, 2),
        ("tp2dp3:overlapped", 3, 4),
        ("n2m2:sequence+overlapped", 1, 2),
        ("n2m2:batch+overlapped", 2, 3),
        ("n2m2dp2:batch+gathered+overlapped", 4, 5),
    ],
)
def test_there_must_be_two_calls_somewhere(text: str, too_few: int, enough: int) -> None:
    layout = parse_layout(text)
    with pytest.raises(InvalidLayout) as caught:
        check(SPEC, layout, workload(too_few))
    assert f"a batch of {too_few}" in caught.value.block()
    batch, exposed = caught.value.legal
    check(SPEC, layout, workload(int(batch.removeprefix("--batch "))))
    check(SPEC, parse_layout(exposed), workload(too_few))
    check(SPEC, layout, workload(enough))
    assert most_at_once(layout, workload(enough)) == 2
    assert most_at_once(layout, workload(too_few)) == 1


def most_at_once(layout: Layout, work: Workload) -> int:
    """Calls, or pieces, of different sequences that follow each other somewhere."""
    calls = prefill_calls(layout, work, 0)
    if layout.weights == "gathered":
        rows = [
            rows for call in calls for part in call.micro_batch.parts for rows, _ in pieces(layout, len(part), work)
        ]
        return 1 + any(a != b for a, b in itertools.pairwise(rows))
    return 1 + any(a.micro_batch != b.micro_batch for a, b in itertools.pairwise(calls))


def test_training_refuses_it_and_names_what_it_takes() -> None:
    layout, work = parse_layout("tp2:overlapped"), Workload(batch=4, seq=10, decode_steps=0)
    with pytest.raises(InvalidLayout) as caught:
        check_training(SPEC, layout, work)
    assert caught.value.legal == ("tp2",)
    check_training(SPEC, parse_layout("tp2"), work)


@pytest.mark.parametrize("text", TEXTS)
def test_calls_that_take_turns_are_of_different_sequences(text: str) -> None:
    """But for the chunks of a last one, which is alone; and each sequence's chunks are in order."""
    layout = parse_layout(text)
    for batch, chunk, positions in itertools.product((6, 9, 16), (3, 10, 25, 1000), (0, 3)):
        work = workload(batch, chunk, positions)
        for replica in range(layout.dp):
            assert_turns(list(prefill_calls(layout, work, replica)), layout.calls_at_once)


def assert_turns(calls: list[Call], at_once: int) -> None:
    micro_batches = list(dict.fromkeys(call.micro_batch for call in calls))
    for micro_batch in micro_batches:
        starts = [call.positions.start for call in calls if call.micro_batch == micro_batch]
        assert starts == sorted(starts)
    alone = micro_batches[-1:] if len(micro_batches) % 2 else []
    if at_once > 1:
        for one, other in itertools.pairwise(calls):
            assert one.micro_batch != other.micro_batch or one.micro_batch in alone


def test_a_pipeline_is_filled_with_pairs() -> None:
    exposed, overlapped = parse_layout("tp2pp2"), parse_layout("tp2pp2:overlapped")
    assert [len(prefill_calls(exposed, workload(batch), 0)) for batch in (3, 8, 20)] == [3, 8, 8]
    assert [len(prefill_calls(overlapped, workload(batch), 0)) for batch in (3, 8, 20)] == [3, 8, 16]


def test_overlapped_calls_move_the_same_where_they_are_the_same() -> None:
    """In calls of one sequence each, with and without."""
    for text in ("tp2pp2:overlapped", "n2m2:batch+overlapped", "n2m2:sequence+sharded+overlapped"):
        layout, work = parse_layout(text), workload(32, chunk=10)
        exposed = parse_layout(text.replace("+overlapped", "").replace(":overlapped", ""))
        for rank in range(layout.ranks):
            assert prefill_collectives(SPEC, layout, work, rank) == prefill_collectives(SPEC, exposed, work, rank)
