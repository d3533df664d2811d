"""The Triton kernels of `skinny`: sums in fp32, one rounding."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headgrid.runtime.kernels.fused_triton import activated

_RUNTIME = ["rows", "ahead", "splits"]  # one compilation serves all of their values


@triton.jit(do_not_specialize=_RUNTIME)
def product(
    x_ptr, w_ptr, w_desc, bias_ptr, out_ptr, part_ptr, rows, width, units, x_row, w_row, out_row, ahead, splits,
    ROWS: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr, SEVERAL: tl.constexpr,
    GROUPS: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    TMA: tl.constexpr, CHUNKS: tl.constexpr, EARLY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (tile, split): OUT columns of x W^T over the split's share of `width`; finished here if there is one
    split, otherwise a part [rows, units (2 units if GATED)] in fp32 for `merge`.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    outs = tile * OUT + tl.arange(0, OUT)
    kept = tl.minimum(outs, units - 1).to(tl.int64)  # columns behind the last are computed and not stored
    share = (width // K + splits - 1) // splits * K
    first = split * share
    last = tl.minimum(first + share, width)
    w_rows = w_ptr + kept * w_row
    if EARLY:  # weights depend on no kernel: they may be called into the L2 cache while the one ahead still runs
        gdc_launch_dependents()
        _call(w_rows + first, tl.minimum(ahead, last - first), CHUNKS, OUT)
        if GATED:
            _call(w_rows + units.to(tl.int64) * w_row + first, tl.minimum(ahead, last - first), CHUNKS, OUT)
        gdc_wait()
    tokens = tl.arange(0, ROWS)
    there = tokens[:, None] < rows
    acc = tl.zeros([OUT, ROWS], tl.float32)
    ups = tl.zeros([OUT, ROWS], tl.float32)
    if GROUPS > 1:  # each group of warps sums its own part of every block of inputs
        PART: tl.constexpr = K // GROUPS
        inner = (tl.arange(0, GROUPS) * PART)[:, None, None] + tl.arange(0, PART)[None, None, :]
        x_at = x_ptr + tokens[None, :, None] * x_row + inner
        w_at = w_rows[None, :, None] + inner
        sums = tl.zeros([GROUPS, OUT, ROWS], tl.float32)
        sums_up = tl.zeros([GROUPS, OUT, ROWS], tl.float32)
        for k in tl.range(first, last, K, num_stages=STAGES):
            x = tl.load(x_at + k, mask=there[None, :, :], other=0.0)
            w = tl.load(w_at + k)
            if WIDE:
                x, w = x.to(tl.float32), w.to(tl.float32)
            sums = tl.dot(w, tl.permute(x, (0, 2, 1)), sums, input_precision="ieee")
            if GATED:
                up = tl.load(w_at + units.to(tl.int64) * w_row + k)
                if WIDE:
                    up = up.to(tl.float32)
                sums_up = tl.dot(up, tl.permute(x, (0, 2, 1)), sums_up, input_precision="ieee")
        acc = tl.sum(sums, 0)
        ups = tl.sum(sums_up, 0)
    else:
        inner = tl.arange(0, K)
        x_at = x_ptr + tokens[:, None] * x_row + inner[None, :]
        w_at = w_rows[:, None] + inner[None, :]
        for k in tl.range(first, last, K, num_stages=STAGES):
            x = tl.load(x_at + k, mask=there, other=0.0)
            if TMA:
                w = w_desc.load([tile * OUT, k])
            else:
                w = tl.load(w_at + k)
            if WIDE:
                x, w = x.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
            if GATED:
                if TMA:
                    up = w_desc.load([units + tile * OUT, k])
                else:
                    up = tl.load(w_at + units.to(tl.int64) * w_row + k)
                if WIDE:
                    up = up.to(tl.float32)
                ups = tl.dot(up, tl.trans(x), ups, input_precision="ieee")
    y, second = tl.trans(acc), tl.trans(ups)
    inside = there & (outs[None, :] < units)
    if SEVERAL:
        total = units * 2 if GATED else units
        at = part_ptr + (split.to(tl.int64) * rows + tokens[:, None]) * total + outs[None, :]
        tl.store(at, y, mask=inside)
        if GATED:
            tl.store(at + units, second, mask=inside)
    else:
        out_at = out_ptr + tokens[:, None] * out_row + outs[None, :]
        _finish(y, second, bias_ptr, out_at, outs[None, :], inside, units, KIND, GATED, BIAS, ADD)


@triton.jit
def few(
    x_ptr, w_ptr, bias_ptr, out_ptr, width, units, x_row, w_row, out_row,
    ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (tile): OUT columns of x W^T for very few rows, by plain multiplications; a block of weights is in
    registers before the kernel ahead has ended, and while the one before it is summed.
    """
    if EARLY:
        gdc_launch_dependents()
    outs, inner, tokens = tl.program_id(0) * OUT + tl.arange(0, OUT), tl.arange(0, K), tl.arange(0, ROWS_PADDED)
    w_at = w_ptr + tl.minimum(outs, units - 1).to(tl.int64)[:, None] * w_row + inner[None, :]
    up_at = w_at + units.to(tl.int64) * w_row
    w = tl.load(w_at)
    up = w
    if GATED:
        up = tl.load(up_at)
    if EARLY:
        gdc_wait()
    y = tl.zeros([ROWS_PADDED, OUT], tl.float32)
    ups = tl.zeros([ROWS_PADDED, OUT], tl.float32)
    for k in tl.range(0, width, K, num_stages=1):
        here, here_up = w.to(tl.float32), up.to(tl.float32)
        if k + K < width:
            w = tl.load(w_at + k + K)
            if GATED:
                up = tl.load(up_at + k + K)
        for row in tl.static_range(ROWS):
            x = tl.load(x_ptr + row * x_row + k + inner).to(tl.float32)[None, :]
            mine = tokens[:, None] == row
            y += tl.where(mine, tl.sum(here * x, 1)[None, :], 0.0)
            if GATED:
                ups += tl.where(mine, tl.sum(here_up * x, 1)[None, :], 0.0)
    inside = (tokens[:, None] < ROWS) & (outs[None, :] < units)
    out_at = out_ptr + tokens[:, None] * out_row + outs[None, :]
    _finish(y, ups, bias_ptr, out_at, outs[None, :], inside, units, KIND, GATED, BIAS, ADD)


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
def _call(rows, elements, CHUNKS: tl.constexpr, ROWS: tl.constexpr):
    """Call so many elements of each row into the L2 cache: about one request for each thread."""
    each = elements * (rows.dtype.element_ty.primitive_bitwidth // 8) // CHUNKS // 16 * 16
    if each > 0:
        step = each // (rows.dtype.element_ty.primitive_bitwidth // 8)
        at = rows[:, None] + (tl.arange(0, CHUNKS) * step)[None, :]
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r, l, r",
            [at, tl.zeros([ROWS, CHUNKS], tl.int32) + each],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
