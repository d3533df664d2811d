"""Data-parallel attention: notation, refusals, who owns and attends to what, and its traffic, memory and operations by
formulas of their own.
"""

import math
from collections import Counter
from dataclasses import replace

import pytest
from grid import model

from headgrid.errors import InvalidLayout
from headgrid.layout.batching import decode_micro_batches, owned_rows, prefill_calls, replica_rows, token_shares
from headgrid.layout.flops import decode_flops, prefill_flops
from headgrid.layout.gradients import summed_over
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.legal import check, check_training, legal_layouts
from headgrid.layout.memory import cache_shape
from headgrid.layout.quantised import rows_are_cut
from headgrid.layout.shards import parameters
from headgrid.layout.traffic import Collective, decode_collectives, prefill_collectives
from headgrid.report import partition
from headgrid.spec.workload import Workload

TEXTS = (
    "tp2:dp-attention",
    "tp7:dp-attention",
    "tp2pp2dp3:dp-attention",
    "tp4pp2:dp-attention+fp32+overlapped+fp8+drained",
)
SPEC = model(10, 5, 8, num_layers=4, hidden_size=64, mlp_hidden_size=96, vocab_size=128, max_positions=64)
WORK = Workload(batch=12, seq=16, decode_steps=4, dtype="float32")
E = 4


@pytest.mark.parametrize("text", TEXTS)
def test_the_notation_says_it(text: str) -> None:
    layout = parse_layout(text)
    assert str(layout) == text
    assert (layout.attention, layout.residual) == ("dp-attention", "sharded")
    assert layout == parse_layout(text.replace("dp-attention", "sharded+dp-attention"))
    assert layout != replace(layout, attention="cut")
    assert "dp-attention" not in str(replace(layout, attention="cut"))


@pytest.mark.parametrize(
    "text",
    [
        *("n2m2:batch+dp-attention", "n1m4:sequence+sharded+dp-attention", "n2m2:batch+gathered+dp-attention"),
        *(
            "tp4:concat+dp-attention",
            "tp4:replicated+dp-attention",
            "tp1:dp-attention",
            "dp4:dp-attention",
            "pp2:dp-attention",
        ),
    ],
)
def test_what_contradicts_it_is_refused_with_layouts_that_do_not(text: str) -> None:
    with pytest.raises(InvalidLayout) as caught:
        parse_layout(text)
    assert "dp-attention" in caught.value.block()
    assert any("dp-attention" in str(parse_layout(legal)) for legal in caught.value.legal)
    assert all(parse_layout(legal) for legal in caught.value.legal)


def test_a_value_without_its_residual_is_refused() -> None:
    with pytest.raises(InvalidLayout):
        Layout(num_head_groups=4, attention="dp-attention")


def test_heads_need_not_divide_but_the_mlp_and_the_vocabulary_need_a_part_for_each_rank() -> None:
    few = model(3, 1, 8, mlp_hidden_size=5, vocab_size=40)
    for ranks in range(2, 6):
        check(few, parse_layout(f"tp{ranks}:dp-attention"), ranks=ranks)
    with pytest.raises(InvalidLayout, match="6 ranks share 5"):
        check(few, parse_layout("tp6:dp-attention"))
    with pytest.raises(InvalidLayout, match="head groups cannot share"):
        check(few, parse_layout("tp2:sharded"))


@pytest.mark.parametrize(
    ("text", "least"), [("tp4:dp-attention", 4), ("tp2dp3:dp-attention", 6), ("tp2pp2:dp-attention", 2)]
)
def test_every_rank_needs_a_sequence(text: str, least: int) -> None:
    layout, work = parse_layout(text), replace(WORK, batch=least)
    check(SPEC, layout, work, layout.ranks)
    with pytest.raises(InvalidLayout) as caught:
        check(SPEC, layout, replace(work, batch=least - 1), layout.ranks)
    assert caught.value.legal == (f"--batch {least}",)
    assert f"{least - 1} sequences" in caught.value.block()


def test_it_is_a_baseline_and_not_among_the_layouts_that_are_listed() -> None:
    assert not [layout for ranks in range(1, 9) for layout in legal_layouts(SPEC, ranks) if layout.attention != "cut"]


@pytest.mark.parametrize("chunk_tokens", [16, 40, 16_384])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("batch", [21, 12, 17, 50])
def test_hidden_states_live_where_their_sequences_are_attended_to(text: str, batch: int, chunk_tokens: int) -> None:
    """Of every call, also where some rank has no sequence; and each row of the batch has one owner in its replica."""
    layout = parse_layout(text)
    work = replace(WORK, batch=batch, chunk_tokens=chunk_tokens, chunk_positions=5)
    for replica, rows in enumerate(replica_rows(layout, batch)):
        calls = [(call.micro_batch, len(call.positions)) for call in prefill_calls(layout, work, replica)]
        for micro_batch, queries in [*calls, *((mb, 1) for mb in decode_micro_batches(layout, work, replica))]:
            shares = token_shares(layout, micro_batch.size, queries)
            assert [len(share) for share in shares] == [len(part) * queries for part in micro_batch.parts]
        places = [(rank, layout.coordinates(rank)) for rank in range(layout.ranks)]
        at_first_stage = [rank for rank, at in places if (at.dp, at.pp) == (replica, 0)]
        owned = [owned_rows(layout, batch, rank) for rank in at_first_stage]
        assert [span.start for span in owned] == [rows.start, *(span.stop for span in owned[:-1])]
        assert owned[-1].stop == rows.stop


@pytest.mark.parametrize("text", ["tp2:dp-attention", "tp4pp2:dp-attention"])
def test_attention_is_whole_on_every_rank_and_the_rest_is_cut_as_in_tensor_parallelism(text: str) -> None:
    layout = parse_layout(text)
    plain = parse_layout(text.replace(":dp-attention", ":sharded"))
    spec = model(8, 4, 8, linear_bias=("qkv", "o", "mlp"), qk_norm=True, num_layers=4)
    whole = parameters(spec, Layout(), 0)
    for rank in range(layout.ranks):
        mine, cut = parameters(spec, layout, rank), parameters(spec, plain, rank)
        assert mine.keys() == cut.keys()
        for name, shard in mine.items():
            assert shard == (whole if ".attention." in name else cut)[name], name
        assert any(mine[name] != cut[name] for name in mine), "the control: attention is cut there"


@pytest.mark.parametrize(("text", "ranks"), [("tp2:dp-attention", 2), ("tp3:dp-attention", 3), ("tp4:dp-attention", 4)])
@pytest.mark.parametrize(("phase", "queries"), [(prefill_collectives, WORK.seq), (decode_collectives, 1)])
def test_a_layer_gathers_once_and_scatters_once(phase, queries: int, text: str, ranks: int) -> None:
    """And the vocabulary's ends: a sum scattered, last states summed, logits gathered. Half of what `sharded` sends."""
    states, vocab, width = WORK.batch * queries * SPEC.hidden_size * E, SPEC.vocab_size, SPEC.hidden_size
    own = states // ranks
    for rank in range(ranks):
        mine = vocab // ranks + (rank < vocab % ranks)
        expected = Counter({Collective("all_gather", "tp", (ranks - 1) * own): SPEC.num_layers})
        expected[Collective("reduce_scatter", "tp", states - own)] = SPEC.num_layers + 1
        expected[Collective("all_reduce", "tp", 2 * (ranks - 1) * WORK.batch * width * E // ranks)] += 1
        expected[Collective("all_gather", "tp", (ranks - 1) * WORK.batch * mine * E)] += 1
        assert phase(SPEC, parse_layout(text), WORK, rank) == expected
        twice = phase(SPEC, parse_layout(f"tp{ranks}:sharded"), WORK, rank) - expected
        assert sum(call.bytes * n for call, n in twice.items()) == SPEC.num_layers * ((ranks - 1) * own + states - own)


@pytest.mark.parametrize("batch", [12, 13, 15])
def test_caches_and_operations_of_all_ranks_are_those_of_one_device(batch: int) -> None:
    """No key is cached twice and no product computed twice, though the weights of attention are stored four times."""
    work = replace(WORK, batch=batch, prompt_lengths=tuple(1 + (7 * k) % 16 for k in range(batch)))
    layout = parse_layout("tp4:dp-attention")
    of_all = [sum(kind(SPEC, layout, work, rank) for rank in range(4)) for kind in (prefill_flops, _decode)]
    assert of_all == [prefill_flops(SPEC, Layout(), work, 0), _decode(SPEC, Layout(), work, 0)]
    elements = [cache_shape(SPEC, layout, work, rank).elements for rank in range(4)]
    assert sum(elements) == cache_shape(SPEC, Layout(), work, 0).elements
    assert max(elements) * batch == sum(elements) * math.ceil(batch / 4)
    stored, once = (
        sum(s.num_elements for r in range(n) for s in parameters(SPEC, lay, r).values())
        for n, lay in ((4, layout), (1, Layout()))
    )
    of_attention = sum(s.num_elements for name, s in parameters(SPEC, Layout(), 0).items() if ".attention." in name)
    norms = sum(
        s.num_elements
        for name, s in parameters(SPEC, Layout(), 0).items()
        if s.cols is None and ".attention." not in name
    )
    assert stored - once == 3 * (of_attention + norms)


def _decode(spec, layout, work, rank: int) -> int:
    return decode_flops(spec, layout, work, rank, 1)


def test_gradients_of_attention_are_summed_over_all_ranks_and_fp8_scales_are_of_whole_rows() -> None:
    layout, cut = parse_layout("tp4dp2:dp-attention"), parse_layout("tp4dp2:sharded")
    many = model(8, 4, 8)
    check_training(many, layout, replace(WORK, batch=8, decode_steps=0, seq=8))
    names = ("layers.0.attention.qkv.weight", "layers.0.attention.o.weight", "layers.0.mlp.down.weight")
    assert [summed_over(many, layout, name) for name in names] == [("tp", "dp"), ("tp", "dp"), ("dp",)]
    assert [summed_over(many, cut, name) for name in names] == [("dp",)] * 3
    assert [rows_are_cut(layout, name) for name in names[1:]] == [False, True]
    assert [rows_are_cut(cut, name) for name in names[1:]] == [True, True]


def test_the_drawing_says_what_is_stored_more_than_once() -> None:
    layout = parse_layout("tp4dp2:dp-attention")
    words = partition.caption(SPEC, layout)
    assert "stored 4 times, whole on each rank" in words and "2 replicas" in words
    assert "head group" not in words and "none stored twice" not in words
    assert "stored 4 times" not in partition.caption(SPEC, parse_layout("n1m4:batch"))
    drawing = str(partition.draw("p", SPEC, layout))
    assert drawing.count("<rect") == 1 and "each of 4 ranks: heads 0 to 9, channels 0 to 7" in drawing
