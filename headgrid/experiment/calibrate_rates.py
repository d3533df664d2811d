"""What one device sustains: products, attention, memory, launches. Runs on every rank at the same time.

Work is repeated for seconds without a pause, in windows that the host times from one synchronisation to the next; the
windows are the samples (`calibrate_fit.measured`). Data are random: zeros would let a power-capped GPU run faster.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from headgrid.runtime.attention import Queries, Rule, attend
from headgrid.runtime.quantised import LEAST_CAPABILITY, Quantised, Rounded, linear, quantised

WINDOW_S = {"cuda": 0.05, "cpu": 0.02}
"""Long against a synchronisation and the reading of a clock, short against the time in which clocks change."""
PRODUCTS = {
    "cuda": ((8192, 4096, 16_384), (8192, 16_384, 4096), (8192, 4096, 12_288)),
    "cpu": ((256, 1024, 1024),),
}
"""Tokens x inputs by inputs x outputs: the MLP's two matrices and W_QKV of the seed's model, and what a core does in
10 ms."""
ATTENTION = {"cuda": (32, 10_000, 128), "cpu": (4, 512, 64)}
"""Heads, positions, head dim: one sequence of the seed's workload."""
DTYPES = {"cuda": ("float16", "bfloat16", "float32"), "cpu": ("float32", "bfloat16")}
BUFFER_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}
"""Beyond every cache: of a CPU, four times its last one where the ranks' memory allows it."""
LARGEST_BUFFER_BYTES = 256 << 20
LAUNCHES = 1000
SPIN_TURNS = 100_000


@dataclass(frozen=True, slots=True)
class Rate:
    """Something to sustain: `units` of work a call, and what it is called in the calibration."""

    name: str
    dtype: str
    shape: tuple[int, int, int] | None
    units: float
    make: Callable[[], Callable[[], object]]
    """Draws the data, so that only those of one figure are there at a time, and returns the call."""


def sustained(work: Callable[[], object], units: float, seconds: float, device: torch.device) -> list[float]:
    """Units per second of consecutive windows, for `seconds` and at least 4 windows. The first call is not timed."""
    work()
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    now = time.perf_counter()
    calls = max(1, math.ceil(WINDOW_S[device.type] / (now - start)))
    windows: list[float] = []
    end = now + seconds
    while now < end or len(windows) < 4:
        for _ in range(calls):
            work()
        _wait(device)
        before, now = now, time.perf_counter()
        windows.append(units * calls / (now - before))
    return windows


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rates(device: torch.device, ranks: int) -> Iterator[Rate]:
    """What is sustained on this device, in order: the first figures warm it up."""
    kind = device.type
    for dtype in DTYPES[kind]:
        for shape in PRODUCTS[kind][: None if dtype == DTYPES[kind][0] else 1]:
            yield _product(dtype, shape, device)
    if kind == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY:
        for shape in PRODUCTS[kind][:2]:
            yield _fp8_product(shape, device)
    for dtype in [dtype for dtype in DTYPES[kind] if dtype != "float32" or kind == "cpu"]:
        yield _attention(dtype, device)
    size = buffer_bytes(device, ranks)
    yield Rate("copy_bytes_per_s", "float32", None, 2 * size, lambda: _copy(size, device))
    yield Rate("read_bytes_per_s", "float32", None, size, lambda: _read(size, device))


def _normal(*shape: int, dtype: str, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).to(getattr(torch, dtype))


def _product(dtype: str, shape: tuple[int, int, int], device: torch.device) -> Rate:
    rows, inner, columns = shape

    def make() -> Callable[[], object]:
        x, weight = (_normal(size, inner, dtype=dtype, device=device) for size in (rows, columns))
        return lambda: F.linear(x, weight)

    return Rate("products", dtype, shape, 2 * rows * inner * columns, make)


def _fp8_product(shape: tuple[int, int, int], device: torch.device) -> Rate:
    """Scaled by rows, as FP8 linears are; rounding is not part of it."""
    rows, inner, columns = shape

    def make() -> Callable[[], object]:
        x, weight = (quantised(_normal(size, inner, dtype="bfloat16", device=device)) for size in (rows, columns))
        return lambda: linear(Rounded(*x, torch.bfloat16), Quantised(*weight))

    return Rate("products", "float8", shape, 2 * rows * inner * columns, make)


def _attention(dtype: str, device: torch.device) -> Rate:
    """The runtime's own attention of a prompt, masked pairs not counted: 2 L^2 d operations a head."""
    heads, length, d = shape = ATTENTION[device.type]

    def make() -> Callable[[], object]:
        q, k, v = (_normal(1, length, heads, d, dtype=dtype, device=device) for _ in range(3))
        queries = Queries(length, (0,), torch.zeros(1, dtype=torch.int64, device=device))
        rule = Rule(d**-0.5)
        return lambda: attend(q, k, v, queries, rule)

    return Rate("attention", dtype, shape, 2 * length * length * d * heads, make)


def buffer_bytes(device: torch.device, ranks: int) -> int:
    """Of what is copied and read."""
    least, cache = BUFFER_BYTES[device.type], cache_bytes(device) or 0
    wanted = least if device.type == "cuda" else min(LARGEST_BUFFER_BYTES, max(least, 4 * cache // ranks))
    return wanted >> 20 << 20


def _copy(size: int, device: torch.device) -> Callable[[], object]:
    source = _buffer(size, device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _read(size: int, device: torch.device) -> Callable[[], object]:
    return _buffer(size, device).sum


def _buffer(size: int, device: torch.device) -> Tensor:
    """fp32; random numbers, of which a MiB is enough."""
    return torch.randn(1 << 18, device=device).repeat(size >> 20)


def cache_bytes(device: torch.device) -> int | None:
    """Of the last cache before memory; None where nothing says it."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", None) or None
    sizes = [_cache_size(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=0) or None


def _cache_size(path: Path) -> int:
    """Linux writes 32K or 36M."""
    try:
        text = path.read_text().strip()
        return int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0)
    except (OSError, ValueError):
        return 0


# --- launches and the host --------------------------------------------------------------------------------------------


def launches(device: torch.device, seconds: float) -> list[float]:
    """Seconds from one small kernel to the next that the host starts one by one."""
    x = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(LAUNCHES):
            x.add_(1)

    return _per_call(many, LAUNCHES, seconds, device)


def graph_launches(device: torch.device, seconds: float) -> list[float]:
    """The same in a CUDA graph."""
    x = torch.zeros(1, device=device)
    x.add_(1)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog asks too
        for _ in range(LAUNCHES):
            x.add_(1)
    return _per_call(graph.replay, LAUNCHES, seconds, device)


def spins(seconds: float) -> list[float]:
    """Turns per second of an empty loop of this process."""

    def spin() -> None:
        for _ in range(SPIN_TURNS):
            pass

    return sustained(spin, SPIN_TURNS, seconds, torch.device("cpu"))


def _per_call(many: Callable[[], object], calls: int, seconds: float, device: torch.device) -> list[float]:
    return [1 / rate for rate in sustained(many, calls, seconds, device)]
