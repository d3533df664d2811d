"""The Triton kernels of `split_kv`. Scores are kept in base 2: exp2 is one instruction."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_RUNTIME = ["kv_heads", "splits", "least", "window", "at_first"]  # one compilation serves all of their values


@triton.jit(do_not_specialize=_RUNTIME)
def partial(
    q_ptr, k_ptr, v_ptr, part_ptr, lse_ptr, out_ptr, sum_ptr, arrival_ptr, position_ptr, scale, softcap,
    q_b, q_h, k_b, k_h, k_s, v_b, v_h, v_s,
    kv_heads, splits, least, window, at_first, at_stride,
    CAPPED: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, U: tl.constexpr,
    GROUP_PADDED: tl.constexpr, D_PADDED: tl.constexpr, U_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, ARRIVE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SHARES: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (pair, split): softmax over the split's keys, its weighted sum of values [GROUP, U] and log2-sum.

    A pair with one active split is finished here. Otherwise the programs of a pair that come last merge its parts if
    they ARRIVE (count themselves), or else `merge` does.
    """
    if EARLY:
        gdc_launch_dependents()
    pair, split = tl.program_id(0), tl.program_id(1)
    sequence, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    position = tl.load(position_ptr + sequence).to(tl.int32)
    oldest, length = _visible(position, window, at_first, at_stride)
    each, active = _division(length - oldest, splits, least)
    if split >= active:
        return
    first = oldest + split * each
    last = tl.minimum(first + each, length)
    rows, dims, cols = tl.arange(0, GROUP_PADDED), tl.arange(0, D_PADDED), tl.arange(0, U_PADDED)
    keys = tl.arange(0, BLOCK)
    q_at = q_ptr + sequence * q_b + (kv_head * GROUP + rows[:, None]) * q_h + dims[None, :]
    q = tl.load(q_at, mask=(rows[:, None] < GROUP) & (dims[None, :] < D), other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    top = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    norm = tl.zeros([GROUP_PADDED], tl.float32)
    out = tl.zeros([GROUP_PADDED, U_PADDED], tl.float32)
    k_base = k_ptr + sequence * k_b + kv_head * k_h
    v_base = v_ptr + sequence * v_b + kv_head * v_h
    k_at = keys[:, None] * k_s + dims[None, :]  # within a block: 32 bits do
    v_at = keys[:, None] * v_s + cols[None, :]
    for start in tl.range(first, last, BLOCK, num_stages=STAGES):
        inside, far = keys < last - start, tl.cast(start, tl.int64)
        k = tl.load(k_base + far * k_s + k_at, mask=_within(inside, dims, D, D_PADDED), other=0.0)
        v = tl.load(v_base + far * v_s + v_at, mask=_within(inside, cols, U, U_PADDED), other=0.0)
        if WIDE:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:  # tanh(x) = 2 sigmoid(2 x) - 1
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        scores = tl.where(inside[None, :], scores * 1.4426950408889634, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        norm = norm * shrink + tl.sum(weights, 1)
        top = new_top
    seen = norm > 0  # without keys the log-sum is -inf and the output 0, never NaN
    norm = tl.where(seen, norm, 1.0)
    lse = tl.where(seen, top + tl.log2(norm), float("-inf"))
    out = out / norm[:, None]
    if active == 1:
        _store(out, lse, out_ptr, sum_ptr, pair, rows, cols, GROUP, U)
    else:
        at = (pair.to(tl.int64) * splits + split) * GROUP + rows
        tl.store(part_ptr + at[:, None] * U + cols[None, :], out, mask=(rows[:, None] < GROUP) & (cols[None, :] < U))
        tl.store(lse_ptr + at, lse, mask=rows < GROUP)
        if ARRIVE:
            _arrive(
                part_ptr, lse_ptr, out_ptr, sum_ptr, arrival_ptr + pair, pair, splits, active,
                GROUP, U, ROWS, COLS, SHARES, CHUNK,
            )  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def merge(
    part_ptr, lse_ptr, out_ptr, sum_ptr, position_ptr, kv_heads, splits, least, window, at_first, at_stride,
    GROUP: tl.constexpr, U: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    CHUNK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (pair, share): merges one share of the columns of a pair's parts."""
    if EARLY:
        gdc_wait()
    pair, share = tl.program_id(0), tl.program_id(1)
    position = tl.load(position_ptr + pair // kv_heads).to(tl.int32)
    oldest, length = _visible(position, window, at_first, at_stride)
    _, active = _division(length - oldest, splits, least)
    if active == 1:
        return
    _merge_share(
        part_ptr, lse_ptr, out_ptr, sum_ptr, pair, share, splits, active, GROUP, U, ROWS, COLS, CHUNK,
    )  # fmt: skip


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
def _within(inside, dims, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Which elements of a block [keys, PADDED] exist."""
    mask = inside[:, None]
    if SIZE < PADDED:
        mask = mask & (dims[None, :] < SIZE)
    return mask


@triton.jit
def _store(out, lse, out_ptr, sum_ptr, pair, rows, cols, GROUP: tl.constexpr, U: tl.constexpr):
    """Write a pair's results [GROUP, some columns] and natural log-sums; its query heads stand side by side."""
    at = pair.to(tl.int64) * GROUP + rows
    inside = (rows[:, None] < GROUP) & (cols[None, :] < U)
    tl.store(out_ptr + at[:, None] * U + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(sum_ptr + at, lse * 0.6931471805599453, mask=rows < GROUP)


@triton.jit
def _arrive(
    part_ptr, lse_ptr, out_ptr, sum_ptr, arrival_ptr, pair, splits, active,
    GROUP: tl.constexpr, U: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SHARES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Count this program; the last SHARES of the pair's merge, once all have come, and leave the count at 0.

    Those which wait hold a multiprocessor: the host takes SHARES > 1 only where all that can wait leave half of them.
    """
    tl.debug_barrier()  # all threads' parts are stored before one thread releases them
    ticket = tl.atomic_add(arrival_ptr, 1, sem="acq_rel", scope="gpu")
    mergers = tl.minimum(active, SHARES)
    mine = ticket - (active - mergers)
    if mine >= 0:
        if SHARES > 1:
            come = ticket + 1
            while come < active:
                come = tl.atomic_add(arrival_ptr, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()
        for share in range(mine, SHARES, mergers):
            _merge_share(
                part_ptr, lse_ptr, out_ptr, sum_ptr, pair, share, splits, active,
                GROUP, U, ROWS, COLS, CHUNK,
            )  # fmt: skip
        if SHARES > 1:  # the last to have seen the count resets it
            left = tl.atomic_add(arrival_ptr, 1, sem="relaxed", scope="gpu")
            if left == active + mergers - 1:
                tl.atomic_xchg(arrival_ptr, 0, sem="relaxed", scope="gpu")
        else:
            tl.atomic_xchg(arrival_ptr, 0, sem="relaxed", scope="gpu")


@triton.jit
def _merge_share(
    part_ptr, lse_ptr, out_ptr, sum_ptr, pair, share, splits, active,
    GROUP: tl.constexpr, U: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The parts of a pair weighted by their share of the whole sum, in fp32 and in the order of the splits."""
    across: tl.constexpr = (U + COLS - 1) // COLS
    rows, cols = share // across * ROWS + tl.arange(0, ROWS), share % across * COLS + tl.arange(0, COLS)
    top = tl.full([ROWS], -3.0e38, tl.float32)  # finite: -inf less -inf is NaN
    norm = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, active, CHUNK):
        chunk = start + tl.arange(0, CHUNK)
        at = (pair.to(tl.int64) * splits + chunk[:, None]) * GROUP + rows[None, :]
        inside = (chunk[:, None] < active) & (rows[None, :] < GROUP)
        lses = tl.load(lse_ptr + at, mask=inside, other=float("-inf"), cache_modifier=".cg")
        parts = tl.load(
            part_ptr + at[:, :, None] * U + cols[None, None, :],
            mask=inside[:, :, None] & (cols[None, None, :] < U), other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(lses, 0))
        weights = tl.exp2(lses - new_top[None, :])
        shrink = tl.exp2(top - new_top)
        out = out * shrink[:, None] + tl.sum(parts * weights[:, :, None], 0)
        norm = norm * shrink + tl.sum(weights, 0)
        top = new_top
    seen = norm > 0
    norm = tl.where(seen, norm, 1.0)
    lse = tl.where(seen, top + tl.log2(norm), float("-inf"))
    _store(out / norm[:, None], lse, out_ptr, sum_ptr, pair, rows, cols, GROUP, U)
