"""Products of few rows with a weight matrix, which is read once and at memory speed.

Decode multiplies 1 to 64 rows with every weight. What counts is how many bytes of the weights are under way: 64 to 100
KB for each multiprocessor, from the first moment on. So the inputs of a narrow matrix are split among programs, whose
sums a second kernel adds in a fixed order, and the first bytes of each program are called into the L2 cache while the
kernel ahead still runs (programmatic dependent launch; nothing in flight writes weights). Activations, gates and the
sum with the residual are done on the way.
"""

from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any

import skinny_triton
import torch
from torch import Tensor

from headgrid.runtime.kernels import power_of_two

MOST_ROWS = 64
_MERGED = 512  # columns that a program of the merging kernel takes


@dataclass(frozen=True, slots=True)
class Plan:
    """How the kernels are launched: a program takes `outs` columns of the result and one of `splits` shares of the
    inputs, `inner` at a time, by `warps` warps that load `stages` - 1 blocks ahead.

    `ahead`: inputs of each weight's row that are called into the L2 cache before the kernel ahead has ended. Without
    `stages` a single row is multiplied by plain instructions instead of tensor cores, without gates.
    """

    outs: int
    inner: int
    warps: int
    stages: int
    splits: int = 1
    ahead: int = 0


@cache
def plan(rows: int, inputs: int, outputs: int, processors: int, *, gated: bool = False) -> Plan | None:
    """The launch for x [rows, inputs] times a weight [outputs, inputs], or two of them if `gated`, in 16 bits on a GPU
    of so many multiprocessors; None where cuBLAS is as fast.

    Fitted to sweeps of `benchmarks/skinny.py` on an H200: tiles of 64 columns, as many splits as give each processor
    one program or two. A single row is faster without tensor cores as long as a program takes whole rows of the weight.
    """
    if rows == 1 and inputs == 4096 and not gated:
        return Plan(2, 4096, 4, 0)
    if rows == 1 and inputs % 1024 == 0 and inputs < 4096 and not gated:
        return Plan(8, 1024, 4, 0)
    if not 0 < rows <= MOST_ROWS or inputs % 128:
        return None
    tiles = ceil(outputs / 64)
    if rows > 32:
        return _many(tiles, inputs, outputs, processors, gated)
    if processors < tiles < 1.9 * processors and rows <= 16 and inputs % 256 == 0 and not gated:
        return Plan(32, 256, 4, 4, 1, 512)
    splits = 1 if tiles > 0.7 * processors else 2 if tiles > 0.45 * processors else round(2 * processors / tiles)
    splits = max(1, min(splits, 8, inputs // 512))
    stages = 5 if gated and rows <= 16 else 4 if gated or tiles * splits > processors else 6
    return Plan(64, 128, 4, stages, splits, 256)


def _many(tiles: int, inputs: int, outputs: int, processors: int, gated: bool) -> Plan | None:
    """For rows that fill half of the shared memory: cuBLAS is faster where programs cannot be spread evenly."""
    if gated or inputs < 1024:
        return None
    splits = 2 if tiles <= processors / 2 else 1
    if tiles * splits <= processors:
        return Plan(64, 128, 4, 5, splits, 256) if tiles * splits > 0.9 * processors else None
    tiles = ceil(outputs / 128)
    even = tiles / processors / ceil(tiles / processors)
    return Plan(128, 64, 4, 5, 1, 128) if even > 0.9 else None


def launch_for(x: Tensor, weight: Tensor, *, gated: bool = False) -> Plan | None:
    """The launch with which `product` takes x [b, k] and a weight [o, k] ([2 o, k] if `gated`); None where it cannot,
    or cuBLAS is as fast: on Hopper GPUs only, in 16 bits, with no gradient wanted.
    """
    if not x.is_cuda or len(x) > MOST_ROWS or torch.is_grad_enabled():
        return None
    aligned = (weight.stride(0) * 2 | weight.data_ptr() | x.data_ptr() | x.stride(0) * 2) % 16 == 0
    dense = x.ndim == 2 and x.stride(1) == weight.stride(1) == 1
    if not (aligned and dense and x.dtype == weight.dtype and x.dtype in (torch.float16, torch.bfloat16)):
        return None
    processors = _processors(x.device)
    return plan(*x.shape, len(weight) // (1 + gated), processors, gated=gated) if processors else None


@cache
def _processors(device: torch.device) -> int:
    """0 for a GPU for which no plan was measured."""
    chip = torch.cuda.get_device_properties(device)
    return chip.multi_processor_count if chip.major == 9 else 0


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "none",
    gated: bool = False,
    add: bool = False,
    out: Tensor | None = None,
    launch: Plan,
) -> Tensor:
    """activation(x [b, k] weight [o, k]^T + bias [o]) -> [b, o] in x's dtype, summed in fp32 and rounded once.

    `kind` is an activation of the model spec, or none. `gated`: weight is [2 o, k], and the result activation(first
    half) x second half. `add`: the result is added to `out`, which otherwise is overwritten, if given. k is a multiple
    of `launch.inner`, last dims are dense, and rows of the weight lie at multiples of 16 bytes.
    """
    (rows, width), units = x.shape, len(weight) // (2 if gated else 1)
    if out is None:
        assert not add
        out = torch.empty(rows, units, dtype=x.dtype, device=x.device)
    assert out.shape == (rows, units) and out.stride(1) == x.stride(1) == weight.stride(1) == 1
    assert weight.shape[1] == width and width % launch.inner == 0, (x.shape, weight.shape, launch)
    ending = {"KIND": kind, "GATED": gated, "BIAS": bias is not None, "ADD": add, **chained(x.device)}
    if rows and launch.stages:
        _launch(x, weight, bias, out, ending, launch)
    elif rows:
        assert rows == 1 and not gated
        _kernels().single[(-(-units // launch.outs),)](
            x, weight, out if bias is None else bias, out, width, units, weight.stride(0),
            OUT=launch.outs, K=launch.inner, num_warps=launch.warps, **ending,
        )  # fmt: skip
    return out


def _kernels() -> Any:
    return skinny_triton


def chained(device: torch.device) -> dict[str, bool]:
    """Options of a kernel that is launched early where it can be, and waits before it reads what others write."""
    early = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, ending: dict[str, Any], how: Plan) -> None:
    """Both kernels, or the first alone where it has nothing to merge."""
    (rows, width), units, several = x.shape, out.shape[1], how.splits > 1
    parts = torch.empty(how.splits if several else 0, rows, len(weight), dtype=torch.float32, device=x.device)
    ends = (out if bias is None else bias, out)
    _kernels().product[(-(-units // how.outs), how.splits)](
        x, weight, *ends, parts, rows, width, units, x.stride(0), weight.stride(0), out.stride(0),
        how.ahead, how.splits, ROWS=max(16, power_of_two(rows)), OUT=how.outs, K=how.inner, STAGES=how.stages,
        SEVERAL=several, CHUNKS=max(1, 32 * how.warps // how.outs),
        WIDE=not x.is_cuda and x.dtype == torch.bfloat16, num_warps=how.warps, **ending,
    )  # fmt: skip
    if several:
        block = min(_MERGED, power_of_two(units))
        _kernels().merge[(rows, -(-units // block))](
            parts, *ends, rows, units, out.stride(0), SPLITS=how.splits, BLOCK=block, num_warps=4, **ending
        )
