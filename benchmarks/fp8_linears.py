"""Times the linears of the seed's model in fp16 and in FP8: products, quantisation, and both together.

    python benchmarks/fp8_linears.py

Needs one GPU of compute capability 8.9 or more. Rows are tokens: 10 000 of a prefill's call, 128 and 1 of a decode
step. Each figure is the median of interleaved rounds, so that clocks and heat weigh on all alike; the error is the
relative L2 one against fp64 on the first 256 tokens.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from headgrid.reference import relative_error
from headgrid.runtime import quantised as fp8
from headgrid.runtime.quantised import Quantised, linear, quantised

SHAPES = (  # name, inputs, outputs
    ("qkv", 4096, 12288),
    ("o", 4096, 4096),
    ("up", 4096, 16384),
    ("down", 16384, 4096),
)
TOKENS = (10_000, 128, 1)
ROUNDS, CHECKED = 7, 256
Work = Callable[[], object]


def rounds(works: dict[str, Work], calls: int) -> dict[str, float]:
    """Median seconds of a call of each, over interleaved rounds of so many calls; replayed from CUDA graphs, so that a
    short call is not the host's time.
    """
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, work in works.items():
        work()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for _ in range(calls):
                work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(ROUNDS + 1):
        for name, graph in graphs.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            graph.replay()
            torch.cuda.synchronize()
            if turn:  # the first one warms up
                seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(name: str, tokens: int, inputs: int, outputs: int) -> dict[str, float]:
    """Time and print one product; returns seconds by what was done."""
    torch.manual_seed(0)
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.float16)
    plain = torch.randn(outputs, inputs, device="cuda", dtype=torch.float16) / inputs**0.5
    weight = Quantised(*quantised(plain))
    values, scales = quantised(x)
    out = fp8._result_dtype(x.dtype, x.device)
    works: dict[str, Work] = {
        "fp16": lambda: F.linear(x, plain),
        "fp8 product": lambda: fp8._scaled_mm(values, scales, weight, out),
        "quantise": lambda: quantised(x),
        "fp8 linear": lambda: linear(x, weight),
    }
    found = rounds(works, max(2, min(50, 200_000 // tokens)))
    flops, size_bytes = 2 * tokens * inputs * outputs, inputs * outputs
    exact = x[:CHECKED].double() @ plain.double().t()
    errors = [relative_error(y[:CHECKED], exact) for y in (F.linear(x, plain), linear(x, weight))]
    print(f"{name}: {tokens} x {inputs} x {outputs}, FP8 gives {out}; errors {errors[0]:.2e} and {errors[1]:.2e}")
    for what, seconds in found.items():
        rate = f"{flops / seconds / 1e12:7.0f} TFLOP/s" if what != "quantise" else f"{_rate(x, seconds):7.2f} TB/s   "
        weights = size_bytes * (2 if what == "fp16" else 1) / seconds / 1e12
        read = f"  weights at {weights:5.2f} TB/s" if tokens < 1000 and what != "quantise" else ""
        print(f"  {what:12s} {seconds * 1e6:10.1f} us  {rate}{read}  x{found['fp16'] / seconds:5.2f}", flush=True)
    return found


def _rate(x: Tensor, seconds: float) -> float:
    """TB/s that a fused kernel would move: x read once, e4m3 written."""
    return 3 * x.numel() / seconds / 1e12


def main() -> None:
    """All shapes; for each number of tokens the sum over a layer's four products."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for tokens in TOKENS:
        layers = [measure(name, tokens, inputs, outputs) for name, inputs, outputs in SHAPES]
        sums = {what: sum(each[what] for each in layers) for what in layers[0]}
        told = ", ".join(f"{what} {seconds * 1e6:,.1f} us" for what, seconds in sums.items())
        print(f"a layer's linears, {tokens} tokens: {told}; FP8 / fp16 {sums['fp8 linear'] / sums['fp16']:.3f}\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
