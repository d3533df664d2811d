"""Bytes that a decode step reads: against counting by hand, the memory that holds them, and figures on paper."""

import dataclasses
import math
from collections import Counter

import pytest

from headgrid.layout.flops import model_attention_flops, model_flops
from headgrid.layout.layout import parse_layout
from headgrid.layout.legal import legal_layouts
from headgrid.layout.memory import cache_shape, parameters_bytes
from headgrid.layout.reads import cache_read_bytes, decode_reads, fullest, weight_read_bytes
from headgrid.spec.model import ModelSpec, find_model
from headgrid.spec.workload import Workload

SEED = find_model("seed")
WORK = Workload(batch=128, seq=10_000, decode_steps=32, dtype="float16")
SMALL = ModelSpec(
    name="small", num_layers=3, hidden_size=48, num_heads=12, num_kv_heads=4, head_dim=8, mlp_hidden_size=40,
    vocab_size=50, max_positions=64,
)  # fmt: skip
WINDOWED = dataclasses.replace(SMALL, sliding_window=5, full_attention_layers=(1,))
FEW = Workload(batch=5, seq=11, decode_steps=4, dtype="float32")
RAGGED = dataclasses.replace(FEW, prompt_lengths=(3, 11, 7, 1, 9))


def pairs(model: ModelSpec, work: Workload, step: int) -> Counter[tuple[int, int, int]]:
    """Keys that all heads of all layers attend to in a step, one by one: (layer, row, position)."""
    found: Counter[tuple[int, int, int]] = Counter()
    for layer in range(model.num_layers):
        for row in range(work.batch):
            newest = work.length(row) + step
            window = model.window(layer) or newest + 1
            found.update((layer, row, position) for position in range(max(0, newest - window + 1), newest + 1))
    return found


@pytest.mark.parametrize("model", [SMALL, WINDOWED], ids=lambda model: f"window {model.sliding_window}")
@pytest.mark.parametrize("work", [FEW, RAGGED], ids=["even", "ragged"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_all_ranks_together_read_every_key_and_value_once(model: ModelSpec, work: Workload, ranks: int) -> None:
    """With `gather` every slice has whole keys; a tensor-parallel rank beyond the KV heads has a copy."""
    for layout in legal_layouts(model, ranks):
        if layout.exchange == "independent" or layout.dp > work.batch:
            continue
        for step in (0, work.decode_steps - 1):
            once = sum(pairs(model, work, step).values()) * model.num_kv_heads * model.head_dim * work.element_bytes
            copies = max(1, layout.num_head_groups // model.num_kv_heads)
            keys = layout.num_dim_slices if layout.exchange == "gather" else 1
            together = sum(cache_read_bytes(model, layout, work, rank, step) for rank in range(ranks))
            assert together == once * (keys * copies + copies), (str(layout), step)


def test_the_last_step_reads_the_whole_cache() -> None:
    for name in ("tp4", "n2m2:batch", "n2m2:sequence", "n2m2:scores", "n1m4:gather", "tp2pp2", "dp4"):
        layout = parse_layout(name)
        for rank in range(4):
            whole = cache_shape(SMALL, layout, FEW, rank).elements * FEW.element_bytes
            assert cache_read_bytes(SMALL, layout, FEW, rank, FEW.decode_steps - 1) == whole, (name, rank)
        last, before = (
            sum(cache_read_bytes(SMALL, layout, FEW, rank, FEW.decode_steps - back) for rank in range(4))
            for back in (1, 2)
        )
        assert before < last, name  # the test can tell a step from the next


def test_the_mean_step_is_the_mean_of_all_steps() -> None:
    for model in (SMALL, WINDOWED):
        for name in ("tp2", "n1m2:sequence", "n1m2:batch"):
            layout = parse_layout(name)
            for rank in range(2):
                each = [cache_read_bytes(model, layout, FEW, rank, step) for step in range(FEW.decode_steps)]
                found = decode_reads(model, layout, FEW, rank)
                assert math.isclose(found.cache_bytes, sum(each) / len(each))
                assert found.total_bytes == found.cache_bytes + found.weights_bytes


def test_weights_are_what_is_stored_but_for_tables_that_are_looked_up() -> None:
    layout = parse_layout("tp2")
    e, table = 4, SMALL.vocab_size * SMALL.hidden_size * 4 // 2
    stored = parameters_bytes(SMALL, layout, 0, e)
    assert weight_read_bytes(SMALL, layout, 0, e) == stored - table
    tied = dataclasses.replace(SMALL, tied_embeddings=True)
    assert weight_read_bytes(tied, layout, 0, e) == parameters_bytes(tied, layout, 0, e)
    stages = parse_layout("pp2")
    assert weight_read_bytes(tied, stages, 0, e) == parameters_bytes(tied, stages, 0, e) - 2 * table
    assert weight_read_bytes(tied, stages, 1, e) == parameters_bytes(tied, stages, 1, e)
    learned = dataclasses.replace(SMALL, positions="learned")
    positions = learned.max_positions * learned.hidden_size * e
    assert weight_read_bytes(learned, layout, 1, e) == parameters_bytes(learned, layout, 1, e) - table - positions


@pytest.mark.parametrize(
    ("kv_heads", "layout", "weights_gb", "cache_gb"),
    # 16 layers of 4096^2 (2 + 2K/32) + 2 x 4096 x 16384 elements over 4; 2 x 128 x 10016.5 x 16 x 128 x K / n / m x 2
    [
        (32, "tp4", 1.61, 84.02),
        (32, "n2m2:batch", 1.61, 84.02),
        (2, "tp4", 1.38, 10.50),
        (2, "n2m2:batch", 1.36, 5.25),
        (1, "tp4", 1.38, 10.50),
        (1, "n1m4:batch", 1.35, 2.626),
        (32, "dp4", 6.44, 84.02),
        (32, "tp2pp2", 1.61, 84.02),
    ],
)
def test_the_seeds_model_on_paper(kv_heads: int, layout: str, weights_gb: float, cache_gb: float) -> None:
    model = dataclasses.replace(SEED, num_kv_heads=kv_heads)
    found = fullest(model, parse_layout(layout), WORK)
    assert found.weights_bytes / 1e9 == pytest.approx(weights_gb, rel=0.005)
    assert found.cache_bytes / 1e9 == pytest.approx(cache_gb, rel=0.001)


def test_fp8_weights_are_read_in_bytes() -> None:
    wide, narrow = (fullest(SEED, parse_layout(name), WORK) for name in ("tp4", "tp4:fp8"))
    assert 0.5 < narrow.weights_bytes / wide.weights_bytes < 0.51 and narrow.cache_bytes == wide.cache_bytes


def test_attention_is_a_part_of_the_models_operations() -> None:
    """Causal pairs, half of a square, 4 d operations each; the seed's 7.75 GFLOP a token with it."""
    attention, whole, tokens = model_attention_flops(SEED, WORK), model_flops(SEED, WORK), WORK.batch * WORK.seq
    assert attention == 16 * 128 * (10_000**2 // 2) * 4 * 32 * 128
    products = 16 * 2 * (4 * 4096**2 + 2 * 4096 * 16_384) * tokens
    assert whole - attention == pytest.approx(products, rel=1e-3) and whole / tokens == pytest.approx(7.75e9, rel=1e-3)
    by_hand = sum(4 * 12 * 8 * (p + 1 if layer == 1 else min(p + 1, 5)) for layer in range(3) for p in range(400))
    long = dataclasses.replace(FEW, batch=1, seq=400)  # the diagonal is counted half
    assert model_attention_flops(WINDOWED, long) == pytest.approx(by_hand, rel=0.15)
