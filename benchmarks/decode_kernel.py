"""Launches of the split-KV decode kernels, swept on one GPU: time, bytes a second, share of a device copy.

Each figure is the median of replays of one CUDA graph of 20 calls or more over different caches, together larger than
any L2 cache, so that what is measured is memory. Every launch is checked against attention in fp32 first.
Run: python benchmarks/decode_kernel.py [--seconds 170] [--out sweep.jsonl] [--cases NAME ...]
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from headgrid.runtime.kernels import split_kv
from headgrid.runtime.kernels.split_kv import LEAST_KEYS, Plan

SPREAD_BYTES = 400 << 20  # caches of one case together, several times an L2 cache
MARGIN = 32  # positions a cache has beyond the length


@dataclass(frozen=True)
class Case:
    batch: int
    kv_heads: int
    group: int
    length: int = 10_000
    width: int = 128

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.kv_heads}x{self.group}@{self.length}" + f"d{self.width}" * (self.width != 128)

    @property
    def pairs(self) -> int:
        return self.batch * self.kv_heads

    @property
    def size_bytes(self) -> int:
        return 4 * self.pairs * self.length * self.width


CASES = [
    *(Case(batch, 1, group) for batch, group in ((1, 16), (16, 16), (32, 32), (64, 16), (128, 8))),  # one-query table
    *(Case(batch, kv_heads, 32 // kv_heads) for batch, kv_heads in ((32, 32), (128, 8), (128, 2), (1, 32))),
    *(Case(1, kv_heads, 32 // kv_heads, 100_000) for kv_heads in (1, 2, 4, 8, 32)),
    *(Case(8, kv_heads, 32 // kv_heads) for kv_heads in (1, 2, 8, 32)),
    *(Case(1, kv_heads, 32 // kv_heads) for kv_heads in (1, 2, 8)),
    *(Case(batch, kv_heads, 32 // kv_heads, 1000) for batch, kv_heads in ((1, 32), (1, 1), (8, 8), (128, 2), (128, 8))),
    *(Case(1, 8, 4, 100, 128), Case(32, 8, 4, 10_000, 64), Case(32, 8, 4, 10_000, 256)),
]
TILES = [(16, 2, 4), (32, 2, 4), (64, 2, 3), (64, 4, 2), (64, 4, 3), (128, 4, 2), (128, 4, 3)]  # block, warps, stages


@dataclass
class Caches:
    """One case's queries and caches, and what attention to the first and the last of them gives."""

    case: Case
    q: Tensor
    layers: list[tuple[Tensor, Tensor]]
    positions: Tensor
    expected: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.expected = [self.attend(k, v) for k, v in (self.layers[0], self.layers[-1])]

    def attend(self, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for i in range(self.case.batch):
            q, mine, values = (x[i : i + 1].transpose(1, 2).float() for x in (self.q, k, v))
            mine, values = (x[:, :, : self.case.length] for x in (mine, values))
            rows.append(F.scaled_dot_product_attention(q, mine, values, enable_gqa=True).transpose(1, 2))
        return torch.cat(rows)

    def run(self, launch: Plan) -> list[Tensor]:
        scale = self.case.width**-0.5
        return [split_kv.decode(self.q, k, v, self.positions, scale, launch=launch)[0] for k, v in self.layers]

    def error(self, outs: list[Tensor]) -> float:
        pairs = zip((outs[0], outs[len(self.layers) - 1]), self.expected, strict=True)
        return max(float((out - wide).norm() / wide.norm()) for out, wide in pairs)


def caches(case: Case) -> Caches:
    shape = (case.batch, case.length + MARGIN, case.kv_heads, case.width)
    count = max(1, min(80, math.ceil(SPREAD_BYTES / case.size_bytes)))
    layers = []
    for _ in range(count):
        pair = tuple(torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(2))
        for x in pair:
            x[:, case.length :] = float("nan")
        layers.append(pair)
    q = torch.randn(case.batch, 1, case.kv_heads * case.group, case.width, device="cuda", dtype=torch.float16)
    return Caches(case, q, layers, torch.full((case.batch,), case.length - 1, device="cuda"))


def graph_s(work: Callable[[], object], calls: int) -> float:
    """Seconds of one of the `calls` that `work` makes, when replayed as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return timed_s(graph.replay) / calls


def timed_s(work: Callable[[], object]) -> float:
    times = []
    for n in range(15):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        if n > 3:
            times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def measured(data: Caches, launch: Plan) -> float:
    """Seconds a call, or infinity (and a line that says why) where the launch fails or is wrong."""
    try:
        error = data.error(data.run(launch))
        if not error < 2e-3:
            raise ArithmeticError(f"relative error {error:.2e}")
        calls = max(4, min(20, (4 << 30) // data.case.size_bytes))
        rounds = math.ceil(calls / len(data.layers))
        kept: list[list[Tensor]] = []
        seconds = graph_s(lambda: kept.extend(data.run(launch) for _ in range(rounds)), rounds * len(data.layers))
        if not max(data.error(outs) for outs in kept) < 2e-3:
            raise ArithmeticError("wrong when replayed")
        return seconds
    except Exception as error:  # a launch that needs too much shared memory, say: the sweep goes on
        print(f"  {data.case.name} {launch}: {type(error).__name__} {str(error)[:150]}", flush=True)
        return math.inf


def copy_bytes_per_s() -> float:
    """Outside of a graph, where copies are slower: 2760 GB/s on an H200 that copies 4240."""
    source = torch.randn(1 << 29, device="cuda", dtype=torch.float16)
    target = torch.empty_like(source)
    return 10 * 2 * source.numel() * 2 / timed_s(lambda: [target.copy_(source) for _ in range(10)])


def product(case: Case, device: torch.device) -> Plan:
    """What the library takes."""
    chip = split_kv._chip(device)
    return split_kv.plan(
        case.pairs, case.length + MARGIN, case.group, 4 * case.width, chip.processors, chip.shared_bytes
    )


def sweep(data: Caches, first: Plan, note: Callable[[Plan, float], None]) -> dict[Plan, float]:
    """One choice after the other, each with the best two of those before it: about 20 launches."""
    times: dict[Plan, float] = {}

    def ranked(launches: list[Plan]) -> list[Plan]:
        for launch in launches:
            if launch not in times:
                times[launch] = measured(data, launch)
                note(launch, times[launch])
        return sorted(times, key=lambda launch: times[launch])

    best = ranked([first, replace(first, chained=True)])[0]
    tiles = [replace(best, block=block, warps=warps, stages=stages) for block, warps, stages in TILES]
    leaders = [launch for launch in ranked(tiles) if launch.chained == best.chained][:2]
    most = max(1, data.case.length // LEAST_KEYS)
    splits = {min(most, max(1, round(best.splits * ratio))) for ratio in (0.5, 0.75, 1.5, 2, 3)}
    best = ranked([replace(leader, splits=n) for leader in leaders for n in sorted(splits)])[0]
    if best.splits > 1:
        ranked([replace(best, columns=columns) for columns in (16, 32, 64, 256)])
    return times


def table(case: Case, times: dict[Plan, float], first: Plan, copy: float) -> None:
    best = sorted(times, key=lambda launch: times[launch])
    other = [launch for launch in best if launch.chained != best[0].chained][:1]
    for launch in dict.fromkeys([*best[:4], *other, first]):
        rate = case.size_bytes / times[launch]
        mark = "*" if launch == best[0] else "p" if launch == first else " "
        how = f"{launch.splits:4d} x ({launch.block},{launch.warps},{launch.stages}) / {launch.columns}"
        how += " chained" * launch.chained
        print(
            f"{mark} {case.name:16s} {how:32s} {times[launch] * 1e6:8.2f} us {rate / 1e9:6.0f} GB/s {rate / copy:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=170, help="no case starts after this")
    parser.add_argument("--out", type=Path, help="every figure, one JSON record a line")
    parser.add_argument("--cases", nargs="*", help="names such as 1x1x16@10000")
    parser.add_argument("--product", action="store_true", help="no sweep: only the launches that the product takes")
    options = parser.parse_args()
    began, copy = time.monotonic(), copy_bytes_per_s()
    device = torch.cuda.get_device_properties(0)
    print(f"{device.name}, {device.multi_processor_count} processors, device copy {copy / 1e9:.0f} GB/s (read + write)")
    print("* best of the case, p what the product takes: splits x (block, warps, stages) / columns merged", flush=True)
    with open(options.out or "/dev/null", "a", encoding="utf-8") as out:
        for case in CASES:
            if (options.cases and case.name not in options.cases) or time.monotonic() - began > options.seconds:
                continue

            def note(launch: Plan, seconds: float, case: Case = case) -> None:
                record = asdict(case) | asdict(launch) | {"seconds": seconds, "copy_bytes_per_s": copy}
                out.write(json.dumps(record) + "\n")
                out.flush()

            torch.manual_seed(0)
            data = caches(case)
            first = product(case, data.q.device)
            times = {first: measured(data, first)} if options.product else sweep(data, first, note)
            table(case, times, first, copy)
            print(f"  {len(times)} launches, {time.monotonic() - began:.0f} s in", flush=True)
            del data
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
