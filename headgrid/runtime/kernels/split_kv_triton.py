"""The Triton kernels of `split_kv`. Scores are kept in base 2: exp2 is one instruction."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# one compilation serves all of their values
_RUNTIME = ["heads", "splits", "least", "window", "at_first", "capacity", "ahead"]


@triton.jit(do_not_specialize=_RUNTIME)
def partial(
    q_ptr, k_ptr, v_ptr, part_ptr, lse_ptr, out_ptr, sum_ptr, position_ptr, out_b, out_h, scale, softcap,
    q_b, q_h, k_b, k_h, k_s, v_b, v_h, v_s, heads, splits, least, window, at_first, at_stride,
    capacity, ahead,
    CAPPED: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, U: tl.constexpr, GROUP_PADDED: tl.constexpr,
    D_PADDED: tl.constexpr, U_PADDED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, SEVERAL: tl.constexpr,
    EARLY: tl.constexpr, CHAINED: tl.constexpr, AHEAD: tl.constexpr, GUESSED: tl.constexpr,
    THREADS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (pair, split): softmax over the split's keys, its weighted sum of values [GROUP, U] and log2-sum.

    A pair with one active split is finished here, the others by `merge`.
    """
    pair, split, kv_heads = tl.program_id(0), tl.program_id(1), heads // GROUP
    sequence, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    k_base = k_ptr + sequence * k_b + kv_head * k_h
    v_base = v_ptr + sequence * v_b + kv_head * v_h
    if CHAINED:
        if AHEAD:  # most keys are there since earlier steps: a position of one of those is near enough to call them
            position = tl.load(position_ptr + sequence, volatile=True)
            position = tl.minimum(tl.maximum(position, 0), at_first + (capacity - 1) * at_stride).to(tl.int32)
            guessed, guessed_last, _ = _share(position, split, splits, least, window, at_first, at_stride, SEVERAL)
            called = tl.minimum(guessed + ahead, guessed_last)
            _call(k_base, k_s, guessed, called, D, THREADS)
            _call(v_base, v_s, guessed, called, U, THREADS)
        gdc_wait()  # before `merge` is let go: what that reads ahead of its own wait has been written then
    if EARLY and SEVERAL:
        gdc_launch_dependents()
    rows, dims, cols = tl.arange(0, GROUP_PADDED), tl.arange(0, D_PADDED), tl.arange(0, U_PADDED)
    keys = tl.arange(0, BLOCK)
    k_at = keys[:, None] * k_s + dims[None, :]  # within a block: 32 bits do
    v_at = keys[:, None] * v_s + cols[None, :]
    if GUESSED:  # the first block is on its way before the position is known, which is the former one nearly always
        k, v = _block(
            k_base, k_s, k_at, v_base, v_s, v_at, guessed, guessed_last, keys, dims, cols, D, D_PADDED, U, U_PADDED
        )
    position = tl.load(position_ptr + sequence).to(tl.int32)
    q_at = q_ptr + sequence * q_b + (kv_head * GROUP + rows[:, None]) * q_h + dims[None, :]
    q = tl.load(q_at, mask=(rows[:, None] < GROUP) & (dims[None, :] < D), other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    first, last, active = _share(position, split, splits, least, window, at_first, at_stride, SEVERAL)
    if split >= active:
        return
    # finite: a guessed block may hold no key, and -inf less -inf is NaN
    top = tl.full([GROUP_PADDED], -3.0e38, tl.float32)
    norm = tl.zeros([GROUP_PADDED], tl.float32)
    out = tl.zeros([GROUP_PADDED, U_PADDED], tl.float32)
    begin = first
    if GUESSED:
        if first != guessed or last != guessed_last:
            k, v = _block(k_base, k_s, k_at, v_base, v_s, v_at, first, last, keys, dims, cols, D, D_PADDED, U, U_PADDED)
        top, norm, out = _attend(q, k, v, keys < last - first, scale, softcap, top, norm, out, CAPPED)
        begin += BLOCK
    for start in tl.range(begin, last, BLOCK, num_stages=STAGES):
        k, v = _block(k_base, k_s, k_at, v_base, v_s, v_at, start, last, keys, dims, cols, D, D_PADDED, U, U_PADDED)
        if WIDE:
            k, v = k.to(tl.float32), v.to(tl.float32)
        top, norm, out = _attend(q, k, v, keys < last - start, scale, softcap, top, norm, out, CAPPED)
    seen = norm > 0  # without keys the log-sum is -inf and the output 0, never NaN
    norm = tl.where(seen, norm, 1.0)
    lse = tl.where(seen, top + tl.log2(norm), float("-inf"))
    out = out / norm[:, None]
    mine, inside = kv_head * GROUP + rows, (rows[:, None] < GROUP) & (cols[None, :] < U)
    if active == 1:
        out_at = out_ptr + sequence * out_b + mine[:, None] * out_h + cols[None, :]
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(sum_ptr + sequence * heads + mine, lse * 0.6931471805599453, mask=rows < GROUP)
    else:
        part = (sequence * heads + mine) * splits + split
        tl.store(part_ptr + part[:, None] * U + cols[None, :], out, mask=inside)
        tl.store(lse_ptr + part, lse, mask=rows < GROUP)


@triton.jit(do_not_specialize=_RUNTIME)
def merge(
    part_ptr, lse_ptr, out_ptr, sum_ptr, position_ptr, out_b, out_h, heads, splits, least, window, at_first, at_stride,
    U: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (query head of a sequence, some columns): its parts weighted by their share of the whole sum, in fp32
    and in the order of the splits.
    """
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sequence = row // heads
    position = tl.load(position_ptr + sequence).to(tl.int32)
    oldest, length = _visible(position, window, at_first, at_stride)
    _, active = _division(length - oldest, splits, least)
    if EARLY:  # by all programs: whoever waits for this kernel waits for `partial` through it
        gdc_launch_dependents()
        gdc_wait()
    if active == 1:
        return
    top = tl.full([1], -3.0e38, tl.float32)  # finite: -inf less -inf is NaN
    norm = tl.zeros([1], tl.float32)
    out = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, active, CHUNK):  # .cg: another processor wrote these while this kernel was there already
        chunk = start + tl.arange(0, CHUNK)
        at, inside = row * splits + chunk, chunk < active
        lses = tl.load(lse_ptr + at, mask=inside, other=float("-inf"), cache_modifier=".cg")
        mask = inside[:, None] & (cols[None, :] < U)
        parts = tl.load(part_ptr + at[:, None] * U + cols[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(lses, 0))
        weights = tl.exp2(lses - new_top)
        shrink = tl.exp2(top - new_top)
        out = out * shrink + tl.sum(parts * weights[:, None], 0)
        norm = norm * shrink + tl.sum(weights, 0)
        top = new_top
    seen = norm > 0
    norm = tl.where(seen, norm, 1.0)
    lse = tl.where(seen, top + tl.log2(norm), float("-inf"))
    at = out_ptr + sequence * out_b + row % heads * out_h + cols
    tl.store(at, (out / norm).to(out_ptr.dtype.element_ty), mask=cols < U)
    tl.store(sum_ptr + row + tl.arange(0, 1), lse * 0.6931471805599453)


@triton.jit
def _block(
    k_base, k_s, k_at, v_base, v_s, v_at, start, last, keys, dims, cols,
    D: tl.constexpr, D_PADDED: tl.constexpr, U: tl.constexpr, U_PADDED: tl.constexpr,
):  # fmt: skip
    """Keys and values from `start` on, 0 from `last` on."""
    inside, far = keys < last - start, tl.cast(start, tl.int64)
    k = tl.load(k_base + far * k_s + k_at, mask=_within(inside, dims, D, D_PADDED), other=0.0)
    v = tl.load(v_base + far * v_s + v_at, mask=_within(inside, cols, U, U_PADDED), other=0.0)
    return k, v


@triton.jit
def _attend(q, k, v, inside, scale, softcap, top, norm, out, CAPPED: tl.constexpr):
    """The running maximum, sum and output with one block more."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if CAPPED:  # tanh(x) = 2 sigmoid(2 x) - 1
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
    scores = tl.where(inside[None, :], scores * 1.4426950408889634, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return new_top, norm * shrink + tl.sum(weights, 1), out


@triton.jit
def _share(position, split, splits, least, window, at_first, at_stride, SEVERAL: tl.constexpr):
    """The first and behind the last key of a split, and how many splits have any."""
    oldest, length = _visible(position, window, at_first, at_stride)
    each, active = length - oldest, 1
    if SEVERAL:
        each, active = _division(length - oldest, splits, least)
    first = oldest + split * each
    return first, tl.minimum(first + each, length), active


@triton.jit
def _visible(position, window, at_first, at_stride):
    """The first and behind the last of the keys that a query at `position` sees; equal where it sees none."""
    # keys up to the position: (position - at_first) // at_stride + 1, without dividing a negative number
    length = tl.where(position < at_first, 0, (position - at_first + at_stride) // at_stride)
    oldest = tl.maximum(position - window + 1 - at_first, 0)
    oldest = tl.where(window > 0, (oldest + at_stride - 1) // at_stride, 0)
    return tl.minimum(oldest, length), length


@triton.jit
def _division(keys, splits, least):
    """Keys of each split, and how many splits have any (one at least): equal shares of what is there now."""
    each = tl.maximum((keys + splits - 1) // splits, least)
    each = (each + 15) // 16 * 16
    return each, tl.maximum((keys + each - 1) // each, 1)


@triton.jit
def _call(base, stride, first, last, WIDTH: tl.constexpr, THREADS: tl.constexpr):
    """Call the keys (or values) first .. last of a pair into the L2 cache, each by one thread."""
    size: tl.constexpr = WIDTH * base.dtype.element_ty.primitive_bitwidth // 8
    for start in range(first, last, THREADS):
        keys = tl.minimum(start + tl.arange(0, THREADS), last - 1).to(tl.int64)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r, l, r",
            [base + keys * stride, tl.full([THREADS], size, tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _within(inside, dims, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Which elements of a block [keys, PADDED] exist."""
    mask = inside[:, None]
    if SIZE < PADDED:
        mask = mask & (dims[None, :] < SIZE)
    return mask
