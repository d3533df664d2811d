"""Tensors that stand in the middle of NaN, and what a kernel may be off by."""

import torch
from torch import Tensor

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
"""The largest relative error of one rounding to nearest."""


def framed(x: Tensor, *, width: int = 8) -> Tensor:
    """A view that equals x, with NaN before and behind it along every dim; a multiple of 16 bytes for `width` 8."""
    buffer = torch.full([*(n + 2 for n in x.shape[:-1]), x.shape[-1] + 2 * width], float("nan")).to(x)
    view = buffer[(*(slice(1, n + 1) for n in x.shape[:-1]), slice(width, x.shape[-1] + width))]
    return view.copy_(x)


def assert_frame_whole(view: Tensor) -> None:
    """Nothing was written around a view that `framed` made."""
    buffer = view._base
    assert buffer is not None and buffer.numel() > view.numel()
    inside = int((~view.isnan()).sum())
    assert int((~buffer.isnan()).sum()) == inside, "written outside of the tensor"


def assert_rounded_once(out: Tensor, wide: Tensor, *, scale: float = 1.0) -> None:
    """`out` is the fp64 tensor `wide` within one rounding to its dtype and 4 fp32 roundings of numbers like `scale`."""
    assert out.shape == wide.shape
    cut = out.dtype == torch.bfloat16 and not out.is_cuda  # Triton's interpreter does not round to bf16, but cuts
    allowed = (2 if cut else 1.01) * UNIT[out.dtype] * wide.abs() + 4 * scale * UNIT[torch.float32]
    if out.dtype == torch.float16:
        allowed += 2.0**-25  # half of the least denormal number
    excess = (out.double().cpu() - wide.cpu()).abs() / allowed.cpu()
    assert excess.isfinite().all(), "not a number"
    assert excess.numel() == 0 or float(excess.max()) <= 1, f"{float(excess.max()):.3g} times what is allowed"
