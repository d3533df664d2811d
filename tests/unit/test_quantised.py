"""Rounding to FP8 and products of what is rounded, against fp64 arithmetic; what layouts and refusals say of it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headgrid.errors import InvalidLayout, NotAvailable
from headgrid.experiment import fp8
from headgrid.experiment.accuracy import SINGLE_DEVICE, with_fp8
from headgrid.experiment.verify import compared
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.legal import check_training
from headgrid.layout.memory import parameters_bytes
from headgrid.layout.products import check_products, products
from headgrid.layout.quantised import is_quantised, scale_name
from headgrid.layout.shards import parameters, stacks
from headgrid.reference import Reference, relative_error
from headgrid.report.naming import caution, named
from headgrid.runtime.layer import layer_weights, load
from headgrid.runtime.quantised import DTYPE, Quantised, as_kept, linear, quantised
from headgrid.runtime.weights import draw
from headgrid.spec.model import find_model
from headgrid.spec.workload import Workload

SEED, TINY = find_model("seed"), find_model("tiny")


def restored(values: Tensor, scales: Tensor) -> Tensor:
    return values.double() * scales.double()[:, None]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 70),
    st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64)),
    st.sampled_from((1e-4, 1.0, 3e3)),
    st.integers(0, 99),
)
def test_numbers_keep_four_bits_of_what_their_row_allows(
    rows: int, width: int, dtype: torch.dtype, size: float, seed: int
) -> None:
    """e4m3 rounds normal numbers to 1/16 at most, and subnormal ones to half of 2^-9 of what it calls 1."""
    x = random(rows, width, dtype=dtype, seed=seed) * size
    values, scales = quantised(x)
    assert (values.dtype, scales.dtype, values.shape, scales.shape) == (DTYPE, torch.float32, x.shape, x.shape[:1])
    error, exact = (restored(values, scales) - x.double()).abs(), x.double().abs()
    bound = torch.maximum(exact / 16, scales.double()[:, None] / 1024) * (1 + 1e-6)
    assert (error <= bound).all()
    assert (values.float().abs().amax(1) == 448).all(), "a row's largest number is e4m3's largest"
    assert not (error <= bound / 3).all() or width * rows < 40, "the bound is no tighter than it says"


def test_rows_of_zeros_stay_zeros_and_tiny_ones_finite() -> None:
    x = torch.zeros(3, 8)
    x[1, 2], x[2, :] = 1e-44, 2.0
    values, scales = quantised(x)
    assert scales.isfinite().all()
    assert (scales > 0).all()
    assert torch.equal(values.float()[0], torch.zeros(8))
    assert restored(values, scales)[2].tolist() == pytest.approx([2.0] * 8)
    assert values.float().isfinite().all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_overflowed_shows(bad: float) -> None:
    x = torch.ones(2, 8, dtype=torch.float16)
    x[0, 3] = bad
    y = linear(x, Quantised(*quantised(torch.ones(4, 8))))
    assert y[0].isnan().all()
    assert torch.equal(y[1], torch.full((4,), 8.0, dtype=torch.float16))


def test_quotients_beyond_the_largest_number_saturate() -> None:
    """x / (max / 448) may exceed 448 by a rounding, and what lies beyond it is NaN to some versions of torch."""
    x = random(4096, 3) * 10.0 ** torch.linspace(-30, 30, 4096)[:, None]
    values, scales = quantised(x)
    assert ((x / scales[:, None]).abs() > 448).any()
    assert (values.float().abs().amax(1) == 448).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 16, 16), (5, 48, 33), (64, 257, 19), (0, 16, 8)], ids=str)
def test_products_are_those_of_the_rounded_factors(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, inputs, outputs = shape
    sizes = torch.exp2(torch.arange(outputs) % 7 - 3.0)[:, None]
    uneven = torch.exp2(torch.arange(tokens) % 3)[:, None].to(dtype)
    x, bias = random(tokens, inputs, dtype=dtype, seed=1) * uneven, random(outputs, dtype=dtype, seed=2)
    weight = Quantised(*quantised(random(outputs, inputs, seed=3) * sizes))
    y = linear(x, weight, bias)
    assert (y.dtype, y.shape) == (dtype, (tokens, outputs))
    if not tokens:
        return
    exact = restored(*quantised(x)) @ restored(weight.values, weight.scales).t() + bias.double()
    bound = 4 * torch.finfo(dtype).eps
    assert relative_error(y, exact) < bound
    wrong = restored(*quantised(x)) @ restored(weight.values, weight.scales.roll(1)).t() + bias.double()
    assert relative_error(y, wrong) > 0.3
    tokens_mixed = restored(quantised(x)[0], quantised(x)[1].roll(1))
    assert tokens == 1 or relative_error(y, tokens_mixed @ restored(weight.values, weight.scales).t()) > 0.3


def test_without_fp8_a_linear_is_torch_s() -> None:
    x, weight, bias = random(3, 8), random(5, 8, seed=1), random(5, seed=2)
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


def _loaded(text: str) -> dict[str, Tensor]:
    return load(TINY, parse_layout(text), 0, lambda n, s: draw(TINY, 0, n, s, dtype=torch.float16))


def test_weights_are_stored_as_the_prediction_says() -> None:
    for text in ("tp1", "tp1:fp8"):
        stored = sum(x.numel() * x.element_size() for x in _loaded(text).values())
        assert stored == parameters_bytes(TINY, parse_layout(text), 0, 2)
    matrices = {name for name in stacks(parameters(TINY, Layout(), 0)) if is_quantised(parse_layout("tp1:fp8"), name)}
    found = _loaded("tp1:fp8")
    assert {name for name, x in found.items() if x.dtype == DTYPE} == matrices
    assert len(matrices) == 4 * TINY.num_layers
    assert {name for name in found if name.endswith(".scale")} == {scale_name(name) for name in matrices}
    assert isinstance(layer_weights(found, 0).down[0], Quantised)
    assert isinstance(layer_weights(_loaded("tp1"), 0).down[0], Tensor)


def test_scales_of_cut_rows_need_the_other_ranks() -> None:
    with pytest.raises(ValueError, match="all 2 ranks"):
        as_kept(parse_layout("tp2:fp8"), "layers.0.mlp.down.weight", torch.ones(4, 4), None)
    kept = as_kept(parse_layout("tp2:fp8"), "layers.0.mlp.up.weight", torch.ones(4, 4), None)
    assert set(kept) == {"layers.0.mlp.up.weight", "layers.0.mlp.up.scale"}
    assert set(as_kept(parse_layout("tp2:concat+fp8"), "layers.0.attention.o.weight", torch.ones(4, 4), None)) != {}


@pytest.mark.parametrize(
    "text", ["tp2:fp8", "n1m2:batch+gathered+fp8", "n2m2pp2dp2:sequence+sharded+fp32+fp8", "dp2:fp8"]
)
def test_the_notation_has_it(text: str) -> None:
    layout = parse_layout(text)
    assert layout.linears == "fp8"
    assert str(layout) == text
    assert parse_layout(text.replace("+fp8", "").replace(":fp8", "")) == replace(layout, linears="model")


def test_it_is_named_once() -> None:
    with pytest.raises(InvalidLayout, match="one too many") as caught:
        parse_layout("tp2:fp8+fp8")
    assert " fp8" in caught.value.block().splitlines()[-1], "a legal option, and one that is shown"


@pytest.mark.parametrize("text", ["tp4:fp8", "n2m2:batch+gathered+fp8", "n1m4:batch+gathered+fp8", "tp4:concat+fp8"])
def test_a_gpu_takes_even_sizes(text: str) -> None:
    check_products(SEED, parse_layout(text))
    assert {product.name for product in products(SEED, parse_layout(text))} == {"qkv", "o", "up", "down"}


def test_a_gpu_refuses_uneven_sizes_with_the_numbers_and_what_would_do() -> None:
    with pytest.raises(InvalidLayout) as caught:
        check_products(SEED, parse_layout("n1m3:batch+fp8"))
    error = caught.value
    assert "5461 inputs" in error.numbers or "5462 inputs" in error.numbers
    assert error.legal[0] == "n1m3:batch"
    assert "dp3:fp8" in error.legal
    for text in error.legal:
        check_products(SEED, parse_layout(text))
    check_products(SEED, parse_layout("n1m3:batch"))


def test_gathered_sizes_are_those_of_the_group_too() -> None:
    stationary = products(SEED, parse_layout("n1m4:batch+fp8"))
    gathered = products(SEED, parse_layout("n1m4:batch+gathered+fp8"))
    assert {p.inputs for p in gathered - stationary} == {4096, 16384}


def test_there_are_no_gradients() -> None:
    workload = Workload(batch=2, seq=8, decode_steps=0, dtype="float32")
    check_training(TINY, parse_layout("tp2"), workload)
    with pytest.raises(InvalidLayout, match="no gradients") as caught:
        check_training(TINY, parse_layout("tp2:fp8"), workload)
    assert caught.value.legal == ("tp2",)


def test_the_reference_rounds_both_factors_of_linears_and_nothing_else() -> None:
    weights = {name: draw(TINY, 0, name, s, dtype=torch.float32) for name, s in parameters(TINY, Layout(), 0).items()}
    tokens = torch.randint(0, TINY.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    plain, rounded = (Reference(TINY, weights.__getitem__, torch.float64, fp8_linears=fp8) for fp8 in (False, True))
    assert 0.005 < relative_error(rounded.logits(tokens, 4), plain.logits(tokens, 4)) < 0.3
    x = random(2, 3, TINY.hidden_size, dtype=torch.float64)
    assert torch.equal(plain.head(x), rounded.head(x))
    name = "layers.0.mlp.down.weight"
    y = random(5, TINY.mlp_hidden_size, dtype=torch.float64)
    exact = restored(*quantised(y)) @ restored(*quantised(weights[name])).t()
    bias = weights["layers.0.mlp.down.bias"].double() if "mlp" in TINY.linear_bias else 0
    assert relative_error(rounded._linear(y, "layers.0.mlp.down", "mlp"), exact + bias) < 1e-6
    assert relative_error(plain._linear(y, "layers.0.mlp.down", "mlp"), exact + bias) > 1e-3


def _summary_arm(layout: str, error: float | None, **more: object) -> dict:
    return {"label": layout, "layout": layout, "relative_error": error, "verify": None, **more}


def test_an_arm_is_never_named_without_its_error() -> None:
    check = {"phases": {"prefill": {"unquantised_floor": 0.001}, "decode": {"unquantised_floor": 0.002}}}
    arms = [
        _summary_arm("tp2", 0.001),
        _summary_arm("tp2:fp8", 0.05),
        _summary_arm("n1m2:batch+fp8", 0.06, verify=check),
        _summary_arm("n1m2:sequence+fp8", None),
        _summary_arm("of a later version", 0.1),
    ]
    found = with_fp8(arms)
    assert [arm["fp8"] for arm in found] == [
        None,
        {"against": "tp2", "error_ratio": 50.0},
        {"against": SINGLE_DEVICE, "error_ratio": 30.0},
        {"against": SINGLE_DEVICE, "error_ratio": None},
        None,
    ]
    assert named(found[0]) == "tp2"
    assert "error 5.0\N{NO-BREAK SPACE}%" in named(found[1])
    assert "tp2's" in named(found[1])
    assert "not measured" in named(found[3])
    assert all(arm["label"] in caution({"arms": found}) for arm in found[1:4])
    assert caution({"arms": found[:1]}) == ""


def test_a_verdict_states_both_floors() -> None:
    truth = random(4, 3, 9, dtype=torch.float64)
    floors, unquantised = truth + 0.1, truth + 0.001
    found = compared(truth + 0.12, truth, floors[None], 1.5, unquantised[None])
    assert found["passed"]
    assert found["unquantised_floor"] == pytest.approx(found["floor"] / 100)
    assert "unquantised_floor" not in compared(truth, truth, floors[None], 1.5)
    assert not compared(truth + 0.2, truth, floors[None], 1.5, unquantised[None])["passed"]


def test_gpus_without_fp8_products_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(9, 0), (8, 0)]
    monkeypatch.setattr(fp8, "compute_capabilities", lambda: found)
    layouts = [parse_layout("tp2"), parse_layout("tp2:fp8")]
    with pytest.raises(NotAvailable, match="no FP8 products") as caught:
        fp8.ensure(SEED, layouts, "cuda")
    assert "8.0" in caught.value.numbers
    fp8.ensure(SEED, layouts[:1], "cuda")
    fp8.ensure(SEED, layouts, "cpu")
    found[1] = (8, 9)
    fp8.ensure(SEED, layouts, "cuda")
    with pytest.raises(InvalidLayout, match="multiples of 16"):
        fp8.ensure(SEED, [parse_layout("n1m3:batch+fp8")], "cuda")
