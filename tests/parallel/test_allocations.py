"""No rank ever holds a whole weight: every tensor that comes to be, while weights are loaded and used, is watched."""

from collections.abc import Callable
from dataclasses import replace
from math import prod

import pytest
from case import Case
from cases import TINY

from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.shards import parameters
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

MODEL = replace(
    TINY,
    num_layers=2,
    hidden_size=64,
    num_heads=8,
    num_kv_heads=8,
    head_dim=16,
    mlp_hidden_size=128,
    vocab_size=128,
    max_positions=12,
    linear_bias=("qkv", "o", "mlp"),
)
WORKLOAD = Workload(batch=2, seq=4, decode_steps=2, dtype="float32")
STATIONARY = (
    "tp4",
    "tp4:concat",
    "tp8:sharded",
    "n1m4:gather",
    "n2m2:gather+concat",
    "n2m2:batch",
    "n2m2:sequence",
    "n2m2:sequence+sharded",
    "n2m2:scores",
    "n2m2pp2:batch+sharded+fp32",
)
GATHERED = ("n4m2:batch+gathered", "n4m2:batch+gathered+sharded")


def watched(text: str, fault: str = "") -> Case:
    name = f"{text}-{fault or 'watched'}"
    return Case(name, MODEL, parse_layout(text), WORKLOAD, seed=3, fault=fault, watched=True)


def whole_matrices(model: ModelSpec) -> dict[str, int]:
    """Elements of every weight matrix: each of them is cut."""
    return {name: prod(shard.shape) for name, shard in parameters(model, Layout(), 0).items() if shard.cols is not None}


@pytest.mark.parametrize("case", [watched(text) for text in STATIONARY], ids=lambda case: case.id)
def test_no_tensor_is_as_large_as_a_whole_weight(case: Case, outcomes: Callable) -> None:
    smallest = min(whole_matrices(case.model).values())
    for outcome in outcomes(case):
        assert outcome["seen"] > 100
        assert 0 < outcome["largest"] < smallest


@pytest.mark.parametrize("case", [watched(text) for text in GATHERED], ids=lambda case: case.id)
def test_gathered_weights_are_those_of_a_head_group(case: Case, outcomes: Callable) -> None:
    """Q, K and V, which travel together, are the largest: exactly an n-th part of them."""
    sizes = whole_matrices(case.model)
    qkv = sum(sizes[f"layers.0.attention.{part}.weight"] for part in "qkv")
    for outcome in outcomes(case):
        assert outcome["largest"] == max(qkv, *sizes.values()) // case.layout.num_head_groups < min(sizes.values())


@pytest.mark.parametrize("case", [watched("n2m2:batch", "drawn whole")], ids=lambda case: case.id)
def test_a_loader_that_draws_whole_weights_is_caught(case: Case, outcomes: Callable) -> None:
    largest = max(whole_matrices(case.model).values())
    assert all(outcome["largest"] >= largest for outcome in outcomes(case))
