"""Layouts: their notation, their ranks and their axes."""

import itertools
from dataclasses import replace

import pytest
from grid import every_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from headgrid.errors import InvalidLayout
from headgrid.layout.layout import EXCHANGES, OUTPUTS, RESIDUAL_DTYPES, RESIDUALS, Axis, Layout, parse_layout

LAYOUTS = sorted({layout for _, layout in every_pair()}, key=str)
CONTROLS = [replace(layout, exchange="independent") for layout in LAYOUTS if layout.exchange == "gather"]
AXES: tuple[Axis, ...] = ("dp", "pp", "tp_head", "tp_slice", "tp")


def test_every_legal_layout_and_every_control_is_what_its_notation_says() -> None:
    assert len(LAYOUTS) > 200
    wide = [replace(layout, residual_dtype="fp32") for layout in LAYOUTS]
    everything = LAYOUTS + CONTROLS + wide
    for layout in everything:
        assert parse_layout(str(layout)) == layout
    assert len({str(layout) for layout in everything}) == len(everything)


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("tp8pp2", Layout(num_head_groups=8, pp=2)),
        ("n8m1pp2", Layout(num_head_groups=8, pp=2)),
        ("dp16", Layout(dp=16)),
        ("n4m4:batch", Layout(num_head_groups=4, num_dim_slices=4, exchange="batch")),
        (" n4m4:concat+gather ", Layout(num_head_groups=4, num_dim_slices=4, exchange="gather", output="concat")),
        ("m7:gather", Layout(num_dim_slices=7, exchange="gather")),
        ("n2m2:scores", Layout(num_head_groups=2, num_dim_slices=2, exchange="scores")),
        ("tp4:sharded", Layout(num_head_groups=4, residual="sharded")),
        ("tp4:reduce+stationary+replicated+model", Layout(num_head_groups=4)),
        ("dp2:fp32", Layout(dp=2, residual_dtype="fp32")),
        (
            "n2m2:fp32+sharded+sequence",
            Layout(num_head_groups=2, num_dim_slices=2, exchange="sequence", residual="sharded", residual_dtype="fp32"),
        ),
        (
            "m3:batch+gathered+sharded",
            Layout(num_dim_slices=3, exchange="batch", weights="gathered", residual="sharded"),
        ),
        ("dp2pp3n5", Layout(num_head_groups=5, pp=3, dp=2)),
        ("tp1", Layout()),
    ],
)
def test_notation(text: str, layout: Layout) -> None:
    assert parse_layout(text) == layout


BAD = (
    "",
    ":",
    "n4 m4",
    "x4",
    "tp",
    "tp0",
    "tp-2",
    "tp2tp4",
    "n2m2n2:batch",
    "tp2n2",
    "tp2m2:batch",
    "tp4,pp2",
    "4",
    "tp4pp",
)
BAD_OPTIONS = (
    *("tp4:fast", "n2m2:batch+gather", "n2m2:batch+batch", "tp4:reduce+concat", "n2m2:none", "n2m2:Batch"),
    *("n2m2:sequence+scores", "tp4:sharded+replicated", "tp4:fp32+model", "tp4:fp16", "tp4:sharded+sharded"),
)
CONTRADICTORY = (
    *("n2m2", "n2m2:concat", "n2m2:sharded", "tp4:batch", "dp4:gather", "tp4:sequence", "tp4:independent"),
    *("tp1:sharded", "dp4:sharded", "pp2:sharded+fp32", "tp4:concat+sharded", "n2m2:batch+concat+sharded"),
    *("tp4:gathered", "n2m2:gather+gathered", "n2m2:sequence+gathered", "n2m2:scores+gathered"),
    "n2m2:batch+concat+gathered",
)


@pytest.mark.parametrize("text", [*BAD, *BAD_OPTIONS, *CONTRADICTORY])
def test_what_is_not_a_layout_is_refused_with_a_way_out(text: str) -> None:
    with pytest.raises(InvalidLayout) as caught:
        parse_layout(text)
    assert caught.value.exit_code == 64
    block = caught.value.block()
    assert text.strip() in block or text in CONTRADICTORY
    assert "legal" in block or "nothing to exchange" in block


@pytest.mark.parametrize("text", [t for t in CONTRADICTORY if ("sharded" in t and "+" in t) or "gathered" in t])
def test_the_ways_out_of_a_contradiction_are_layouts_or_options_themselves(text: str) -> None:
    with pytest.raises(InvalidLayout) as caught:
        parse_layout(text)
    assert caught.value.legal
    for way_out in caught.value.legal:
        assert way_out == "+replicated" or str(parse_layout(way_out)) == way_out


def test_slices_without_an_exchange_are_told_the_exchanges_by_name() -> None:
    with pytest.raises(InvalidLayout) as caught:
        parse_layout("n3m5")
    assert caught.value.legal == ("n3m5:gather", "n3m5:batch", "n3m5:sequence", "n3m5:scores")
    assert "5 slices" in caught.value.what


@pytest.mark.parametrize("field", ["num_head_groups", "num_dim_slices", "pp", "dp"])
def test_a_degree_below_one_is_refused(field: str) -> None:
    with pytest.raises(InvalidLayout, match=f"{field} = 0"):
        Layout(**{field: 0})


def test_ranks_and_coordinates_are_a_bijection() -> None:
    for layout in LAYOUTS:
        at = [layout.coordinates(rank) for rank in range(layout.ranks)]
        assert len(set(at)) == layout.ranks
        assert [layout.rank(c) for c in at] == list(range(layout.ranks))
        sizes = (layout.dp, layout.pp, layout.num_head_groups, layout.num_dim_slices)
        everywhere = set(itertools.product(*map(range, sizes)))
        assert {(c.dp, c.pp, c.head_group, c.slice) for c in at} == everywhere


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_that_does_not_exist_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} is not one of 8"):
        parse_layout("n2m2dp2:batch").coordinates(rank)


def test_slices_are_neighbours_then_head_groups_then_stages_then_replicas() -> None:
    layout = parse_layout("n2m3pp2dp2:batch")
    assert layout.axis_ranks("tp_slice")[:3] == ((0, 1, 2), (3, 4, 5), (6, 7, 8))
    assert layout.axis_ranks("tp_head")[:4] == ((0, 3), (1, 4), (2, 5), (6, 9))
    assert layout.axis_ranks("tp")[:2] == ((0, 1, 2, 3, 4, 5), (6, 7, 8, 9, 10, 11))
    assert layout.axis_ranks("pp")[0] == (0, 6)
    assert layout.axis_ranks("dp")[0] == (0, 12)


def test_groups_of_every_axis_hold_every_rank_once_and_differ_in_that_axis_alone() -> None:
    for layout, axis in itertools.product(LAYOUTS, AXES):
        groups = layout.axis_ranks(axis)
        assert sorted(itertools.chain(*groups)) == list(range(layout.ranks))
        for group in groups:
            _assert_one_axis(layout, axis, group)


def _assert_one_axis(layout: Layout, axis: Axis, group: tuple[int, ...]) -> None:
    at = [layout.coordinates(rank) for rank in group]
    along = {
        "dp": [c.dp for c in at],
        "pp": [c.pp for c in at],
        "tp_head": [c.head_group for c in at],
        "tp_slice": [c.slice for c in at],
        "tp": [layout.tp_index(c) for c in at],
    }
    size = {"tp_head": layout.num_head_groups, "tp_slice": layout.num_dim_slices, "tp": layout.tp}.get(axis)
    size = size if size is not None else getattr(layout, axis)
    assert along[axis] == list(range(size)), "in axis order"
    moving = {"tp": {"tp", "tp_head", "tp_slice"}, "tp_head": {"tp", "tp_head"}, "tp_slice": {"tp", "tp_slice"}}
    for other in set(along) - moving.get(axis, {axis}):
        assert len(set(along[other])) == 1


degrees = st.integers(1, 64)
OPTIONS = (EXCHANGES, OUTPUTS, RESIDUALS, RESIDUAL_DTYPES)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.tuples(degrees, degrees, degrees, degrees), st.tuples(*map(st.sampled_from, OPTIONS)))
def test_notation_and_ranks_of_any_size(sizes: tuple[int, ...], options: tuple[str, ...]) -> None:
    (n, m, pp, dp), (exchange, output, residual, dtype) = sizes, options
    layout = Layout(
        num_head_groups=n,
        num_dim_slices=m,
        pp=pp,
        dp=dp,
        exchange=exchange if m > 1 else "none",  # type: ignore[arg-type]
        output=output,  # type: ignore[arg-type]
        residual=residual if n * m > 1 and output == "reduce" else "replicated",  # type: ignore[arg-type]
        residual_dtype=dtype,  # type: ignore[arg-type]
    )
    assert parse_layout(str(layout)) == layout
    for rank in {0, layout.ranks // 3, layout.ranks - 1}:
        assert layout.rank(layout.coordinates(rank)) == rank
