"""Products of few rows with a weight matrix, which is read once and at memory speed.

Decode multiplies 1 to 128 rows with every weight. What counts is how many bytes of the weights are under way at any
time: many small programs with 16 to 100 KB each, the split sums of a narrow matrix merged by a second kernel in a fixed
order, and the first bytes of each program called into the L2 cache while the kernel ahead still runs (programmatic
dependent launch; weights depend on no kernel). Activations, gates and the sum with the residual are done on the way.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headgrid.runtime.kernels import chained, power_of_two

MOST_ROWS = 128
MERGED = 512  # columns that a program of the merging kernel takes


@dataclass(frozen=True, slots=True)
class Plan:
    """How the kernels are launched: a program takes `outs` columns of the result and one of `splits` shares of the
    inputs, `inner` at a time, by `warps` warps that load `stages` - 1 blocks ahead.

    `ahead`: inputs of each weight's row that are called into the L2 cache before the kernel ahead has ended. `tma`:
    weights are loaded by the copy engine.
    """

    outs: int
    inner: int
    warps: int
    stages: int
    splits: int = 1
    ahead: int = 0
    tma: bool = False
    groups: int = 1


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

    `gated`: weight is [2 o, k], and the result activation(first half) x second half. `add`: the result is added to
    `out`, which otherwise is overwritten, if given. b up to `MOST_ROWS`; k a multiple of `launch.inner`; the last dims
    dense, and rows of the weight at multiples of 16 bytes.
    """
    (rows, width), units = x.shape, len(weight) // (2 if gated else 1)
    if out is None:
        assert not add
        out = torch.empty(rows, units, dtype=x.dtype, device=x.device)
    assert out.shape == (rows, units) and out.stride(1) == x.stride(1) == weight.stride(1) == 1
    assert weight.shape[1] == width and width % launch.inner == 0 and rows <= MOST_ROWS, (x.shape, weight.shape)
    if rows:
        _launch(x, weight, bias, out, (kind, gated, add), launch)
    return out


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, end: tuple[str, bool, bool], how: Plan
) -> None:
    """Both kernels, or the first alone where it has nothing to merge."""
    from headgrid.runtime.kernels import skinny_triton  # Triton exists only where there is a GPU

    kernels: Any = skinny_triton
    (rows, width), units, several = x.shape, out.shape[1], how.splits > 1
    kind, gated, add = end
    if not how.stages:
        kernels.few[(-(-units // how.outs),)](
            x, weight, out if bias is None else bias, out, width, units, x.stride(0), weight.stride(0), out.stride(0),
            ROWS=rows, ROWS_PADDED=power_of_two(rows), OUT=how.outs, K=how.inner, num_warps=how.warps,
            KIND=kind, GATED=gated, BIAS=bias is not None, ADD=add, **chained(x.device),
        )  # fmt: skip
        return
    parts = torch.empty(how.splits if several else 0, rows, len(weight), dtype=torch.float32, device=x.device)
    ending = {"KIND": kind, "GATED": gated, "BIAS": bias is not None, "ADD": add}
    ends = (out if bias is None else bias, out, parts)
    kernels.product[(-(-units // how.outs), how.splits)](
        x, weight, _descriptor(weight, how) if how.tma else weight, *ends,
        rows, width, units, x.stride(0), weight.stride(0), out.stride(0), how.ahead, how.splits,
        ROWS=8 if rows <= 8 and how.groups > 1 else padded(rows), OUT=how.outs, K=how.inner, STAGES=how.stages,
        SEVERAL=several, GROUPS=how.groups, TMA=how.tma,
        CHUNKS=max(1, 32 * how.warps // how.outs), WIDE=not x.is_cuda and x.dtype == torch.bfloat16,
        num_warps=how.warps, **ending, **chained(x.device),
    )  # fmt: skip
    if several:
        block = min(MERGED, power_of_two(units))
        kernels.merge[(rows, -(-units // block))](
            parts, *ends[:2], rows, units, out.stride(0), SPLITS=how.splits, BLOCK=block, num_warps=4,
            **ending, **chained(x.device),
        )  # fmt: skip


def _descriptor(weight: Tensor, how: Plan) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(weight, [how.outs, how.inner])


def padded(rows: int) -> int:
    """The rows of the tile that holds so many: a power of two that a tensor core takes."""
    return max(16, power_of_two(rows))
