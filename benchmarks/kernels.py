"""Single kernels of one rank of n2m2 (10 000 tokens, 16 heads of 128 channels, fp16) on one GPU: what layouts copy.

The source of the single-kernel figures in docs/log.md, but for attention in decode, which decode_kernel.py measures.
Run: python benchmarks/kernels.py
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from headgrid.runtime.kernels import fused
from headgrid.spec.model import find_model

TOKENS, HEADS, SLICES, WIDTH = 10_000, 16, 2, 64


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float16)


def bench(name: str, work: Callable[[], object], *, size_bytes: int = 0, flops: int = 0, calls: int = 20) -> None:
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / calls
    rates = [f"{size_bytes / seconds / 1e12:.2f} TB/s"] * bool(size_bytes)
    rates += [f"{flops / seconds / 1e12:.0f} TFLOP/s"] * bool(flops)
    print(f"{name:48s} {seconds * 1e6:9.1f} us  {' '.join(rates)}", flush=True)


def joins() -> None:
    """Ways to put the slices' projections together after an all-to-all."""
    received = random(SLICES * TOKENS * 3 * HEADS * WIDTH)
    parts = [part.view(TOKENS, 3 * HEADS, WIDTH) for part in received.split(TOKENS * 3 * HEADS * WIDTH)]
    size_bytes = 2 * received.numel() * 2

    def three() -> list[torch.Tensor]:
        return [torch.cat(pieces, -1) for pieces in zip(*(part.split(HEADS, 1) for part in parts), strict=True)]

    bench("q, k, v: three cats of strided views", three, size_bytes=size_bytes)
    bench("q, k, v: one cat of contiguous blocks", lambda: torch.cat(parts, -1), size_bytes=size_bytes)


def stores() -> None:
    """The two orders of a KV cache."""
    keys = random(1, TOKENS, HEADS, 128)
    heads_first, positions_first = random(1, HEADS, TOKENS + 32, 128), random(1, TOKENS + 32, HEADS, 128)
    size_bytes = 2 * keys.numel() * 2
    bench("store, heads first", lambda: heads_first[:, :, :TOKENS].copy_(keys.transpose(1, 2)), size_bytes=size_bytes)
    bench("store, positions first", lambda: positions_first[:, :TOKENS].copy_(keys), size_bytes=size_bytes)


def sums() -> None:
    """A sum with the norm behind it, by torch and as one kernel, in decode and in prefill."""
    model = find_model("seed")
    for tokens in (1, 128, TOKENS):
        x, y, weight, bias = random(tokens, 4096), random(tokens, 4096), random(4096), random(4096)
        with torch.no_grad():
            two = partial(lambda a, b, *norm: F.layer_norm(a.add_(b), (4096,), *norm), x, y, weight, bias)
            bench(f"add, norm, {tokens} tokens", two)
            one = partial(fused.add_norm, x, y, (weight, bias), model, torch.float16)
            bench(f"add and norm, {tokens} tokens", one, size_bytes=8 * x.numel())


def gelus() -> None:
    """GELU as a kernel of its own, and in the epilogue of the product."""
    x, weight, bias = random(TOKENS, 4096), random(16_384, 4096) * 0.02, random(16_384) * 0
    flops = 2 * TOKENS * 4096 * 16_384
    units = F.linear(x, weight)
    bench("product", lambda: F.linear(x, weight), flops=flops)
    bench("gelu", lambda: torch.ops.aten.gelu_(units, approximate="tanh"), size_bytes=4 * units.numel())
    epilogue = torch.ops.aten._addmm_activation
    bench("product with gelu", lambda: epilogue(bias, x, weight.t(), use_gelu=True), flops=flops)


if __name__ == "__main__":
    for group in (joins, stores, sums, gelus):
        group()
