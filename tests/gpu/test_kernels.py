"""Kernels on a real GPU against fp64 arithmetic, with poisoned memory around what they may read."""

import math

import pytest
import torch
from torch import Tensor

from headgrid.layout.shards import Shard
from headgrid.layout.span import Span
from headgrid.reference import relative_error
from headgrid.runtime import attention
from headgrid.runtime.attention import Keys, Queries, Rule
from headgrid.runtime.weights import draw
from headgrid.spec.model import find_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]

BOUNDS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6}
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


def exact(q: Tensor, k: Tensor, v: Tensor, rule: Rule, starts: list[int]) -> Tensor:
    """Attention in fp64; the queries of sequence i stand at starts[i], starts[i] + 1, ..."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * rule.scale
    if rule.softcap:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    at = torch.tensor(starts, device=q.device)[:, None] + torch.arange(q.shape[2], device=q.device)
    keys = torch.arange(k.shape[2], device=q.device)
    hidden = keys > at[..., None] if rule.is_causal else torch.zeros(1, dtype=torch.bool, device=q.device)
    if rule.window:
        hidden = hidden | (keys <= at[..., None] - rule.window)
    scores.masked_fill_(hidden[:, None] if hidden.dim() > 1 else hidden, float("-inf"))
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


def decoding(positions: list[int]) -> Queries:
    return Queries(1, tuple(positions), torch.tensor(positions, device="cuda"), decoding=True)


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
    rule = Rule(1 / math.sqrt(d))
    out = attention.attend(q, k, v, decoding([length - 1] * b), rule)
    expected = exact(q, k[:, :length], v[:, :length], rule, [length - 1] * b)
    assert relative_error(out, expected) < BOUNDS[dtype]
    wrong = exact(q, k[:, :length], v[:, :length].roll(1, 1), rule, [length - 1] * b)
    assert length == 1 or relative_error(out, wrong) > 10 * BOUNDS[dtype]


@pytest.mark.parametrize("rule", [Rule(0.1), Rule(0.1, window=100), Rule(0.2, softcap=3.0)], ids=str)
@pytest.mark.parametrize("stride", [1, 3, 5])
def test_decode_takes_sequences_of_any_length_and_merges_parts_of_the_keys(rule: Rule, stride: int) -> None:
    torch.manual_seed(1)
    positions = [0, 1, 99, 100, 2047, 2048, 4500]
    q = 3 * random(7, 1, 8, 64, dtype=torch.float16)
    k, v = random(7, 4600, 2, 64, dtype=torch.float16), random(7, 4600, 2, 48, dtype=torch.float16)
    expected = exact(q, k, v, rule, positions)
    for i, position in enumerate(positions):
        k[i, position + 1 :], v[i, position + 1 :] = float("nan"), float("nan")
    queries = decoding(positions)
    parts = [
        attention.attend_part(q, k[:, r::stride], v[:, r::stride], queries, rule, Keys(r, stride))
        for r in range(stride)
    ]
    merged = attention.merge(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]))
    assert relative_error(merged, expected) < 1e-3
    assert relative_error(attention.attend(q, k, v, queries, rule), expected) < 1e-3
    empty = parts[-1]
    assert stride == 1 or (empty[1][0].isneginf().all() and not empty[0][0].any()), "no key of this part is visible yet"
    equal_weights = torch.stack([out for out, _ in parts]).mean(0)
    assert stride == 1 or relative_error(equal_weights, expected) > 0.01


RULES = (Rule(0.1), Rule(0.1, window=50), Rule(0.2, softcap=3.0))
STARTS = [(0, rule) for rule in (*RULES, Rule(0.1, is_causal=False))] + [(130, rule) for rule in RULES]


@pytest.mark.parametrize(("start", "rule"), STARTS, ids=str)
def test_prefill_takes_windows_caps_and_chunks(start: int, rule: Rule) -> None:
    torch.manual_seed(2)
    q, k, v = (random(2, 300, heads, 64, dtype=torch.float16) for heads in (8, 2, 2))
    length = start + 150 if rule.is_causal else 300
    k, v, q = k[:, :length], v[:, :length], q[:, start:length]
    queries = Queries(q.shape[1], (start, start), torch.full((2,), start, device="cuda"))
    out = attention.attend(q, k, v, queries, rule)
    assert relative_error(out, exact(q, k, v, rule, [start, start])) < 1e-3
    assert relative_error(out, exact(q, k.roll(1, 1), v, rule, [start, start])) > 0.1


@pytest.mark.parametrize("widths", [(128, 128), (128, 64), (64, 64)])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_prefill_attention_takes_narrow_values_and_grouped_heads(widths: tuple[int, int], kv_heads: int) -> None:
    d, u = widths
    torch.manual_seed(0)
    flat = random(2, 513, 8 * d + kv_heads * (d + u), dtype=torch.float16)
    q, k, v = flat.split([8 * d, kv_heads * d, kv_heads * u], dim=-1)
    q, k, v = q.unflatten(-1, (8, d)), k.unflatten(-1, (kv_heads, d)), v.unflatten(-1, (kv_heads, u))
    rule = Rule(1 / math.sqrt(d))
    out = attention.attend(q, k, v, Queries(513, (0, 0), torch.zeros(2, dtype=torch.int64, device="cuda")), rule)
    assert out.transpose(1, 2).shape == (2, 8, 513, u)
    assert relative_error(out, exact(q, k, v, rule, [0, 0])) < 1e-3
    assert relative_error(out, exact(q, k, v, Rule(rule.scale, is_causal=False), [0, 0])) > 0.1


def test_a_gpu_draws_the_bits_that_a_cpu_draws() -> None:
    model = find_model("seed")
    shard = Shard((16384, 4096), (Span(5, 90), Span(8000, 8100)), (Span(17, 4001),))
    for name in ("layers.3.mlp.up.weight", "layers.0.attention.q.weight"):
        on_gpu = draw(model, 7, name, shard, dtype=torch.float16, device="cuda")
        on_cpu = draw(model, 7, name, shard, dtype=torch.float16)
        assert torch.equal(on_gpu.cpu(), on_cpu)
        assert not torch.equal(on_cpu, draw(model, 8, name, shard, dtype=torch.float16))
