"""Layouts whose pipeline is drained after each token: notation, refusals, and the plan of a decode step."""

from dataclasses import replace

import pytest
from grid import model

from headgrid.errors import InvalidLayout
from headgrid.layout.batching import decode_micro_batches, replica_rows
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.traffic import decode_collectives, prefill_collectives
from headgrid.spec.workload import Workload

TEXTS = ("pp2:drained", "tp2pp2:drained", "n1m2pp2:batch+gathered+drained", "tp2pp4dp2:fp32+fp8+drained")
SPEC = replace(model(8, 4, 16), num_layers=4)
WORK = Workload(batch=11, seq=6, decode_steps=3)


def in_flight(layout: Layout) -> Layout:
    return replace(layout, decode="in_flight")


@pytest.mark.parametrize("text", TEXTS)
def test_the_notation_says_it(text: str) -> None:
    layout = parse_layout(text)
    assert str(layout) == text and layout.decode == "drained"
    assert "drained" not in str(in_flight(layout)) and in_flight(layout) != layout


@pytest.mark.parametrize("text", ["tp1", "tp4", "dp2", "n2m2:batch"])
def test_there_must_be_a_pipeline(text: str) -> None:
    with pytest.raises(InvalidLayout) as caught:
        parse_layout(f"{text}{'+' if ':' in text else ':'}drained")
    assert caught.value.legal[0] == text
    assert [parse_layout(legal).ranks for legal in caught.value.legal]  # each is a layout itself


@pytest.mark.parametrize("text", TEXTS)
def test_a_step_is_one_micro_batch_of_all_rows(text: str) -> None:
    layout = parse_layout(text)
    for replica, rows in enumerate(replica_rows(layout, WORK.batch)):
        (only,) = decode_micro_batches(layout, WORK, replica)
        assert list(only.rows()) == list(range(rows.start, rows.stop))
        several = decode_micro_batches(in_flight(layout), WORK, replica)
        assert len(several) == layout.pp and sum(mb.size for mb in several) == only.size


@pytest.mark.parametrize("text", TEXTS)
def test_it_sends_as_many_bytes_in_fewer_calls_and_prefills_alike(text: str) -> None:
    layout = parse_layout(text)
    for rank in range(layout.ranks):
        both = layout, in_flight(layout)
        drained, flying = (decode_collectives(SPEC, each, WORK, rank) for each in both)
        sent = [sum(n * op.bytes for op, n in found.items() if op.kind == "send") for found in (drained, flying)]
        calls = [sum(n for op, n in found.items() if op.kind == "send") for found in (drained, flying)]
        assert sent[0] == sent[1] and calls[0] * layout.pp == calls[1]
        assert prefill_collectives(SPEC, both[0], WORK, rank) == prefill_collectives(SPEC, both[1], WORK, rank)
