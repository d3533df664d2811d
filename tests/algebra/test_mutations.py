"""Each kind of test can fail: what is done wrong is caught by the very comparison that the other tests use."""

from dataclasses import replace
from typing import Any

import gradients
import halves
import pytest
from drawn import ALL_EXCHANGES
from halves import Case
from mutations import GRADIENT_MUTATIONS, HARMLESS, MUTATIONS
from simulated import Ranks

from headgrid.layout.layout import EXCHANGES, parse_layout
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

CLEAR = 1e-3
"""Errors of wrong algebra are at least this large: ten orders above what is accepted."""
MODEL = ModelSpec(
    name="mutated",
    num_layers=1,
    hidden_size=20,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    mlp_hidden_size=4,
    vocab_size=4,
    max_positions=16,
)
WORKLOAD = Workload(batch=4, seq=7, decode_steps=3, dtype="float64", prompt_lengths=(7, 4, 6, 7), chunk_positions=4)
SLICED, ROUTED = tuple(EXCHANGES), ("batch", "sequence")
# where each applies, and what the model or the layout needs for it
WHERE: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "swapped slices of W_Q": (ALL_EXCHANGES, {}),
    "swapped slices of W_O": (ALL_EXCHANGES, {}),
    "swapped blocks on arrival": (ROUTED, {}),
    "swapped outputs of heads": (ALL_EXCHANGES, {"output": "concat"}),
    "dropped output of one rank": (ALL_EXCHANGES, {}),
    "dropped scores of one rank": (("scores",), {}),
    "head shifted by one": (ALL_EXCHANGES, {}),
    "torn RoPE pairs": (SLICED, {}),
    "skipped cache write": (ALL_EXCHANGES, {}),
    "skipped cache write, zeros there": (ALL_EXCHANGES, {}),
    "scale of a slice": (SLICED, {}),
    "no scale": (ALL_EXCHANGES, {}),
    "no window on one rank": (ALL_EXCHANGES, {"sliding_window": 3}),
    "window off by one": (ALL_EXCHANGES, {"sliding_window": 3}),
    "no soft cap on one rank": (ALL_EXCHANGES, {"attn_logit_softcapping": 1.5}),
    "no causal mask on one rank": (ALL_EXCHANGES, {"chunk_positions": 0}),
    "decode position off by one": (ALL_EXCHANGES, {}),
    "merge without log-sum-exp": (("sequence",), {}),
    "padding seen on one rank": (ALL_EXCHANGES, {"is_causal": False}),
}
GRADIENTS_WHERE: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "no sum over parts of the work": (ALL_EXCHANGES, {}),
    "sums taken for alike": (("scores",), {}),
    "sums taken for parts": (ALL_EXCHANGES, {}),
    "gathers taken for alike": (ALL_EXCHANGES, {"residual": "sharded"}),
    "gathers taken for parts": (ALL_EXCHANGES, {"output": "concat"}),
    "all-to-all that returns nothing": (ROUTED, {}),
}


def case_of(exchange: str, needs: dict[str, Any], *, decoded: bool = True) -> Case:
    """Four ranks with two query heads or more each, of a model whose attention is far from uniform."""
    layout = parse_layout("tp4" if exchange == "none" else f"n2m2:{exchange}")
    of_layout = {name: value for name, value in needs.items() if name in ("output", "residual")}
    of_workload = {name: value for name, value in needs.items() if name == "chunk_positions"}
    model = replace(MODEL, **{name: needs[name] for name in needs if name not in {**of_layout, **of_workload}})
    if not decoded or not model.is_causal:
        of_workload = {"decode_steps": 0, "chunk_positions": 0}
    return Case(model, replace(layout, **of_layout), replace(WORKLOAD, **of_workload), 7)


def pairs(where: dict[str, tuple[tuple[str, ...], dict[str, Any]]]) -> list[tuple[str, str]]:
    return [(name, exchange) for name, (exchanges, _) in where.items() for exchange in exchanges]


@pytest.mark.parametrize(("name", "exchange"), pairs(WHERE))
def test_wrong_algebra_is_caught(name: str, exchange: str, ranks: Ranks) -> None:
    case = case_of(exchange, WHERE[name][1])
    with MUTATIONS[name](case) as alter:
        errors = halves.compare(case, ranks, alter)
    assert max(errors.prefill, errors.decode) > CLEAR
    assert not errors.exact
    assert halves.compare(case, ranks).exact  # and nothing is left behind


@pytest.mark.parametrize(("name", "exchange"), pairs(GRADIENTS_WHERE))
def test_wrong_gradients_are_caught(name: str, exchange: str, ranks: Ranks) -> None:
    case = case_of(exchange, GRADIENTS_WHERE[name][1], decoded=False)
    with GRADIENT_MUTATIONS[name](case) as alter:
        assert halves.compare(case, ranks, alter).exact  # only gradients are wrong
        errors = gradients.compare(case, ranks, alter)
    assert max(errors.values()) > CLEAR
    assert max(gradients.compare(case, ranks).values()) <= gradients.EXACT


def test_everything_is_tried() -> None:
    assert (set(WHERE), set(GRADIENTS_WHERE)) == (set(MUTATIONS), set(GRADIENT_MUTATIONS))


@pytest.mark.parametrize("exchange", SLICED)
def test_a_softmax_for_each_slice_is_caught(exchange: str, ranks: Ranks) -> None:
    case = case_of(exchange, {})
    errors = halves.compare(replace(case, layout=replace(case.layout, exchange="independent")), ranks)
    assert min(errors.prefill, errors.decode) > 0.1


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_not_matter_is_accepted(name: str, ranks: Ranks) -> None:
    case = case_of("gather", {})
    with HARMLESS[name](case) as alter:
        assert halves.compare(case, ranks, alter).exact
