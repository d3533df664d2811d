"""Who owns what: all ranks that share a layer hold every parameter exactly once, and what they hold fits together."""

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from grid import EVERY_MODEL, cuts, every_cut, legal_pairs, model, tp_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from headgrid.layout.layout import EXCHANGES, Layout, parse_layout
from headgrid.layout.shards import Shard, head_shard, head_shards, parameters, partition, qk_channels, stage_layers
from headgrid.layout.span import Spans, balanced, indices
from headgrid.spec.model import ModelSpec

COPIED = (".norm.weight", ".norm.bias", "positions.weight", "down.bias")  # small: every rank of a stage has them whole
models = pytest.mark.parametrize(("name", "spec"), EVERY_MODEL, ids=[name for name, _ in EVERY_MODEL])


def painted(shards: list[Shard]) -> np.ndarray:
    """How many of the shards hold each element of their tensor."""
    count = np.zeros(shards[0].shape, dtype=int)
    for shard in shards:
        rows = indices(shard.rows)
        count[np.ix_(rows, indices(shard.cols)) if shard.cols is not None else rows] += 1
    return count


def expected_copies(spec: ModelSpec, layout: Layout, name: str) -> int:
    part = name.split(".")[-2]
    if part in ("q_norm", "k_norm"):  # every head of a rank is normed with its slice of the one weight
        return layout.num_head_groups
    if part in ("k", "v"):
        return max(1, layout.num_head_groups // spec.num_kv_heads)
    return layout.tp if name.endswith(COPIED) or (name.endswith("o.bias") and layout.output == "reduce") else 1


def assert_covered(spec: ModelSpec, layout: Layout) -> None:
    """Of one group of ranks that share layers: each element of each tensor as often as it should be."""
    for group in tp_ranks(layout):
        owned = [parameters(spec, layout, rank) for rank in group]
        assert len({tuple(shards) for shards in owned}) == 1, "the same tensors, in the same order"
        for name in owned[0]:
            count = painted([shards[name] for shards in owned])
            assert np.all(count == expected_copies(spec, layout, name)), (str(layout), name)


@models
def test_ranks_that_share_a_layer_hold_every_element_of_it_once(name: str, spec: ModelSpec) -> None:
    for layout in cuts(spec):
        if layout.pp == 1 or layout.ranks <= 6:  # stages change which layers a group holds, not how it is cut
            assert_covered(spec, layout)


@models
def test_what_a_rank_owns_depends_on_the_cut_and_the_output_alone(name: str, spec: ModelSpec) -> None:
    """So that the tests of this file need to look at one layout of each cut only."""
    for layout in legal_pairs(spec)[::7]:
        like = next(
            lay
            for lay in cuts(spec)
            if lay.axis_ranks("tp") == layout.axis_ranks("tp")
            and (lay.num_dim_slices, lay.pp, lay.output) == (layout.num_dim_slices, layout.pp, layout.output)
        )
        assert parameters(spec, layout, layout.ranks - 1) == parameters(spec, like, layout.ranks - 1)


@models
def test_stages_hold_every_tensor_once_and_the_embedding_again_where_it_is_the_head(name: str, spec: ModelSpec) -> None:
    whole = set(parameters(spec, Layout(), 0))
    for layout in cuts(spec):
        holders = Counter(tensor for rank in layout.axis_ranks("pp")[0] for tensor in parameters(spec, layout, rank))
        assert set(holders) == whole
        twice = {tensor for tensor, count in holders.items() if count > 1}
        assert twice == ({"embedding.weight"} if spec.tied_embeddings and layout.pp > 1 else set())


@models
def test_a_single_rank_holds_all_parameters_of_the_model(name: str, spec: ModelSpec) -> None:
    assert sum(shard.num_elements for shard in parameters(spec, Layout(), 0).values()) == spec.num_parameters
    assert all(shard.local_shape == shard.shape for shard in parameters(spec, Layout(), 0).values())


def test_kv_heads_are_copied_only_by_tensor_parallelism_beyond_the_kv_heads() -> None:
    copying = set()
    for spec, layout in every_cut():
        held = Counter(head for own in head_shards(spec, layout) for head in indices((own.kv_heads,)))
        slices = layout.num_dim_slices
        assert len(set(held.values())) == 1, "all KV heads alike"
        if held[0] > slices:
            copying.add((spec.name, str(layout)))
            assert slices == 1
            assert layout.num_head_groups > spec.num_kv_heads
    assert {("H16K8d4", "tp16"), ("H14K2d8", "tp14")} <= copying


def test_every_query_head_is_with_the_kv_head_that_it_attends_to() -> None:
    """By number, and by local position: head h of a rank uses its KV head h // (local heads / local KV heads)."""
    for spec, layout in every_cut():
        group = spec.num_heads // spec.num_kv_heads
        for own in head_shards(spec, layout):
            heads, kv_heads = indices((own.heads,)), indices((own.kv_heads,))
            assert len(heads) % len(kv_heads) == 0
            local = len(heads) // len(kv_heads)
            assert [head // group for head in heads] == [kv_heads[h // local] for h in range(len(heads))]


def test_slices_of_a_group_cover_every_channel_of_a_head_once() -> None:
    for spec, layout in every_cut():
        for i in range(layout.num_head_groups):
            own = [head_shard(spec, layout, i, j) for j in range(layout.num_dim_slices)]
            assert sorted(c for o in own for c in indices(o.qk_channels)) == list(range(spec.head_dim))
            assert [c for o in own for c in indices((o.v_channels,))] == list(range(spec.head_dim))
            assert all(o.qk_width == len(indices(o.qk_channels)) > 0 < len(o.v_channels) for o in own)


def test_a_rope_pair_is_never_torn_and_a_slice_is_ordered_like_a_small_head() -> None:
    for head_dim, slices in itertools.product(range(2, 66, 2), range(1, 33)):
        if slices <= head_dim // 2:
            half = head_dim // 2
            for spans in qk_channels(model(4, 4, head_dim), slices):
                channels = indices(spans)
                first, second = channels[: len(channels) // 2], channels[len(channels) // 2 :]
                assert first
                assert second == [c + half for c in first]
                assert max(first) < half


def partly_rotary() -> Iterator[tuple[int, int, tuple[Spans, ...]]]:
    """Head dim, channels that turn, and the slices."""
    for head_dim, slices in itertools.product(range(2, 34), range(1, 17)):
        if slices <= head_dim // 2:
            for turned in range(2, head_dim + 1, 2):
                yield head_dim, turned, qk_channels(model(4, 4, head_dim, rotary_dim=turned), slices)


def test_partial_rotary_slices_hold_whole_pairs_then_single_channels_and_every_channel_once() -> None:
    for head_dim, turned, slices in partly_rotary():
        assert sorted(c for spans in slices for c in indices(spans)) == list(range(head_dim))
        for spans in slices:
            channels = indices(spans)
            turning = [c for c in channels if c < turned]
            first, second = turning[: len(turning) // 2], turning[len(turning) // 2 :]
            assert second == [c + turned // 2 for c in first], "whole pairs, first halves first"
            assert channels[: len(turning)] == turning, "channels that do not turn follow"
            assert channels[len(turning) :] == sorted(channels[len(turning) :])


def test_partial_rotary_slices_are_never_empty_and_as_even_as_pairs_allow() -> None:
    for head_dim, turned, slices in partly_rotary():
        widths = [len(indices(spans)) for spans in slices]
        assert min(widths) > 0, (head_dim, turned, len(slices))
        assert max(widths) - min(widths) <= 2
    assert [len(indices(spans)) for spans in qk_channels(model(4, 4, 8, rotary_dim=6), 4)] == [2, 2, 3, 1]
    in_order = zip(balanced(3, 4), balanced(2, 4), strict=True)  # control: longer spans first would leave a slice empty
    assert [2 * len(pairs) + len(still) for pairs, still in in_order] == [3, 3, 2, 0]


def test_head_norms_are_cut_like_the_channels_that_they_scale() -> None:
    """Rows of W_Q: channel by channel what the slice of the norm's weight multiplies, for each head."""
    normed = [(spec, layout) for spec, layout in every_cut() if spec.qk_norm]
    assert len(normed) > 50
    for spec, layout in normed:
        for rank in range(layout.tp):
            shards = parameters(spec, layout, rank)
            for part in "qk":
                norm, matrix = (shards[f"layers.0.attention.{part}{kind}.weight"] for kind in ("_norm", ""))
                channels, rows = indices(norm.rows), indices(matrix.rows)
                assert [row % spec.head_dim for row in rows] == channels * (len(rows) // len(channels))
                assert norm.shape == (spec.head_dim,)
                assert norm.cols is None


def test_learned_positions_leave_slices_contiguous() -> None:
    for head_dim, slices in itertools.product(range(1, 20), range(1, 10)):
        if slices <= max(1, head_dim // 2):
            cut = qk_channels(model(4, 4, head_dim, positions="learned"), slices)
            assert cut == tuple((span,) for span in balanced(head_dim, slices))


def test_gathered_heads_arrive_in_the_order_in_which_concat_reads_them() -> None:
    """With the output `concat` rank r's part of the gathered heads is what its V channels are multiplied with."""
    for spec, layout in every_cut():
        if layout.output != "concat":
            continue
        d, owners = spec.head_dim, head_shards(spec, layout)
        order = [h * d + c for o in owners for h in indices((o.heads,)) for c in indices((o.v_channels,))]
        shard = parameters(spec, layout, 0)["layers.0.attention.o.weight"]
        assert shard.cols is not None
        assert indices(shard.cols) == order


def test_output_columns_of_reduce_follow_the_ranks_own_heads_and_channels() -> None:
    shard = parameters(model(4, 2, 6), parse_layout("n2m2:batch"), 3)["layers.1.attention.o.weight"]
    assert shard.cols is not None
    assert indices(shard.cols) == [2 * 6 + 3, 2 * 6 + 4, 2 * 6 + 5, 3 * 6 + 3, 3 * 6 + 4, 3 * 6 + 5]


def test_the_uneven_example_of_28_heads_on_8_ranks() -> None:
    """n = 4, m = 2 of a head dim of 10: five pairs cut 3 + 2, so that slices hold 6 and 4 channels of Q and K."""
    cells = partition(model(28, 4, 10), parse_layout("n4m2:gather"))
    assert [len(cell.heads) for cell in cells] == [7] * 8
    assert [len(cell.kv_heads) for cell in cells] == [1] * 8
    assert [indices(cells[j].channels) for j in (0, 1)] == [[0, 1, 2, 5, 6, 7], [3, 4, 8, 9]]


def test_partition_draws_what_the_shards_own() -> None:
    for spec, layout in every_cut():
        cells = partition(spec, layout)
        assert [cell.rank for cell in cells] == list(range(layout.ranks))
        for cell in cells:
            own = head_shard(spec, layout, cell.head_group, cell.slice)
            assert (cell.heads, cell.kv_heads, cell.channels) == (own.heads, own.kv_heads, own.qk_channels)
            assert cell.layers == stage_layers(spec, layout)[cell.pp]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[ModelSpec, Layout]:
    n, m = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    kv_heads, group = n * draw(st.integers(1, 3)), draw(st.integers(1, 4))
    rotary = draw(st.booleans())
    head_dim = 2 * draw(st.integers(m, m + 9))
    spec = model(
        kv_heads * group,
        kv_heads,
        head_dim,
        positions="rotary" if rotary else "learned",
        mlp_hidden_size=draw(st.integers(n * m, 90)),
        vocab_size=draw(st.integers(n * m, 90)),
        hidden_size=draw(st.integers(n * m, 50)),
        linear_bias=draw(st.sampled_from(((), ("qkv", "o", "mlp")))),
        rotary_dim=2 * draw(st.integers(0, head_dim // 2)) if rotary else 0,
        qk_norm=draw(st.booleans()),
        num_layers=1,
    )
    exchange = draw(st.sampled_from(EXCHANGES)) if m > 1 else "none"
    output = draw(st.sampled_from(("reduce", "concat")))
    return spec, Layout(num_head_groups=n, num_dim_slices=m, exchange=exchange, output=output)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(pairs())
def test_shards_of_any_shape_cover_every_element_once(pair: tuple[ModelSpec, Layout]) -> None:
    assert_covered(*pair)
