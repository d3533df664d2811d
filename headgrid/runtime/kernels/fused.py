"""Small fused kernels for CUDA: sum and norm, cache writes, rotary positions, gates.

Each replaces two to ten kernels of torch, which decode pays for in launches (1 to 8 us each, on a layer of 100 us) and
prefill in bytes. They compute in fp32 and round once; without CUDA, with gradients, or in fp64 the runtime uses torch.
"""

from typing import Any

import torch
from torch import Tensor

from headgrid.runtime.kernels import power_of_two
from headgrid.spec.model import ModelSpec

_WIDEST = 1 << 15
TINY = torch.finfo(torch.float32).tiny
"""The least scale of a row in FP8, of zeros or nearly: one can divide by it."""


def _kernels() -> Any:
    from headgrid.runtime.kernels import fused_triton  # Triton exists only where there is a GPU

    return fused_triton


def usable(x: Tensor) -> bool:
    """Whether these kernels take x: on a GPU, of at most 32 bits, with no gradient wanted."""
    return x.is_cuda and x.dtype != torch.float64 and not torch.is_grad_enabled()


def fits(x: Tensor) -> bool:
    """Whether `add_norm` takes rows x [T, D]: `usable`, dense, and a row fits into one program."""
    return usable(x) and x.is_contiguous() and x.shape[-1] <= _WIDEST


def add_norm(
    x: Tensor, y: Tensor | None, norm: tuple[Tensor, Tensor | None], model: ModelSpec, dtype: torch.dtype
) -> Tensor:
    """x [T, D] += y [T, D], if any, in place; returns the model's norm of the sum, [T, D] in `dtype`.

    `norm` is weight [D] and shift [D] or None, of a layer norm (Ba et al. 2016) or one by the root mean square (Zhang,
    Sennrich 2019), with the model's eps, and its offset of 1 if it has that.
    """
    return _normed(x, y, norm, model, torch.empty_like(x, dtype=dtype), None)


def add_norm_fp8(
    x: Tensor, y: Tensor | None, norm: tuple[Tensor, Tensor | None], model: ModelSpec
) -> tuple[Tensor, Tensor]:
    """`add_norm` in the dtype of the norm's weight, then in e4m3 [T, D] with fp32 scales [T] of the rows."""
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    return _normed(x, y, norm, model, torch.empty_like(x, dtype=torch.float8_e4m3fn), scales), scales


def _normed(
    x: Tensor,
    y: Tensor | None,
    norm: tuple[Tensor, Tensor | None],
    model: ModelSpec,
    out: Tensor,
    scales: Tensor | None,
) -> Tensor:
    (count, width), (weight, shift) = x.shape, norm
    if count:
        block = power_of_two(width)
        _kernels().add_norm[(count,)](
            x, x if y is None else y, weight, weight if shift is None else shift, out, x if scales is None else scales,
            width, model.norm_eps, TINY, ADD=y is not None, RMS=model.norm == "rms", SHIFT=shift is not None,
            UNIT=model.norm_unit_offset, FP8=scales is not None, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return out


def quantise(x: Tensor, kind: str = "none", *, gated: bool = False) -> tuple[Tensor, Tensor]:
    """activation(x) of x [T, K], rounded to x's dtype, in e4m3 [T, K] with fp32 scales [T]: max|row| / 448.

    `gated`: x is [T, 2 K], and the result activation(first half) x second half. `kind` may be none.
    """
    rows, width = x.shape[0], x.shape[1] // (2 if gated else 1)
    values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        block = power_of_two(width)
        _kernels().quantise[(rows,)](
            x, values, scales, width, x.stride(0), TINY, KIND=kind, GATED=gated, BLOCK=block, num_warps=_warps(block)
        )
    return values, scales


def store(
    k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor], starts: Tensor, *, first: int = 0, stride: int = 1
) -> None:
    """k [b, s, K, d] and v [b, s, K, u] into the caches [b, S, K, d], [b, S, K, u].

    Query q of sequence i stands at position starts[i] + q (int64 [b]); the cache keeps the positions first,
    first + stride, ..., and what is at others is left out. A token's heads must lie together, in all four tensors.
    """
    (b, s, kv_heads, d), u = k.shape, v.shape[3]
    if not b * s or not cache[0].shape[1]:
        return
    _kernels().store[(b * s,)](
        k, v, *cache, starts, s, cache[0].shape[1], first, stride,
        *(x.stride(dim) for x in (k, v, *cache) for dim in (0, 1)),
        K_WIDTH=kv_heads * d, K_BLOCK=power_of_two(kv_heads * d),
        V_WIDTH=kv_heads * u, V_BLOCK=power_of_two(kv_heads * u),
        num_warps=_warps(power_of_two(kv_heads * max(d, u))),
    )  # fmt: skip


def rotate(x: Tensor, cos: Tensor, sin: Tensor, starts: Tensor) -> None:
    """Turn channel pairs (c, c + p) of x [b, s, heads, w] in place, by tables cos, sin [positions, 1, p] at the
    positions starts[i] + q (int64 [b]) of query q of sequence i; 2 p at most w, the last dim dense.
    """
    (b, s, heads, _), pairs = x.shape, cos.shape[-1]
    if not x.numel() or not pairs:
        return
    block = power_of_two(pairs)
    _kernels().rotate[(b * s,)](
        x, cos, sin, starts, s, heads, x.stride(0), x.stride(1), x.stride(2),
        PAIRS=pairs, PAIR_BLOCK=block, HEAD_BLOCK=max(1, 2048 // block), num_warps=4,
    )  # fmt: skip


def gate(x: Tensor, kind: str) -> Tensor:
    """activation(gate) x up of x [T, 2 u], the gate's u columns first: a view [T, u] of these, overwritten."""
    rows, units = x.shape[0], x.shape[1] // 2
    if rows:
        block = min(2048, power_of_two(units))
        _kernels().gate[(rows, -(-units // block))](x, units, KIND=kind, BLOCK=block, num_warps=4)
    return x[:, :units]


def _warps(block: int) -> int:
    """About 16 elements a thread: two loads of 16 bytes in 16-bit dtypes."""
    return min(16, max(1, block // 512))
