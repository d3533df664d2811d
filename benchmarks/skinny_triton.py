"""The Triton kernels of `skinny_product`: sums in fp32, one rounding."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headgrid.runtime.kernels.fused_triton import activated

_RUNTIME = ["rows", "ahead", "splits"]  # one compilation serves all of their values


@triton.jit(do_not_specialize=_RUNTIME)
def product(
    x_ptr, w_ptr, bias_ptr, out_ptr, part_ptr, rows, width, units, x_row, w_row, out_row, ahead, splits,
    ROWS: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr, SEVERAL: tl.constexpr,
    CHUNKS: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    EARLY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (tile, split): OUT columns of x W^T over the split's share of `width`; finished here if there is one
    split, otherwise a part [rows, units (2 units if GATED)] in fp32 for `merge`.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    outs = tile * OUT + tl.arange(0, OUT)
    share = (width // K + splits - 1) // splits * K
    first = split * share
    last = tl.minimum(first + share, width)
    w_rows = w_ptr + tl.minimum(outs, units - 1).to(tl.int64) * w_row  # what is behind the last is not stored
    up_rows = w_rows + units.to(tl.int64) * w_row
    if EARLY:
        gdc_launch_dependents()
        _call(w_rows + first, tl.minimum(ahead, last - first), OUT, CHUNKS)
        if GATED:
            _call(up_rows + first, tl.minimum(ahead, last - first), OUT, CHUNKS)
        gdc_wait()
    tokens, inner = tl.arange(0, ROWS)[:, None], tl.arange(0, K)[None, :]
    x_at, w_at, up_at = x_ptr + tokens * x_row + inner, w_rows[:, None] + inner, up_rows[:, None] + inner
    acc = tl.zeros([OUT, ROWS], tl.float32)
    acc_up = tl.zeros([OUT, ROWS], tl.float32)
    for k in tl.range(first, last, K, num_stages=STAGES):
        x = tl.load(x_at + k, mask=tokens < rows, other=0.0)
        w = tl.load(w_at + k)
        if WIDE:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        if GATED:
            up = tl.load(up_at + k)
            if WIDE:
                up = up.to(tl.float32)
            acc_up = tl.dot(up, tl.trans(x), acc_up, input_precision="ieee")
    y, ups = tl.trans(acc), tl.trans(acc_up)
    inside = (tokens < rows) & (outs[None, :] < units)
    if SEVERAL:
        total = units * 2 if GATED else units
        at = part_ptr + (split.to(tl.int64) * rows + tokens) * total + outs[None, :]
        tl.store(at, y, mask=inside)
        if GATED:
            tl.store(at + units, ups, mask=inside)
    else:
        out_at = out_ptr + tokens * out_row + outs[None, :]
        _finish(y, ups, bias_ptr, out_at, outs[None, :], inside, units, KIND, GATED, BIAS, ADD)


@triton.jit
def single(
    x_ptr, w_ptr, bias_ptr, out_ptr, width, units, w_row,
    OUT: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (tile): OUT columns of x W^T for one row x, by plain multiplications, a block of weights ahead."""
    outs, inner = tl.program_id(0) * OUT + tl.arange(0, OUT), tl.arange(0, K)
    w_at = w_ptr + tl.minimum(outs, units - 1).to(tl.int64)[:, None] * w_row + inner[None, :]
    w = tl.load(w_at)
    if EARLY:  # behind the load: no kernel in flight writes weights
        gdc_launch_dependents()
        gdc_wait()
    y = tl.zeros([OUT], tl.float32)
    for k in tl.range(0, width, K, num_stages=1):
        here = w.to(tl.float32)
        if k + K < width:
            w = tl.load(w_at + k + K)
        y += tl.sum(here * tl.load(x_ptr + k + inner).to(tl.float32)[None, :], 1)
    _finish(y, y, bias_ptr, out_ptr + outs, outs, outs < units, units, KIND, GATED, BIAS, ADD)


@triton.jit(do_not_specialize=["rows"])
def merge(
    part_ptr, bias_ptr, out_ptr, rows, units, out_row,
    SPLITS: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (row, columns): the parts of all splits, added in their order."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row, outs = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = outs < units
    total = units * 2 if GATED else units
    y = tl.zeros([BLOCK], tl.float32)
    ups = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):  # .cg: another processor wrote these while this kernel was there already
        at = part_ptr + (tl.cast(rows, tl.int64) * split + row) * total + outs
        y += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
        if GATED:
            ups += tl.load(at + units, mask=inside, other=0.0, cache_modifier=".cg")
    _finish(y, ups, bias_ptr, out_ptr + row * out_row + outs, outs, inside, units, KIND, GATED, BIAS, ADD)


@triton.jit
def _finish(y, ups, bias_ptr, out_at, outs, inside, units, KIND: tl.constexpr, GATED: tl.constexpr,
            BIAS: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    """out = activation(y + bias), times the second half if the first is a gate, plus out if wanted; one rounding."""
    if BIAS:
        y += tl.load(bias_ptr + outs, mask=outs < units, other=0.0).to(tl.float32)
    y = activated(y, KIND)
    if GATED:
        if BIAS:
            ups += tl.load(bias_ptr + units + outs, mask=outs < units, other=0.0).to(tl.float32)
        y *= ups
    if ADD:
        y += tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at, y.to(out_at.dtype.element_ty), mask=inside)


@triton.jit
def _call(rows, elements, ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """Call so many elements of each row into the L2 cache, in CHUNKS requests: about one for each thread."""
    size: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth // 8
    each = elements * size // CHUNKS // 16 * 16
    if each > 0:
        at = rows[:, None] + (tl.arange(0, CHUNKS) * (each // size))[None, :]
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r, l, r",
            [at, tl.zeros([ROWS, CHUNKS], tl.int32) + each],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
