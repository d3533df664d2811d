"""FP8 products of a real GPU against fp64 arithmetic on the same rounded factors, and engines that run on them."""

from pathlib import Path
from typing import Any

import fp8_gpu_work
import pytest
import torch
from fp8_gpu_work import MODEL, WORKLOAD, prompts
from torch import Tensor

from headgrid.errors import InvalidLayout
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.products import check_products
from headgrid.layout.shards import parameters
from headgrid.reference import Reference, relative_error
from headgrid.runtime.launch import Job, run
from headgrid.runtime.quantised import LEAST_CAPABILITY, Quantised, linear, quantised
from headgrid.runtime.weights import draw

_GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not _GPUS or torch.cuda.get_device_capability() < LEAST_CAPABILITY, reason="no CUDA GPU that multiplies FP8"
    ),
]
SHAPES = [(1, 4096, 4096), (128, 4096, 12288), (128, 16384, 4096), (1000, 4096, 16384), (33, 16, 32), (0, 64, 64)]
LAYOUTS = ("tp2:fp8", "tp2:sharded+fp32+fp8", "n1m2:batch+gathered+fp8", "n1m2:sequence+fp8", "pp2:fp8")


def restored(values: Tensor, scales: Tensor) -> Tensor:
    return values.double() * scales.double()[:, None]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_rounded_factors(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Fast accumulation keeps fewer bits of partial sums than fp32; the result may be rounded to bfloat16."""
    tokens, inputs, outputs = shape
    torch.manual_seed(tokens)
    x = torch.randn(tokens, inputs, device="cuda").to(dtype)
    sizes = torch.exp2(torch.arange(outputs, device="cuda") % 7 - 3.0)[:, None]
    weight = Quantised(*quantised((torch.randn(outputs, inputs, device="cuda") * sizes).to(dtype)))
    bias = torch.randn(outputs, device="cuda").to(dtype)
    y = linear(x, weight, bias)
    assert (y.dtype, y.shape) == (dtype, (tokens, outputs))
    if not tokens:
        return
    values, scales = quantised(x)
    exact = restored(values, scales) @ restored(weight.values, weight.scales).t() + bias.double()
    assert relative_error(y, exact) < 6e-3
    rolled = restored(values, scales) @ restored(weight.values, weight.scales.roll(1)).t() + bias.double()
    assert relative_error(y, rolled) > 0.1


@pytest.mark.parametrize("inference", [False, True])  # kernels of our own only without gradients
def test_a_gpu_rounds_as_a_cpu_does(inference: bool) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = (torch.randn(300, 777) * torch.exp2(torch.arange(300) % 20 - 10.0)[:, None]).to(dtype)
        x[5] = 0
        with torch.inference_mode(inference):
            here, there = quantised(x), quantised(x.cuda())
        assert torch.equal(there[1].cpu(), here[1])
        same = there[0].cpu().view(torch.uint8) == here[0].view(torch.uint8)
        assert same.float().mean() > 0.9999


def test_a_product_goes_into_a_graph() -> None:
    x, weight = torch.randn(128, 64, device="cuda").half(), Quantised(*quantised(torch.randn(32, 64, device="cuda")))
    first = linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear(x, weight)
    x.mul_(-2)
    graph.replay()
    assert relative_error(out, -2 * first) < 0.01
    assert relative_error(out, first) > 1


@pytest.mark.parametrize("shape", [(16, 40, 32), (16, 32, 40)], ids=str)
def test_sizes_that_the_check_refuses_are_those_that_fail(shape: tuple[int, int, int]) -> None:
    tokens, inputs, outputs = shape
    weight = Quantised(*quantised(torch.randn(outputs, inputs, device="cuda")))
    with pytest.raises((RuntimeError, ValueError)):
        linear(torch.randn(tokens, inputs, device="cuda").half(), weight)
    with pytest.raises(InvalidLayout):
        check_products(fp8_gpu_work.UNEVEN, parse_layout("tp1:fp8"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    if _GPUS < 2:
        pytest.skip("fewer than two CUDA GPUs on this machine")
    folder = tmp_path_factory.mktemp("fp8")
    job = Job("fp8_gpu_work:run", {"layouts": LAYOUTS, "folder": str(folder)}, 2, "nccl")
    run(job, log_to=Path(folder) / "logs")
    return {text: [torch.load(folder / f"{k}.{rank}.pt") for rank in range(2)] for k, text in enumerate(LAYOUTS)}


def _reference(dtype: torch.dtype, *, fp8_linears: bool = False) -> Reference:
    shards = parameters(MODEL, Layout(), 0)
    return Reference(
        MODEL, lambda n: draw(MODEL, 0, n, shards[n], dtype=torch.float16), dtype, "cuda", fp8_linears=fp8_linears
    )


@pytest.mark.parametrize("text", LAYOUTS)
def test_ranks_have_the_error_of_one_device_with_fp8_linears(text: str, outcomes: dict[str, list[dict]]) -> None:
    """Prefill, and decode from CUDA graphs."""
    assert all(outcome["as_predicted"] for outcome in outcomes[text])
    last = next(outcome for outcome in outcomes[text] if outcome["logits"] is not None)
    ids = torch.cat([prompts(), last["tokens"][:, :-1]], dim=1)
    models = _reference(torch.float64), _reference(torch.float16, fp8_linears=True), _reference(torch.float16)
    truth, floor, plain = (model.logits(ids, 1 + WORKLOAD.decode_steps).cpu() for model in models)
    error = relative_error(last["logits"], truth)
    assert error < 1.5 * relative_error(floor, truth)
    assert error > 3 * relative_error(plain, truth), "FP8 is not what was computed"
