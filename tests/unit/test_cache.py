"""What ranks store: the cache and the parameters once over all of them, but for what is said to be copied."""

import itertools
from dataclasses import replace

import pytest
from grid import EVERY_MODEL, legal_pairs, model

from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.memory import cache_shape, parameters_bytes, predict
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

models = pytest.mark.parametrize(("name", "spec"), EVERY_MODEL, ids=[name for name, _ in EVERY_MODEL])
ONCE = ("batch", "sequence", "scores")
SPEC = model(16, 8, 32, num_layers=4, hidden_size=64, mlp_hidden_size=128, vocab_size=256, max_positions=64)
WORK = Workload(batch=8, seq=16, decode_steps=4, dtype="float16")


def whole_cache(spec: ModelSpec, work: Workload) -> int:
    """Elements of keys and values of all layers."""
    return 2 * spec.num_layers * work.batch * work.cache_positions * spec.num_kv_heads * spec.head_dim


@models
def test_exchanges_that_say_so_keep_the_cache_once_over_all_ranks(name: str, spec: ModelSpec) -> None:
    """Whatever divides: sixteen sequences, seven positions, and heads of any width."""
    work = Workload(batch=16, seq=5, decode_steps=2)
    checked = set()
    for layout in legal_pairs(spec)[::3]:
        elements = sum(cache_shape(spec, layout, work, rank).elements for rank in range(layout.ranks))
        if layout.exchange in ONCE:
            checked.add(layout.exchange)
            assert elements == whole_cache(spec, work), str(layout)
        elif layout.exchange == "gather":
            assert 2 * elements == (layout.num_dim_slices + 1) * whole_cache(spec, work), "keys on every slice"
        elif layout.num_head_groups <= spec.num_kv_heads:
            assert elements == whole_cache(spec, work), str(layout)
        else:
            assert elements * spec.num_kv_heads == whole_cache(spec, work) * layout.num_head_groups, "heads are copied"
    assert checked == (set(ONCE) if any(layout.num_dim_slices > 1 for layout in legal_pairs(spec)) else set())


@pytest.mark.parametrize(
    ("exchange", "keys", "values"),
    [
        ("gather", (4, 3, 7, 4, 32), (4, 3, 7, 4, 8)),
        ("batch", (4, 1, 7, 4, 32), (4, 1, 7, 4, 32)),
        ("sequence", (4, 3, 2, 4, 32), (4, 3, 2, 4, 32)),
        ("scores", (4, 3, 7, 4, 8), (4, 3, 7, 4, 8)),
    ],
)
def test_shapes_of_the_cache(exchange: str, keys: tuple, values: tuple) -> None:
    """Slice 1 of 4 of two head groups: three sequences of five positions and room for two."""
    work = Workload(batch=3, seq=5, decode_steps=2)
    shape = cache_shape(SPEC, parse_layout(f"n2m4:{exchange}"), work, 1)
    assert (shape.keys, shape.values) == (keys, values)


@pytest.mark.parametrize(("rank", "positions"), [(0, 2), (1, 2), (2, 2), (3, 1)])
def test_positions_of_sequence_go_round(rank: int, positions: int) -> None:
    shape = cache_shape(SPEC, parse_layout("n2m4:sequence"), Workload(batch=3, seq=5, decode_steps=2), rank)
    assert shape.keys[2] == shape.values[2] == positions


@pytest.mark.parametrize("exchange", ONCE)
def test_even_shares_of_the_cache_are_equal(exchange: str) -> None:
    layout = parse_layout(f"n2m2:{exchange}")
    sizes = {predict(SPEC, layout, WORK, rank).kv_cache_bytes for rank in range(4)}
    assert sizes == {whole_cache(SPEC, WORK) * 2 // 4}


@models
def test_parameters_are_kept_once_but_for_small_ones(name: str, spec: ModelSpec) -> None:
    """Norms, biases that are added once, learned positions, norms of heads; and tied tables with stages."""
    d, hidden = spec.head_dim, spec.hidden_size
    for layout in legal_pairs(spec)[::3]:
        if layout.num_head_groups > spec.num_kv_heads or (spec.tied_embeddings and layout.pp > 1):
            continue
        stored = sum(parameters_bytes(spec, layout, rank, 1) for rank in range(layout.ranks)) // layout.dp
        copied = (4 * spec.num_layers + 2) * hidden + (spec.positions == "learned") * spec.max_positions * hidden
        if spec.linear_bias:
            copied += spec.num_layers * hidden * (2 if layout.output == "reduce" else 1)
        heads = 2 * d * spec.num_layers * (layout.num_head_groups - 1) if spec.qk_norm else 0
        assert stored == spec.num_parameters + copied * (layout.tp - 1) + heads, str(layout)


def test_a_cache_has_no_room_for_steps_that_are_not_decoded() -> None:
    shape = cache_shape(SPEC, Layout(), replace(WORK, decode_steps=0), 0)
    assert shape.keys == (4, 8, 16, 8, 32)


VARIANTS = (
    Workload(batch=16, seq=9, decode_steps=2),
    Workload(batch=16, seq=9, decode_steps=2, chunk_positions=4, dtype="float16", prompt_lengths=(1, 9, 4, 5) * 4),
)


@models
def test_the_largest_buffer_is_part_of_the_peak(name: str, spec: ModelSpec) -> None:
    for layout, work in itertools.product(legal_pairs(spec)[::9], VARIANTS):
        for rank in {0, layout.ranks - 1}:
            found = predict(spec, layout, work, rank)
            assert found.communication_buffer_bytes <= found.activations_peak_bytes, (str(layout), rank)
            assert (found.communication_buffer_bytes > 0) == (layout.tp * layout.pp > 1)


def test_a_sharded_residual_and_shorter_calls_take_less_and_an_fp32_residual_takes_more() -> None:
    def peak(text: str, **changes: object) -> int:
        work = replace(WORK, **changes)  # type: ignore[arg-type]
        return predict(SPEC, parse_layout(text), work, 1).activations_peak_bytes

    assert peak("tp4:sharded") < peak("tp4") < peak("tp4:fp32")
    assert peak("n2m2:batch+sharded") < peak("n2m2:batch")
    for text in ("tp4", "n2m2:batch", "n2m2:scores", "n2m2:gather"):
        assert peak(text, chunk_positions=4) < peak(text)


def test_scores_hold_a_square_and_whole_heads_a_line() -> None:
    """Twice the sequence: four times the scores, up to the size of a block, or twice the rows."""
    peaks = {}
    for text, seq in itertools.product(("n2m2:scores", "n2m2:batch"), (256, 512)):
        spec, work = replace(SPEC, max_positions=1024), Workload(batch=2, seq=seq, decode_steps=1)
        peaks[text, seq] = predict(spec, parse_layout(text), work, 1).activations_peak_bytes
    assert peaks["n2m2:scores", 512] > 3.5 * peaks["n2m2:scores", 256]
    assert peaks["n2m2:batch", 512] <= 2 * peaks["n2m2:batch", 256]
