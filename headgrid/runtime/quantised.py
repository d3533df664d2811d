"""FP8 linears: weights and activations rounded to e4m3 with a scale for each row, multiplied, summed in fp32.

e4m3 (Micikevicius et al. 2022, arXiv 2209.05433) has 3 bits of mantissa and no infinity; its largest number is 448. A
row x is kept as q = round(x / s) with s = max|x| / 448, and x W^T is (q_x q_W^T) s_x s_W. Rows of activations are
tokens, rows of weights output channels. The scale of a weight's row is that of the whole row of the whole matrix, so
that its bits are the same in every layout; a token's scale is that of the channels that the rank multiplies, which
where inputs are cut (W_O, W_down) are a part of the token: finer, never coarser, than on one device.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from headgrid.errors import NotAvailable
from headgrid.layout.layout import Layout
from headgrid.layout.quantised import is_quantised, rows_are_cut, scale_name
from headgrid.runtime.collectives import Axis
from headgrid.runtime.kernels import fused

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
LEAST_CAPABILITY = (8, 9)
"""CUDA compute capability from which on GPUs multiply FP8: Ada, Hopper."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix [outputs, inputs] in e4m3 and the fp32 scales [outputs] of its rows."""

    values: Tensor
    scales: Tensor

    def __len__(self) -> int:
        """Outputs."""
        return len(self.values)


Weight = Tensor | Quantised


@dataclass(frozen=True, slots=True)
class Rounded:
    """Activations [T, K] in e4m3 with the fp32 scales [T] of their rows, and the dtype that they had."""

    values: Tensor
    scales: Tensor
    dtype: torch.dtype


Input = Tensor | Rounded


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] of any floating dtype -> e4m3 [T, K] and fp32 scales [T]. A row of zeros stays one; a row that is not
    finite becomes NaN.
    """
    if fused.fits(x):
        return fused.quantise(x)
    scales = _scales(_largest(x))
    return _rounded(x, scales), scales


def _largest(x: Tensor) -> Tensor:
    """max|x| over the last dim, in fp32, without a copy of x."""
    low, high = x.aminmax(dim=-1)
    return torch.maximum(low.neg_(), high).float()


def _scales(largest: Tensor) -> Tensor:
    """By a tensor: by a number, CUDA would multiply with its inverse, and other devices divide."""
    return largest.div_(largest.new_full((), LARGEST)).clamp_(min=fused.TINY)


def _rounded(x: Tensor, scales: Tensor) -> Tensor:
    """x / scales in fp32 or wider, saturated (a quotient may exceed 448 by a rounding), to the nearest e4m3."""
    wide = (x / scales[:, None]).clamp_(-LARGEST, LARGEST)
    return wide.to(DTYPE, memory_format=torch.contiguous_format)


def linear(x: Input, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N]: [T, N] in x's dtype."""
    if isinstance(weight, Tensor):
        assert isinstance(x, Tensor)
        return F.linear(x, weight, bias)
    rows = (x.values, x.scales) if isinstance(x, Rounded) else quantised(x)
    y = _product(*rows, weight, x.dtype)
    return y if bias is None else y.add_(bias)


def linear_into(out: Tensor, x: Input, weight: Weight, bias: Tensor | None = None) -> None:
    """`linear` written to `out` [T, N]."""
    if not isinstance(weight, Tensor) or not isinstance(x, Tensor):
        out.copy_(linear(x, weight, bias))
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _product(values: Tensor, scales: Tensor, weight: Quantised, dtype: torch.dtype) -> Tensor:
    """(values scales) times a weight: [T, N] in `dtype`, summed in fp32 or wider."""
    if values.is_cuda and len(values):
        return _scaled_mm(values, scales, weight, _result_dtype(dtype, values.device)).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    y = values.to(wide) @ weight.values.to(wide).t()
    return y.mul_(scales[:, None]).mul_(weight.scales).to(dtype)


def _scaled_mm(values: Tensor, scales: Tensor, weight: Quantised, dtype: torch.dtype) -> Tensor:
    row_wise = scales[:, None], weight.scales[None]
    multiply = torch.ops.aten._scaled_mm
    return multiply(values, weight.values.t(), *row_wise, out_dtype=dtype, use_fast_accum=True)


@lru_cache(maxsize=64)  # asked of every product
def _result_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What row-wise scaled products give on this GPU: `dtype`, or bfloat16 where this torch can do no other.

    bfloat16 rounds to 1/512, e4m3 to 1/16: the factors' rounding is what counts.
    """
    some, one = torch.zeros(16, 16, device=device).to(DTYPE), torch.ones(16, device=device)
    try:
        _scaled_mm(some, one, Quantised(some, one), dtype)
    except (RuntimeError, ValueError, NotImplementedError):
        return torch.bfloat16
    return dtype


def check_device(device: torch.device) -> None:
    """Raise NotAvailable for a GPU that cannot multiply FP8. A CPU emulates it."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < LEAST_CAPABILITY:
        raise NotAvailable(
            f"{torch.cuda.get_device_name(device)} has no FP8 products",
            numbers=f"compute capability {major}.{minor}",
            why=f"they need {'.'.join(map(str, LEAST_CAPABILITY))} (Ada, Hopper) or more",
            legal=("the same layout without fp8", "--device cpu, where they are emulated"),
        )


def as_kept(layout: Layout, name: str, part: Tensor, tp: Axis | None) -> dict[str, Tensor]:
    """What a rank keeps of its part of the tensor stored as `name`: itself, or FP8 with its scales, by their names.

    `tp` are the ranks that share a layer, all of which call this: where each has a part of every row, they agree on
    the largest element of the whole row. It may be None where there are none, or no FP8 linears.
    Raises NotAvailable for a GPU that cannot multiply FP8.
    """
    if not is_quantised(layout, name):
        return {name: part}
    check_device(part.device)
    largest = _largest(part)
    if rows_are_cut(layout, name):
        if (tp.size if tp is not None else 1) != layout.tp:
            raise ValueError(f"{name}: the scales of {layout} are those of all {layout.tp} ranks that share a layer")
        if tp is not None:
            largest = tp.all_gather(largest, [len(largest)] * tp.size).view(tp.size, -1).amax(0)
    scales = _scales(largest)
    return {name: _rounded(part, scales), scale_name(name): scales}


def all_as_kept(layout: Layout, weights: dict[str, Tensor], tp: Axis | None) -> dict[str, Tensor]:
    """`as_kept` of all tensors of a rank, which leave `weights` one after the other: each is held twice only once."""
    kept: dict[str, Tensor] = {}
    for name in list(weights):
        kept |= as_kept(layout, name, weights.pop(name), tp)
    return kept


def matrix_as_sent(weight: Weight) -> Tensor:
    """A matrix as collectives and copies take it: FP8 as bytes."""
    return weight if isinstance(weight, Tensor) else weight.values.view(torch.uint8)


def as_received(matrix: Tensor, part: Weight, scales: Tensor | None = None) -> Weight:
    """The inverse for a matrix of which a rank stores `part`; with its scales, or those of the part."""
    if isinstance(part, Tensor):
        return matrix
    return Quantised(matrix.view(DTYPE), part.scales if scales is None else scales)


def quantised_if(weights: dict[str, Tensor], name: str) -> Weight:
    """The matrix stored as `name`, with its scales if it has any."""
    scales = weights.get(scale_name(name))
    return weights[name] if scales is None else Quantised(weights[name], scales)
