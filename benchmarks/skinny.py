"""Products of few rows with the seed model's weights, by cuBLAS and by `skinny_product`, on one GPU.

Each figure is the median of replays of one CUDA graph of 16 products or more with different weights, together larger
than any L2 cache, so that what is measured is memory. Every launch is checked against fp32 first, its output poisoned.
At last four layers without their exchanges, as decode runs them: norms, products, attention to 1000 positions.
Run: python benchmarks/skinny.py [--product] [--rows 1 8 64] [--shapes 4096x4096 ...] [--out sweep.jsonl]
"""

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import skinny_product as skinny
import torch
from skinny_product import Plan
from torch import Tensor

from headgrid.runtime.kernels import fused, power_of_two, split_kv
from headgrid.spec.model import find_model

SPREAD_BYTES = 400 << 20  # weights of one shape together, several times an L2 cache
WIDTH, UNITS, HEAD = 4096, 16_384, 128
SHAPES = [  # inputs, outputs: of one rank of 1, 2 and 4
    *((4096, 12_288), (4096, 4096), (4096, 16_384), (16_384, 4096)),
    *((4096, 6144), (2048, 4096), (4096, 8192), (8192, 4096)),
    *((4096, 3072), (1024, 4096)),
    (4096, 32_000),
]
SINGLE = [(2, 4096, 4), (2, 4096, 8), (1, 4096, 4), (4, 2048, 4), (8, 1024, 4)]  # outs, inner, warps: of a single row
TILES = {  # by padded rows: outs, inner, warps, stages
    16: [(32, 256, 4, 4), (64, 128, 4, 4), (64, 128, 4, 6)],
    32: [(32, 256, 4, 4), (64, 128, 4, 4), (64, 128, 4, 5), (64, 128, 4, 6), (128, 64, 4, 5)],
    64: [(64, 128, 4, 4), (64, 128, 4, 5), (64, 64, 4, 7), (128, 64, 4, 5)],
}


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float16).mul_(scale)


def graph_s(work: Callable[[], object], calls: int, runs: int = 9) -> float:
    """Seconds of one of the `calls` that `work` makes, when replayed as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for n in range(runs + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if n > 1:
            times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times) / calls


class Case:
    """Rows, weights of one shape at several places of one buffer, and exact products with the first and the last."""

    def __init__(self, rows: int, inputs: int, outputs: int, buffer: Tensor) -> None:
        size = inputs * outputs
        count = max(16, math.ceil(SPREAD_BYTES / 2 / size))
        step = min((buffer.numel() - size) // (count - 1), size) // 64 * 64
        self.name, self.size_bytes = f"{rows}x{inputs}x{outputs}", 2 * size
        self.x = random(rows, inputs)
        self.weights = [buffer[n * step : n * step + size].view(outputs, inputs) for n in range(count)]
        self.exact = [self.x.float() @ w.float().t() for w in (self.weights[0], self.weights[-1])]
        self.out = torch.empty(rows, outputs, device="cuda", dtype=torch.float16)

    def error(self, launch: Plan | None) -> float:
        """The largest relative error of both products, into poisoned memory."""
        errors = []
        for w, exact in zip((self.weights[0], self.weights[-1]), self.exact, strict=True):
            self.run(launch, [w], self.out.fill_(float("nan")))
            errors.append(float((self.out - exact).norm() / exact.norm()))
        return max(errors) if all(map(math.isfinite, errors)) else math.inf

    def run(self, launch: Plan | None, weights: list[Tensor], out: Tensor) -> None:
        for w in weights:
            if launch is None:
                torch.mm(self.x, w.t(), out=out)
            else:
                skinny.product(self.x, w, out=out, launch=launch)

    def seconds(self, launch: Plan | None) -> float:
        """Of one product, or infinity (and a line that says why) where the launch fails or is wrong."""
        try:
            error = self.error(launch)
            if not error < 1e-3:
                raise ArithmeticError(f"relative error {error:.2e}")
            seconds = graph_s(lambda: self.run(launch, self.weights, self.out), len(self.weights))
            if not float((self.out - self.exact[1]).norm() / self.exact[1].norm()) < 1e-3:
                raise ArithmeticError("wrong when replayed")
            return seconds
        except Exception as error:  # a launch that needs too much shared memory, say: the sweep goes on
            print(f"  {self.name} {launch}: {type(error).__name__} {str(error)[:150]}", flush=True)
            return math.inf


def launches(rows: int, inputs: int, outputs: int) -> Iterator[Plan]:
    """Tiles, each with about one and two programs for each processor."""
    if rows == 1:
        yield from (Plan(outs, k, warps, 0) for outs, k, warps in SINGLE if k <= inputs)
    for outs, inner, warps, stages in TILES[max(16, power_of_two(rows))]:
        tiles, blocks = -(-outputs // outs), inputs // inner
        splits = {max(1, min(blocks // 2, 8, round(132 * n / tiles))) for n in (1, 2) if tiles < 132 * n * 1.4}
        for n in sorted(splits or {1}):
            yield Plan(outs, inner, warps, stages, n, 16_384 // outs)


def sweep(case: Case, rows: int, inputs: int, outputs: int) -> dict[Plan, float]:
    times = {launch: case.seconds(launch) for launch in launches(rows, inputs, outputs)}
    best = min(times, key=lambda launch: times[launch])
    for size_bytes in (0, 16 << 10, 64 << 10):
        if best.stages:
            other = replace(best, ahead=size_bytes // 2 // best.outs)
            times[other] = case.seconds(other)
    return times


def product(rows: int, inputs: int, outputs: int) -> Plan | None:
    """What the library takes."""
    return skinny.plan(rows, inputs, outputs, torch.cuda.get_device_properties(0).multi_processor_count)


def compiled(part: int, parts: int = 14) -> None:
    """Fill the compiler's cache, so that the sweep need not wait for it."""
    work = [(rows, launch) for rows in (1, *TILES) for launch in launches(rows, 4096, 4096)]
    seen = {(rows, replace(launch, splits=min(2, launch.splits))): launch for rows, launch in work}
    for rows, launch in [(rows, launch) for (rows, _), launch in seen.items()][part::parts]:
        for splits in {1, launch.splits}:
            skinny.product(random(rows, 4096), random(4096, 4096), launch=replace(launch, splits=splits))
    torch.cuda.synchronize()


def layers(tp: int, rows: int, plans: dict[tuple[int, int], Plan | None]) -> float:
    """Seconds of a layer of one of `tp` ranks, without exchanges; products by cuBLAS where there is no plan."""
    model, count, heads = find_model("seed"), 4, 32 // tp
    shapes = [(WIDTH, 3 * WIDTH // tp), (WIDTH // tp, WIDTH), (WIDTH, UNITS // tp), (UNITS // tp, WIDTH)]
    weights = [[random(o, k, scale=0.01) for k, o in shapes] for _ in range(max(count, tp))]
    caches = [[random(rows, 1000, 1, HEAD) for _ in range(2)] for _ in weights]
    norm, positions = (random(WIDTH), random(WIDTH)), torch.full((rows,), 999, device="cuda")
    no_bias = torch.zeros(UNITS // tp, device="cuda", dtype=torch.float16)
    x = random(rows, WIDTH)

    def add(x: Tensor, y: Tensor, w: Tensor) -> None:
        how = plans.get((w.shape[1], w.shape[0]))
        if how is None:
            x.addmm_(y, w.t())
        else:
            skinny.product(y, w, out=x, add=True, launch=how)

    def run() -> None:
        for (qkv, o, up, down), (k, v) in zip(weights, caches, strict=True):
            y, how = fused.add_norm(x, None, norm, model, x.dtype), plans.get((WIDTH, len(qkv)))
            y = y @ qkv.t() if how is None else skinny.product(y, qkv, launch=how)
            q = y[:, : heads * HEAD].unflatten(1, (1, heads, HEAD))
            y = split_kv.decode(q, k, v, positions, HEAD**-0.5)[0].flatten(1)
            add(x, y, o)
            y, how = fused.add_norm(x, None, norm, model, x.dtype), plans.get((WIDTH, len(up)))
            if how is None:
                y = torch.ops.aten._addmm_activation(no_bias, y, up.t(), use_gelu=True)
            else:
                y = skinny.product(y, up, kind="gelu_tanh", launch=how)
            add(x, y, down)

    run()
    return graph_s(run, len(weights), 15)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 16, 32, 64])
    parser.add_argument("--shapes", nargs="*", default=[f"{k}x{o}" for k, o in SHAPES])
    parser.add_argument("--product", action="store_true", help="no sweep: only the launches that the product takes")
    parser.add_argument("--seconds", type=float, default=60, help="no case starts after this")
    parser.add_argument("--out", type=Path, help="every figure, one JSON record a line")
    options = parser.parse_args()
    began = time.monotonic()
    if not options.product:
        with ProcessPoolExecutor(14, multiprocessing.get_context("fork")) as pool:
            list(pool.map(compiled, range(14)))
    print(f"{torch.cuda.get_device_name()}, {time.monotonic() - began:.0f} s in", flush=True)
    torch.manual_seed(0)
    buffer, found = random(1 << 30, scale=0.02), {}
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    with open(options.out or "/dev/null", "a", encoding="utf-8") as out:
        for inputs, outputs in shapes:
            for rows in options.rows:
                if time.monotonic() - began > options.seconds:
                    continue
                case = Case(rows, inputs, outputs, buffer)
                cublas = case.seconds(None)
                if options.product:
                    how = product(rows, inputs, outputs)
                    times = {} if how is None else {how: case.seconds(how)}
                else:
                    times = sweep(case, rows, inputs, outputs)
                best = sorted(times, key=lambda launch: times[launch])
                found[rows, inputs, outputs] = next((n for n in best if times[n] < cublas), None)
                table(case, cublas, times, best)
                for launch in [None, *best]:
                    seconds = cublas if launch is None else times[launch]
                    record = {"rows": rows, "inputs": inputs, "outputs": outputs, "seconds": seconds}
                    out.write(json.dumps(record | (asdict(launch) if launch else {"cublas": True})) + "\n")
        print(f"{time.monotonic() - began:.0f} s in", flush=True)
    del buffer
    for tp in (1, 2, 4):
        for rows in options.rows:
            plans = {(k, o): plan for (b, k, o), plan in found.items() if b == rows}
            mine, theirs = layers(tp, rows, plans), layers(tp, rows, {})
            size = 2 * WIDTH * (4 * WIDTH + 2 * UNITS) // tp
            print(f"layer of tp{tp}, {rows:3d} rows: cuBLAS {theirs * 1e6:7.2f} us, skinny {mine * 1e6:7.2f}, "
                  f"ratio {mine / theirs:.3f}, weights {size / mine / 1e12:.2f} TB/s of its time")  # fmt: skip
    print(f"{time.monotonic() - began:.0f} s in", flush=True)


def table(case: Case, cublas: float, times: dict[Plan, float], best: list[Plan]) -> None:
    size = case.size_bytes / 1e12
    print(f"{case.name:16s} cuBLAS {cublas * 1e6:7.2f} us {size / cublas:5.2f} TB/s", flush=True)
    for launch in best[:3]:
        s = times[launch]
        how = f"({launch.outs},{launch.inner},{launch.warps},{launch.stages}) / {launch.splits}"
        how += f" ahead {launch.ahead * launch.outs * 2 >> 10} K"
        print(f"   {how:36s} {s * 1e6:7.2f} us {size / s:5.2f} TB/s {s / cublas:.3f} of cuBLAS", flush=True)


if __name__ == "__main__":
    main()
