"""The two Triton kernels of `split_kv`. Scores are kept in base 2: exp2 is one instruction."""

import triton
import triton.language as tl


@triton.jit
def partial(
    q_ptr, k_ptr, v_ptr, partial_ptr, lse_ptr, position_ptr, scale, softcap,
    q_b, q_h, k_b, k_h, k_s, v_b, v_h, v_s,
    kv_heads, splits, window, at_first, at_stride,
    CAPPED: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, U: tl.constexpr,
    GROUP_PADDED: tl.constexpr, D_PADDED: tl.constexpr, U_PADDED: tl.constexpr,
    KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (pair, split): softmax over the split's keys, its weighted sum of values [GROUP, U] and log2-sum."""
    pair, split = tl.program_id(0), tl.program_id(1)
    sequence, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    position = tl.load(position_ptr + sequence).to(tl.int32)
    # keys up to the position: (position - at_first) // at_stride + 1, without dividing a negative number
    length = (position - at_first + at_stride) // at_stride
    length = tl.where(position < at_first, 0, length)
    oldest = tl.maximum(position - window + 1 - at_first, 0)
    oldest = tl.where(window > 0, (oldest + at_stride - 1) // at_stride, 0)
    first = tl.maximum(split * KEYS, oldest)
    last = tl.minimum(split * KEYS + KEYS, length)
    rows, dims, cols = tl.arange(0, GROUP_PADDED), tl.arange(0, D_PADDED), tl.arange(0, U_PADDED)
    heads = kv_head * GROUP + rows
    q_at = q_ptr + sequence * q_b + heads[:, None] * q_h + dims[None, :]
    q = tl.load(q_at, mask=(rows[:, None] < GROUP) & (dims[None, :] < D), other=0.0)
    top = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    norm = tl.zeros([GROUP_PADDED], tl.float32)
    out = tl.zeros([GROUP_PADDED, U_PADDED], tl.float32)
    k_base = k_ptr + sequence * k_b + kv_head * k_h
    v_base = v_ptr + sequence * v_b + kv_head * v_h
    for start in range(first, last, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        inside = keys < last
        k_in = inside[:, None] & (dims[None, :] < D)
        k = tl.load(k_base + keys[:, None] * k_s + dims[None, :], mask=k_in, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:  # tanh(x) = 2 sigmoid(2 x) - 1
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        scores *= 1.4426950408889634
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        v_in = inside[:, None] & (cols[None, :] < U)
        v = tl.load(v_base + keys[:, None] * v_s + cols[None, :], mask=v_in, other=0.0)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        norm = norm * shrink + tl.sum(weights, 1)
        top = new_top
    seen = norm > 0  # an empty split has no keys: its log-sum is -inf, its output 0, never NaN
    lse = tl.where(seen, top + tl.log2(tl.where(seen, norm, 1.0)), float("-inf"))
    out = out / tl.where(seen, norm, 1.0)[:, None]
    at = ((sequence * kv_heads * GROUP + heads) * splits + split).to(tl.int64)
    tl.store(partial_ptr + at[:, None] * U + cols[None, :], out, mask=(rows[:, None] < GROUP) & (cols[None, :] < U))
    tl.store(lse_ptr + at, lse, mask=rows < GROUP)


@triton.jit
def merge(
    partial_ptr, lse_ptr, out_ptr, sum_ptr, splits, U: tl.constexpr, U_PADDED: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """Program (sequence, head): the partial outputs weighted by their share of the whole sum, in fp32."""
    at = tl.program_id(0).to(tl.int64)
    rows, cols = tl.arange(0, SPLITS), tl.arange(0, U_PADDED)
    inside = (rows[:, None] < splits) & (cols[None, :] < U)
    lse = tl.load(lse_ptr + at * splits + rows, mask=rows < splits, other=float("-inf"))
    top = tl.maximum(tl.max(lse, 0), -3.0e38)  # finite: all splits may be empty
    weights = tl.exp2(lse - top)
    norm = tl.sum(weights, 0)
    weights = weights / tl.where(norm > 0, norm, 1.0)
    total = tl.where(norm > 0, (top + tl.log2(tl.where(norm > 0, norm, 1.0))) * 0.6931471805599453, float("-inf"))
    tl.store(sum_ptr + at, total)
    parts = tl.load(partial_ptr + (at * splits + rows[:, None]) * U + cols[None, :], mask=inside, other=0.0)
    merged = tl.sum(parts * weights[:, None], 0)
    tl.store(out_ptr + at * U + cols, merged.to(out_ptr.dtype.element_ty), mask=cols < U)
