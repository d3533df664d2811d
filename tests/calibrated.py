"""A calibration with known figures: near those of an H200, or of a small CPU."""

from typing import Any

from headgrid.experiment.calibrate_fit import fit_line
from headgrid.spec.calibration import Calibration, calibration_of

SIZES = tuple(4096 * 4**power for power in range(9))
ALPHA_S, BETA_BYTES_PER_S = 15e-6, 310e9


def figure(median: float, *, best: float = 1.0, settled: bool = True, ranks: int = 2) -> dict[str, Any]:
    """`best` is relative to the median."""
    spread = {"low": median * 0.99, "high": median * min(best, 1.01) if best > 1 else median, "best": median * best}
    return {"median": median, **spread, "n": 20, "settled": settled, "per_rank": [median] * ranks} | dict.fromkeys(
        ("sm_clock_mhz", "power_w")
    )


def cost(kind: str, ranks: int, *, alpha_s: float = ALPHA_S, beta: float = BETA_BYTES_PER_S) -> dict[str, Any]:
    """A collective whose times lie on its line."""
    times = [alpha_s + size / beta for size in SIZES]
    points = [
        {"size_bytes": size, "median_s": t, "low_s": 0.98 * t, "high_s": 1.1 * t, "n": 9}
        for size, t in zip(SIZES, times, strict=True)
    ]
    return {"kind": kind, "ranks": ranks, "graphed": True, **fit_line(SIZES, times)._asdict(), "points": points}


def kernel(dtype: str, shape: tuple[int, int, int], flop_per_s: dict[str, Any]) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "flop_per_s": flop_per_s}


def fields(**changes: Any) -> dict[str, Any]:
    """Of 4 H200, as JSON has them."""
    own: dict[str, Any] = {
        "created": "2026-11-22T12:00:00Z",
        "headgrid_version": "0.1.0",
        "device": "cuda",
        "device_name": "NVIDIA H200",
        "ranks": 4,
        "seconds": 3.0,
        "cache_bytes": 60 << 20,
        "environment": {"python": "3.12.3", "gpus": [{"name": "NVIDIA H200", "power_limit_w": 700.0}]},
        "products": [
            kernel("float16", (8192, 4096, 16_384), figure(660e12, best=1.1)),
            kernel("float16", (8192, 16_384, 4096), figure(685e12, best=1.08)),
            kernel("float8", (8192, 4096, 16_384), figure(1230e12)),
        ],
        "attention": [kernel("float16", (32, 10_000, 128), figure(525e12, best=1.1))],
        "copy_bytes_per_s": figure(4.24e12),
        "read_bytes_per_s": figure(4.3e12),
        "launch_s": figure(4e-6),
        "graph_launch_s": figure(1e-6),
        "spin_per_s": figure(4e7),
        "collectives": [cost("all_reduce", 4, beta=500e9), cost("all_gather", 4), cost("send", 2)],
    }
    return own | changes


def h200(**changes: Any) -> Calibration:
    return calibration_of(fields(**changes))


def cpu(ranks: int = 16, **changes: Any) -> Calibration:
    """Of ranks that share a few cores."""
    own = {"device": "cpu", "device_name": "Some CPU", "ranks": ranks, "cache_bytes": 1 << 20, "graph_launch_s": None}
    own |= {"products": [kernel("float32", (256, 1024, 1024), figure(40e9))]}
    own |= {"attention": [kernel("float32", (4, 512, 64), figure(10e9))]}
    own |= {"copy_bytes_per_s": figure(8e9), "read_bytes_per_s": figure(9e9)}
    own |= {"collectives": [cost("all_gather", ranks, alpha_s=2e-4, beta=1e9)]}
    return h200(**(own | changes))
