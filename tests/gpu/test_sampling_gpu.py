"""Drawn tokens on a real GPU: those of the CPU, also from a recorded graph, which the host does not wait for."""

import statistics

import pytest
import torch
from torch import Tensor

from headgrid.runtime.sampling import Sampling, choose, gumbel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]

CASES = [Sampling(), Sampling(1.0), Sampling(0.7, 50), Sampling(1.2, 0, 0.9), Sampling(0.8, 1000, 0.95, seed=2**64 - 1)]
VOCAB = 131072


def drawn_logits(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)


def test_noise_has_the_bits_of_the_cpu() -> None:
    rows, steps = torch.arange(20), torch.arange(20) * 977
    here, there = gumbel(5, rows, steps, VOCAB), gumbel(5, rows.cuda(), steps.cuda(), VOCAB).cpu()
    assert (here != there).float().mean().item() < 1e-5
    assert torch.allclose(here, there, rtol=3e-7, atol=0)


@pytest.mark.parametrize("sampling", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cpu_chooses_the_same_tokens(sampling: Sampling, dtype: torch.dtype) -> None:
    logits, rows = drawn_logits(24, dtype), torch.arange(24)
    here = choose(logits, sampling, rows, rows * 3)
    assert torch.equal(choose(logits.cuda(), sampling, rows.cuda(), rows.cuda() * 3).cpu(), here)


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_a_graph_chooses_the_same_tokens(sampling: Sampling) -> None:
    logits, rows, steps = drawn_logits(8).cuda(), torch.arange(8).cuda(), torch.zeros(8, dtype=torch.int64).cuda()
    choose(logits, sampling, rows, steps)  # loads the kernels, which a recording cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = choose(logits, sampling, rows, steps)
    for step in range(5):
        steps.fill_(step)
        logits.copy_(logits.roll(step, -1))
        graph.replay()
        assert torch.equal(chosen, choose(logits, sampling, rows, steps)), step


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_the_host_waits_for_nothing(sampling: Sampling) -> None:
    logits, rows = drawn_logits(4).cuda(), torch.arange(4).cuda()
    choose(logits, sampling, rows, rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        choose(logits, sampling, rows, rows)
        with pytest.raises(RuntimeError, match="synchroniz"):
            logits.amax().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("rows", "bound_s"), [(1, 4e-3), (64, 20e-3)])
def test_a_step_takes_little_of_a_decode_step(rows: int, bound_s: float) -> None:
    logits, where, sampling = drawn_logits(rows).cuda(), torch.arange(rows).cuda(), Sampling(0.8, 50, 0.9)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        choose(logits, sampling, where, where)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    assert statistics.median(times[2:]) < bound_s, times
