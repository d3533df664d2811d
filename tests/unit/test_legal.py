"""Refusals say what, the numbers and the way out; everything else is legal, and listed."""

import itertools
from dataclasses import replace

import pytest
from grid import EVERY_MODEL, MAX_RANKS, legal_pairs, model

from headgrid.errors import InvalidInput, InvalidLayout
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.legal import check, head_group_counts, is_legal, legal_layouts
from headgrid.spec.model import ModelSpec, find_model
from headgrid.spec.workload import Workload

models = pytest.mark.parametrize(("name", "spec"), EVERY_MODEL, ids=[name for name, _ in EVERY_MODEL])


def every_layout(ranks: int) -> list[Layout]:
    """All self-consistent layouts of this many ranks, legal for a model or not."""
    found: list[Layout] = []
    for n, m, pp in itertools.product(range(1, ranks + 1), repeat=3):
        if ranks % (n * m * pp) == 0:
            for exchange, output in itertools.product(("none", "gather", "batch"), ("reduce", "concat")):
                if (m > 1) == (exchange != "none") and (n * m > 1 or output == "reduce"):
                    dp = ranks // (n * m * pp)
                    options = {"exchange": exchange, "output": output}
                    found.append(Layout(num_head_groups=n, num_dim_slices=m, pp=pp, dp=dp, **options))  # type: ignore
                    if (exchange, output) == ("batch", "reduce"):
                        found.append(replace(found[-1], weights="gathered"))
    return found


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
            Workload(batch=layout.dp * layout.num_dim_slices, seq=spec.max_positions - 1, decode_steps=1),
            layout.ranks,
        )


def test_any_number_of_ranks_can_share_a_layer() -> None:
    """P = 7 of the model with 28 heads and 4 KV heads, and of one whose single KV head has 32 channels up to P = 16."""
    assert parse_layout("n1m5:gather") in legal_layouts(model(28, 4, 10), 5)
    for ranks in range(2, MAX_RANKS + 1):
        assert any(layout.tp == ranks for layout in legal_layouts(model(5, 1, 32), ranks))


def test_head_groups_divide_the_kv_heads() -> None:
    assert head_group_counts(model(24, 12, 4)) == (1, 2, 3, 4, 6, 12)


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
    assert caught.value.command == f"headgrid layouts --model {spec.name} --ranks {ranks}"
    assert len(block.splitlines()) <= 12


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
        ({"head_dim": 7}, ("even head_dim", "7")),
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
    [({"batch": 0}, ("batch", "0")), ({"seq": "9"}, ("seq", "'9'")), ({"dtype": "int8"}, ("int8", "bfloat16"))],
)
def test_a_workload_that_cannot_be_run_is_refused(change: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput) as caught:
        replace(Workload(batch=1, seq=1, decode_steps=1), **change)
    assert all(word in caught.value.block() for word in words)
    assert caught.value.exit_code == 64


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidInput) as caught:
        find_model("sead")
    assert "'sead'" in caught.value.block()
    assert {"seed", "seed-small"} <= set(caught.value.legal)
    assert find_model("seed").num_heads == 32
