"""Products of few rows against fp64, in memory full of NaN; by the interpreter and on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from frames import assert_frame_whole, framed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from headgrid.runtime.kernels import skinny
from headgrid.runtime.kernels.skinny import MOST_ROWS, Plan, plan

ERRORS = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class Case:
    rows: int
    inputs: int
    outputs: int
    launch: Plan
    kind: str = "none"
    gated: bool = False
    add: bool = False
    bias: bool = False
    dtype: torch.dtype = torch.float16


def inputs(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x, weight and bias, and what is in the output before."""
    torch.manual_seed(case.rows + case.inputs)
    height = case.outputs * (1 + case.gated)
    x, w = torch.randn(case.rows, case.inputs), torch.randn(height, case.inputs) * case.inputs**-0.5
    x, w = (framed(t.to(case.dtype).to(device), width=16) for t in (x, w))  # rows at multiples of 16 bytes
    bias = framed(torch.randn(height).to(case.dtype).to(device)) if case.bias else None
    before = torch.randn(case.rows, case.outputs) if case.add else torch.full((case.rows, case.outputs), float("nan"))
    return x, w, bias, before.to(case.dtype).to(device)


def exact(case: Case, x: Tensor, w: Tensor, bias: Tensor | None, before: Tensor) -> Tensor:
    y = x.double() @ w.double().t()
    if bias is not None:
        y += bias.double()
    first, second = (y, None) if not case.gated else y.chunk(2, dim=1)
    y = ACTIVATIONS[case.kind](first)
    if second is not None:
        y = y * second
    return y + before.double() if case.add else y


def produced(case: Case, x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    ending = {"kind": case.kind, "gated": case.gated, "add": case.add}
    return skinny.product(x, w, bias, **ending, out=out, launch=case.launch)


def assert_close(case: Case, out: Tensor, wide: Tensor) -> None:
    error = float((out.double() - wide).norm() / wide.norm())
    assert error < ERRORS[case.dtype], f"relative error {error:.2e}"


def check(case: Case, device: str) -> None:
    """Multiply, and compare; then the result must be neither of two wrong ones."""
    x, w, bias, before = inputs(case, device)
    out = framed(before)
    assert produced(case, x, w, bias, out) is out
    if not case.add:
        assert_frame_whole(out)
    wide = exact(case, x, w, bias, before)
    assert_close(case, out, wide)
    for wrong in (exact(case, x.roll(1, 1), w, bias, before), exact(case, x, w.roll(1, 0), bias, before)):
        with pytest.raises(AssertionError, match="relative error"):
            assert_close(case, out, wrong)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    inner = draw(st.sampled_from([64, 128]))
    launch = Plan(
        outs=draw(st.sampled_from([16, 32, 64])),
        inner=inner,
        warps=draw(st.sampled_from([2, 4])),
        stages=draw(st.sampled_from([2, 3])),
        splits=draw(st.integers(1, 3)),
        ahead=draw(st.sampled_from([0, 40, 10_000])),
    )
    rows, gated = draw(st.sampled_from([1, 1, 2, 15, 16, 17, 40])), draw(st.booleans())
    if rows == 1 and not gated:
        launch = Plan(draw(st.sampled_from([1, 4, 16])), inner, 4, 0)
    return Case(
        rows=rows,
        inputs=inner * draw(st.integers(1, 4)),
        outputs=draw(st.sampled_from([16, 24, 64, 100, 129])),
        launch=launch,
        kind=draw(st.sampled_from(sorted(ACTIVATIONS))),
        gated=gated,
        add=draw(st.booleans()),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(sorted(ERRORS, key=str))),
    )


def test_any_case_is_as_exact_as_its_dtype_allows(device: str, budget: Callable[[int, int], int]) -> None:
    @settings(
        max_examples=budget(25, 1000) if device == "cpu" else budget(15, 200),  # a GPU's are compiled, most of them
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(cases())
    def run(case: Case) -> None:
        check(case, device)

    run()


NAMED = {
    "one row, several splits": Case(1, 256, 40, Plan(16, 64, 2, 3, 3)),
    "fewer blocks than splits": Case(3, 128, 40, Plan(16, 64, 2, 3, 4), "silu", gated=True),
    "a split and a sum": Case(5, 256, 600, Plan(64, 64, 4, 3, 2), add=True, bias=True),
    "one row without tensor cores": Case(1, 512, 33, Plan(8, 128, 4, 0), "silu", add=True, bias=True),
    "as many rows as there may be": Case(MOST_ROWS, 128, 48, Plan(64, 64, 4, 2), "gelu_tanh", bias=True),
}


@pytest.mark.parametrize("name", NAMED)
def test_the_cases_at_the_edges(device: str, name: str) -> None:
    check(NAMED[name], device)


def test_no_rows_give_none(device: str) -> None:
    x, w = torch.empty(0, 64, device=device).half(), torch.empty(32, 64, device=device).half()
    assert skinny.product(x, w, launch=Plan(16, 64, 2, 3)).shape == (0, 32)


def test_every_input_is_read_so_poison_would_show(device: str) -> None:
    case = NAMED["one row, several splits"]
    x, w, bias, before = inputs(case, device)
    for tensor, at in ((x, (0, 0)), (x, (0, 255)), (w, (39, 130))):
        kept = tensor[at].clone()
        tensor[at] = float("nan")
        assert produced(case, x, w, bias, before).isnan().any()
        tensor[at] = kept
    assert not produced(case, x, w, bias, before).isnan().any()


def test_the_same_call_gives_the_same_bits_and_another_division_does_not(device: str) -> None:
    case = Case(4, 512, 300, Plan(16, 64, 2, 3, 4))
    x, w, bias, before = inputs(case, device)
    x[:, 256:], w[:, 256:] = -x[:, :256], w[:, :256]
    w[:, 511] += 2.0**-10  # sums that nearly cancel show how they were rounded on the way
    first, again = (produced(case, x, w, bias, before).clone() for _ in range(2))
    assert torch.equal(first, again)
    other = replace(case, launch=Plan(16, 64, 2, 3, 1))
    assert not torch.equal(first, produced(other, x, w, bias, before))


def test_what_does_not_fit_is_refused(device: str) -> None:
    case = Case(2, 128, 40, Plan(16, 64, 2, 3))
    x, w, _, out = inputs(case, device)
    for bad in (out[:, :39], out.t().contiguous().t()):
        with pytest.raises(AssertionError):
            produced(case, x, w, None, bad)
    with pytest.raises(AssertionError):
        produced(replace(case, launch=Plan(16, 256, 2, 3)), x, w, None, out)
    with pytest.raises(AssertionError):
        skinny.product(x, w, add=True, launch=case.launch)
    with pytest.raises(AssertionError):
        produced(replace(case, launch=Plan(4, 128, 4, 0)), x, w, None, out)
    produced(case, x, w, None, out)


WIDTHS = [(4096, 12_288), (4096, 4096), (16_384, 4096), (4096, 3072), (1024, 4096), (14_336, 4096), (4096, 128_256)]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 32, 33, 64])
@pytest.mark.parametrize(("inputs", "outputs"), WIDTHS)
def test_a_plan_fills_a_gpu_and_fits_into_it(inputs: int, outputs: int, rows: int, gated: bool) -> None:
    how = plan(rows, inputs, outputs, 132, gated=gated)
    if rows <= 32 or (outputs == 4096 and not gated):
        assert how is not None
    if how is None:
        return
    assert inputs % how.inner == 0 and (how.stages or rows == 1)
    programs = -(-outputs // how.outs) * how.splits
    assert programs >= 0.7 * 132, "processors idle"
    padded = max(16, 1 << (rows - 1).bit_length())
    shared = (how.stages - 1) * how.inner * 2 * (how.outs * (1 + gated) + padded)
    assert shared <= 200 << 10, "too much shared memory"
    assert inputs // how.inner >= how.splits, "splits without inputs"


def test_no_plan_where_cublas_is_as_fast_or_rows_cannot_be_read_in_blocks() -> None:
    assert plan(65, 4096, 4096, 132) is None
    assert plan(64, 4096, 12_288, 132) is None, "96 tiles leave 36 of 132 processors idle"
    assert plan(8, 4000, 4096, 132) is None
    assert plan(0, 4096, 4096, 132) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
@pytest.mark.parametrize("splits", [1, 3])
def test_a_chain_of_products_on_two_streams_waits_for_what_it_reads(
    splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each product's result is the next one's input: what starts too early reads what is not written yet."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # no kernels between the calls
    torch.manual_seed(0)
    launch = Plan(64, 128, 4, 3, splits, 2048)
    x = torch.randn(8, 4096, device="cuda").half()
    weights = [(torch.randn(4096, 4096, device="cuda") / 64).half() for _ in range(8)]
    side = torch.cuda.Stream()

    def chain(own: list[Tensor]) -> Tensor:
        y = x
        for w in own * 5:
            y = skinny.product(y, w, kind="silu", launch=launch)
            y = skinny.product(y, w, add=True, out=y.clone(), launch=launch)
        return y

    def both() -> list[Tensor]:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            there = chain(weights[4:])
        here = chain(weights[:4])
        torch.cuda.current_stream().wait_stream(side)
        return [here, there]

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both()
    for _ in range(20):
        x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        for found, own in zip(results, (weights[:4], weights[4:]), strict=True):
            y = x
            for w in own * 5:
                for add in (False, True):
                    ending = {"add": True, "out": y.clone()} if add else {"kind": "silu"}
                    y = skinny.product(y, w, **ending, launch=launch)
                    torch.cuda.synchronize()
            assert y.isfinite().all() and torch.equal(found, y)
