"""Refusals say what, the numbers and the way out; everything else is legal, and listed."""

import itertools
from dataclasses import replace

import pytest
from grid import EVERY_MODEL, MAX_RANKS, legal_pairs, model

from headgrid.errors import InvalidInput, InvalidLayout
from headgrid.layout.layout import EXCHANGES, OUTPUTS, Layout, parse_layout
from headgrid.layout.legal import check, is_legal, legal_layouts
from headgrid.spec.model import ModelSpec, find_model
from headgrid.spec.workload import Workload

models = pytest.mark.parametrize(("name", "spec"), EVERY_MODEL, ids=[name for name, _ in EVERY_MODEL])


def every_layout(ranks: int) -> list[Layout]:
    """All self-consistent layouts of this many ranks, legal for a model or not."""
    found: list[Layout] = []
    for n, m, pp in itertools.product(range(1, ranks + 1), repeat=3):
        if ranks % (n * m * pp) == 0:
            for exchange, output in itertools.product(("none", *EXCHANGES), OUTPUTS):
                if (m > 1) == (exchange != "none") and (n * m > 1 or output == "reduce"):
                    dp = ranks // (n * m * pp)
                    options = {"exchange": exchange, "output": output}
                    found.append(Layout(num_head_groups=n, num_dim_slices=m, pp=pp, dp=dp, **options))  # type: ignore
                    if (exchange, output) == ("batch", "reduce"):
                        found.append(replace(found[-1], weights="gathered"))
    return found + [replace(lay, residual="sharded") for lay in found if lay.tp > 1 and lay.output == "reduce"]


def accepted(spec: ModelSpec, layout: Layout) -> bool:
    try:
        check(spec, layout)
    except InvalidLayout:
        return False
    return True


@models
def test_the_list_of_legal_layouts_is_complete_and_holds_nothing_else(name: str, spec: ModelSpec) -> None:
    for ranks in range(1, MAX_RANKS + 1):
        listed = legal_layouts(spec, ranks)
        assert len(set(listed)) == len(listed)
        assert set(listed) == {layout for layout in every_layout(ranks) if is_legal(spec, layout)}


@models
def test_check_accepts_exactly_what_is_legal(name: str, spec: ModelSpec) -> None:
    for ranks in (1, 4, 6, 7, 12, 16):
        for layout in every_layout(ranks):
            assert accepted(spec, layout) == is_legal(spec, layout), str(layout)


@models
def test_every_legal_layout_has_a_workload_that_it_runs(name: str, spec: ModelSpec) -> None:
    for layout in legal_pairs(spec)[::5]:
        check(
            spec,
            layout,
            Workload(
                batch=layout.dp * layout.num_dim_slices,
                seq=spec.max_positions - spec.is_causal,
                decode_steps=int(spec.is_causal),
            ),
            layout.ranks,
        )


def test_any_number_of_ranks_can_share_a_layer() -> None:
    """P = 7 of the model with 28 heads and 4 KV heads, and of one whose single KV head has 32 channels up to P = 16."""
    assert parse_layout("n1m5:gather") in legal_layouts(model(28, 4, 10), 5)
    for ranks in range(2, MAX_RANKS + 1):
        assert any(layout.tp == ranks for layout in legal_layouts(model(5, 1, 32), ranks))


def test_head_groups_divide_the_kv_heads() -> None:
    listed = [layout for ranks in range(1, 13) for layout in legal_layouts(model(24, 12, 4), ranks)]
    assert {layout.num_head_groups for layout in listed if layout.num_dim_slices > 1} == {1, 2, 3, 4, 6}
    assert {layout.num_head_groups for layout in listed} == {1, 2, 3, 4, 6, 12}


def test_every_option_is_listed_where_it_goes() -> None:
    listed = {str(layout) for layout in legal_layouts(model(8, 4, 8), 4)}
    both = {f"n2m2:{exchange}{more}" for exchange in EXCHANGES for more in ("", "+sharded", "+concat")}
    both |= {"n2m2:batch+gathered", "n2m2:batch+gathered+sharded"}
    assert {text for text in listed if text.startswith("n2m2:")} == both
    assert {text for text in listed if text.startswith("tp4")} == {"tp4", "tp4:sharded", "tp4:concat"}
    assert "tp2dp2:sharded" in listed
    assert not {text for text in listed if text.startswith(("pp", "dp")) and "sharded" in text}, "nothing to share"


def test_the_list_begins_with_what_most_people_want() -> None:
    """Row-parallel outputs before gathered ones, whole hidden states before shares of them, sharing a layer first."""
    listed = legal_layouts(model(8, 4, 8), 4)
    order = [(lay.output, lay.residual) for lay in listed]
    first, last = order.index(("reduce", "sharded")), order.index(("concat", "replicated"))
    assert set(order[:first]) == {("reduce", "replicated")}
    assert set(order[first:last]) == {("reduce", "sharded")}
    assert set(order[last:]) == {("concat", "replicated")}
    assert str(listed[0]) == "tp4"


BIDIRECTIONAL = model(8, 8, 8, is_causal=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decode_steps": 1}, ("bidirectional", "decode_steps 1, chunk_positions 0")),
        ({"chunk_positions": 3}, ("bidirectional", "decode_steps 0, chunk_positions 3")),
    ],
)
def test_a_bidirectional_model_is_neither_decoded_nor_prefilled_in_chunks(change: dict, words: tuple) -> None:
    whole = Workload(batch=3, seq=9, decode_steps=0, prompt_lengths=(2, 9, 4))
    with pytest.raises(InvalidLayout) as caught:
        check(BIDIRECTIONAL, parse_layout("n2m2:batch"), replace(whole, **change))
    assert all(word in caught.value.block() for word in (*words, BIDIRECTIONAL.name))
    assert caught.value.exit_code == 64
    check(BIDIRECTIONAL, parse_layout("n2m2:batch"), whole)
    check(replace(BIDIRECTIONAL, is_causal=True), parse_layout("n2m2:batch"), replace(whole, **change))


def test_gathered_stages_need_a_sequence_for_every_slice() -> None:
    layout, work = parse_layout("n2m2pp2dp2:batch+gathered"), Workload(batch=3, seq=4, decode_steps=1)
    with pytest.raises(InvalidLayout) as caught:
        check(model(8, 8, 8), layout, work)
    assert all(word in caught.value.block() for word in ("2 x 2 slices", "3 sequences", "--batch 4"))
    check(model(8, 8, 8), layout, replace(work, batch=4))
    check(model(8, 8, 8), parse_layout("n2m2pp2:batch+sharded"), replace(work, batch=1))


TOO_SMALL = replace(model(8, 8, 8), mlp_hidden_size=5, vocab_size=40, hidden_size=64)
REFUSALS = [
    # model, layout, ranks, what the refusal must name
    (model(28, 4, 10), "tp8", 8, ("8 head groups", "4 KV heads", "28 heads")),
    (model(28, 4, 10), "n8m2:batch", 16, ("8 head groups", "4 KV heads", "4 % 8 = 4")),
    (model(12, 3, 10), "n2m2:batch", 4, ("2 head groups", "3 KV heads", "3 % 2 = 1")),
    (model(8, 2, 8), "tp3", 3, ("3 head groups", "2 KV heads")),
    (model(8, 8, 8), "n1m5:gather", 5, ("5 slices of 8 channels", "pair")),
    (model(8, 8, 7, positions="learned"), "n1m4:gather", 4, ("4 slices of 7 channels",)),
    (model(8, 8, 8), "tp2pp4", 8, ("4 stages for 3 layers",)),
    (TOO_SMALL, "tp8", 8, ("8 ranks share 5 (MLP units)",)),
    (replace(TOO_SMALL, mlp_hidden_size=64, vocab_size=7), "tp8", 8, ("8 ranks share 7 (vocabulary)",)),
    (replace(TOO_SMALL, mlp_hidden_size=64, hidden_size=6), "tp8:concat", 8, ("8 ranks share 6 output columns",)),
    (model(8, 8, 8), "n2m2pp2:batch", 16, ("needs 8 ranks, not 16", "dp 1 x pp 2 x n 2 x m 2 = 8")),
]


@pytest.mark.parametrize(("spec", "text", "ranks", "words"), REFUSALS, ids=[f"{r[0].name}-{r[1]}" for r in REFUSALS])
def test_a_refusal_names_the_numbers_and_the_legal_alternatives(
    spec: ModelSpec, text: str, ranks: int, words: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidLayout) as caught:
        check(spec, parse_layout(text), ranks=ranks)
    block = caught.value.block()
    assert all(word in block for word in (*words, text, spec.name)), block
    assert caught.value.exit_code == 64
    assert caught.value.legal == tuple(str(layout) for layout in legal_layouts(spec, ranks)) != ()
    for alternative in caught.value.legal:
        check(spec, parse_layout(alternative), ranks=ranks)
    assert caught.value.command == "", "only a model with a name can be asked for by it"
    assert len(block.splitlines()) <= 12
    with pytest.raises(InvalidLayout) as caught:
        check(replace(spec, name="seed"), parse_layout(text), ranks=ranks)
    assert caught.value.command == f"headgrid layouts --model seed --ranks {ranks}"


def test_more_replicas_than_sequences_are_refused_with_a_batch_that_works() -> None:
    with pytest.raises(InvalidLayout) as caught:
        check(model(8, 8, 8), parse_layout("dp4"), Workload(batch=3, seq=4, decode_steps=1))
    assert all(word in caught.value.block() for word in ("dp4", "4 replicas", "3 sequences", "--batch 4"))
    assert caught.value.exit_code == 64
    check(model(8, 8, 8), parse_layout("dp4"), Workload(batch=4, seq=4, decode_steps=1))


def test_more_positions_than_the_model_has_are_refused_with_a_length_that_works() -> None:
    with pytest.raises(InvalidLayout) as caught:
        check(model(8, 8, 8), parse_layout("tp2"), Workload(batch=3, seq=9, decode_steps=3))
    assert all(word in caught.value.block() for word in ("9 + 3", "11", "--seq 8"))
    assert caught.value.exit_code == 64
    check(model(8, 8, 8), parse_layout("tp2"), Workload(batch=3, seq=8, decode_steps=3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 10, "num_kv_heads": 4}, ("10 query heads", "4 KV heads", "10 % 4 = 2")),
        ({"head_dim": 7}, ("pairs of channels", "7 of head_dim 7")),
        ({"rotary_dim": 3}, ("pairs of channels", "3 of head_dim 8")),
        ({"rotary_dim": 10}, ("pairs of channels", "10 of head_dim 8")),
        ({"rotary_dim": -2}, ("rotary_dim", "-2")),
        ({"sliding_window": 2.5}, ("sliding_window", "2.5")),
        ({"attn_logit_softcapping": float("inf")}, ("attn_logit_softcapping", "inf")),
        ({"attn_logit_softcapping": float("nan")}, ("attn_logit_softcapping", "nan")),
        ({"sliding_window": -1}, ("sliding_window", "-1", "0 for none")),
        ({"full_attention_layers": (-2,)}, ("full_attention_layers", "-2", "layers")),
        ({"attn_logit_softcapping": -30.0}, ("attn_logit_softcapping", "-30.0", "0 for none")),
        ({"attention_scale": 0.0}, ("attention_scale", "0.0")),
        ({"attention_scale": float("inf")}, ("attention_scale", "inf")),
        ({"attention_scale": float("nan")}, ("attention_scale", "nan")),
        ({"sliding_window": 4, "is_causal": False}, ("sliding window", "bidirectional")),
        ({"num_layers": 0}, ("num_layers", "0")),
        ({"vocab_size": -3}, ("vocab_size", "-3")),
        ({"hidden_size": 2.0}, ("hidden_size", "2.0")),
        ({"num_heads": True}, ("num_heads", "True")),
    ],
)
def test_a_model_that_no_transformer_has_is_refused(change: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput) as caught:
        replace(model(8, 8, 8), **change)
    assert all(word in caught.value.block() for word in words)
    assert caught.value.exit_code == 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": 0}, ("batch", "0")),
        ({"seq": "9"}, ("seq", "'9'")),
        ({"dtype": "int8"}, ("int8", "bfloat16")),
        ({"decode_steps": -1}, ("decode_steps", "-1", "from 0 on")),
        ({"decode_steps": True}, ("decode_steps", "True")),
        ({"chunk_positions": -4}, ("chunk_positions", "-4", "from 0 on")),
        ({"chunk_tokens": 0}, ("chunk_tokens", "0", "positive")),
        ({"prompt_lengths": (1, 1)}, ("2 prompt lengths", "1 sequences")),
        ({"prompt_lengths": (2,)}, ("1 to 1 tokens", "(2,)")),
        ({"prompt_lengths": (0,)}, ("1 to 1 tokens", "(0,)")),
    ],
)
def test_a_workload_that_cannot_be_run_is_refused(change: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput) as caught:
        replace(Workload(batch=1, seq=1, decode_steps=1), **change)
    assert all(word in caught.value.block() for word in words)
    assert caught.value.exit_code == 64


def test_what_a_workload_says_of_its_prompts() -> None:
    even = Workload(batch=3, seq=5, decode_steps=0)
    assert even.lengths == (5, 5, 5)
    assert even.cache_positions == 5
    ragged = Workload(batch=3, seq=5, decode_steps=2, prompt_lengths=[1, 5, 3])  # type: ignore[arg-type]  # from JSON
    assert ragged.lengths == ragged.prompt_lengths == (1, 5, 3)
    assert ragged.cache_positions == 7
    assert hash(ragged) != hash(even)


def test_what_a_model_says_of_its_attention() -> None:
    plain = model(8, 8, 8)
    assert (plain.scale, plain.rotated_dim, plain.window(0)) == (pytest.approx(8**-0.5), 8, 0)
    assert replace(plain, attention_scale=0.25).scale == 0.25
    assert replace(plain, rotary_dim=4).rotated_dim == 4
    assert replace(plain, positions="learned").rotated_dim == 0
    with pytest.raises(InvalidInput, match="rotary_dim 4 needs rotary positions"):
        replace(plain, positions="learned", rotary_dim=4)
    alternating = replace(plain, sliding_window=3, full_attention_layers=(1,))
    assert [alternating.window(layer) for layer in range(5)] == [3, 0, 3, 3, 3]
    assert [replace(plain, sliding_window=3).window(layer) for layer in range(3)] == [3, 3, 3]


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidInput) as caught:
        find_model("sead")
    assert "'sead'" in caught.value.block()
    assert {"seed", "seed-small"} <= set(caught.value.legal)
    assert find_model("seed").num_heads == 32
