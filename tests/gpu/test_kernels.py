"""Kernels on a real GPU against fp64 arithmetic, with poisoned memory around what they may read."""

import math

import pytest
import torch
from torch import Tensor

from headgrid.layout.shards import Shard
from headgrid.layout.span import Span
from headgrid.reference import relative_error
from headgrid.runtime import attention
from headgrid.runtime.attention import Position
from headgrid.runtime.weights import draw
from headgrid.spec.model import find_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]

SHAPES = [  # sequences, query heads, KV heads, d, u, length, capacity
    (3, 4, 2, 64, 64, 1, 300),
    (4, 8, 8, 128, 128, 777, 1000),
    (2, 28, 4, 128, 128, 2048, 2049),
    (2, 16, 1, 128, 32, 5000, 8192),
    (1, 32, 4, 128, 64, 4097, 4100),
    (5, 6, 3, 32, 16, 64, 64),
    (2, 8, 4, 8, 8, 100, 100),
    (2, 20, 10, 96, 80, 3000, 4000),
]


def exact(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_attention_is_as_exact_as_its_dtype_allows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    b, heads, kv_heads, d, u, length, capacity = shape
    torch.manual_seed(length)
    q = 3 * random(b, 1, heads, d, dtype=dtype)  # peaky
    k, v = random(b, capacity, kv_heads, d, dtype=dtype), random(b, capacity, kv_heads, u, dtype=dtype)
    k[:, length:], v[:, length:] = float("nan"), float("nan")  # what was never written must never be read
    position = Position(length - 1, torch.tensor([length - 1], device="cuda"))
    out = attention.decode(q, k, v, position, 1 / math.sqrt(d))
    expected = exact(q, k[:, :length], v[:, :length], causal=False)
    bound = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6}[dtype]
    assert relative_error(out, expected) < bound
    wrong = exact(q, k[:, :length], v[:, :length].roll(1, 1), causal=False)
    assert length == 1 or relative_error(out, wrong) > 10 * bound


@pytest.mark.parametrize("widths", [(128, 128), (128, 64), (64, 64)])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_prefill_attention_takes_narrow_values_and_grouped_heads(widths: tuple[int, int], kv_heads: int) -> None:
    d, u = widths
    torch.manual_seed(0)
    flat = random(2, 513, 8 * d + kv_heads * (d + u), dtype=torch.float16)
    q, k, v = flat.split([8 * d, kv_heads * d, kv_heads * u], dim=-1)
    q, k, v = q.unflatten(-1, (8, d)), k.unflatten(-1, (kv_heads, d)), v.unflatten(-1, (kv_heads, u))
    out = attention.prefill(q, k, v, 1 / math.sqrt(d))
    assert out.transpose(1, 2).shape == (2, 8, 513, u)
    assert relative_error(out, exact(q, k, v, causal=True)) < 1e-3
    assert relative_error(out, exact(q, k, v, causal=False)) > 0.1


def test_a_gpu_draws_the_bits_that_a_cpu_draws() -> None:
    model = find_model("seed")
    shard = Shard((16384, 4096), (Span(5, 90), Span(8000, 8100)), (Span(17, 4001),))
    for name in ("layers.3.mlp.up.weight", "layers.0.attention.q.weight"):
        on_gpu = draw(model, 7, name, shard, dtype=torch.float16, device="cuda")
        on_cpu = draw(model, 7, name, shard, dtype=torch.float16)
        assert torch.equal(on_gpu.cpu(), on_cpu)
        assert not torch.equal(on_cpu, draw(model, 8, name, shard, dtype=torch.float16))
