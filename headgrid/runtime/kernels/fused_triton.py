"""The Triton kernels of `fused`: each program works on one row, in fp32."""

import triton
import triton.language as tl


@triton.jit
def in_fp8(x, tiny):
    """A row x in fp32 as e4m3, in fp32 still, and its scale: max|x| / 448, or `tiny` for a row of nearly zeros."""
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x)), 448.0), tiny)
    x = tl.minimum(tl.div_rn(x, tl.full(x.shape, 1.0, tl.float32) * scale), 448.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(x, -448.0, propagate_nan=tl.PropagateNan.ALL), scale


@triton.jit
def activated(x, KIND: tl.constexpr):
    """An activation function of x in fp32."""
    if KIND == "silu":
        x = x * tl.sigmoid(x)
    elif KIND == "relu":
        x = tl.maximum(x, 0.0)
    elif KIND == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # 1 + tanh(z) = 2 sigmoid(2 z)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def normed(x, weight_ptr, shift_ptr, cols, inside, width, eps, RMS: tl.constexpr, SHIFT: tl.constexpr,
           UNIT: tl.constexpr):  # fmt: skip
    """The norm of a row x in fp32 (0 outside): layer norm, or by the root mean square."""
    if not RMS:
        x = tl.where(inside, x - tl.sum(x) / width, 0.0)
    x = x / tl.sqrt(tl.sum(x * x) / width + eps)
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    x = x * (1.0 + weight if UNIT else weight)
    if SHIFT:
        x += tl.load(shift_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def add_norm(
    x_ptr, y_ptr, weight_ptr, shift_ptr, out_ptr, scale_ptr, width, eps, tiny,
    ADD: tl.constexpr, RMS: tl.constexpr, SHIFT: tl.constexpr, UNIT: tl.constexpr, FP8: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row): x += y, rounded as x is kept; then the norm of that, in FP8 with a scale if wanted."""
    at = tl.program_id(0).to(tl.int64) * width
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    x = tl.load(x_ptr + at + cols, mask=inside, other=0.0)
    if ADD:
        y = tl.load(y_ptr + at + cols, mask=inside, other=0.0)
        x = (x.to(tl.float32) + y.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + at + cols, x, mask=inside)
    x = normed(x.to(tl.float32), weight_ptr, shift_ptr, cols, inside, width, eps, RMS, SHIFT, UNIT)
    if FP8:
        x = tl.where(inside, x.to(weight_ptr.dtype.element_ty).to(tl.float32), 0.0)  # as a norm of its own rounds
        x, scale = in_fp8(x, tiny)
        tl.store(scale_ptr + tl.program_id(0), scale)
    tl.store(out_ptr + at + cols, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def quantise(
    x_ptr, out_ptr, scale_ptr, width, x_row, tiny,
    KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row): activation(x), or activation(gate) x up where a row is both, in FP8 with a scale."""
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = cols < width
    x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0)
    dtype = x.dtype
    x = activated(x.to(tl.float32), KIND)
    if GATED:
        x *= tl.load(x_ptr + row * x_row + width + cols, mask=inside, other=0.0).to(tl.float32)
    x, scale = in_fp8(x.to(dtype).to(tl.float32), tiny)
    tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + row * width + cols, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def store(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, start_ptr, queries, capacity, first, stride,
    k_b, k_s, v_b, v_s, to_k_b, to_k_s, to_v_b, to_v_s,
    K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (sequence, query): its key and value [K d], [K u] to their slot of the cache, if it keeps that one."""
    row = tl.program_id(0)
    sequence, query = (row // queries).to(tl.int64), (row % queries).to(tl.int64)
    position = tl.load(start_ptr + sequence).to(tl.int64) + query - first
    slot = position // stride
    mine = (position >= 0) & (position % stride == 0) & (slot < capacity)
    k_cols, v_cols = tl.arange(0, K_BLOCK), tl.arange(0, V_BLOCK)
    k_in, v_in = k_cols < tl.where(mine, K_WIDTH, 0), v_cols < tl.where(mine, V_WIDTH, 0)
    k = tl.load(k_ptr + sequence * k_b + query * k_s + k_cols, mask=k_in)
    v = tl.load(v_ptr + sequence * v_b + query * v_s + v_cols, mask=v_in)
    tl.store(k_cache_ptr + sequence * to_k_b + slot * to_k_s + k_cols, k, mask=k_in)
    tl.store(v_cache_ptr + sequence * to_v_b + slot * to_v_s + v_cols, v, mask=v_in)


@triton.jit
def rotate(
    x_ptr, cos_ptr, sin_ptr, start_ptr, queries, heads, x_b, x_s, x_h,
    PAIRS: tl.constexpr, PAIR_BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (sequence, query): channel pairs (c, c + PAIRS) of all heads turned by the angles of its position."""
    row = tl.program_id(0)
    sequence, query = (row // queries).to(tl.int64), (row % queries).to(tl.int64)
    position = tl.load(start_ptr + sequence).to(tl.int64) + query
    pairs = tl.arange(0, PAIR_BLOCK)
    real = pairs < PAIRS
    cos = tl.load(cos_ptr + position * PAIRS + pairs, mask=real, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + position * PAIRS + pairs, mask=real, other=0.0).to(tl.float32)[None, :]
    for start in range(0, heads, HEAD_BLOCK):
        rows = start + tl.arange(0, HEAD_BLOCK)
        inside = (rows[:, None] < heads) & real[None, :]
        at = x_ptr + sequence * x_b + query * x_s + rows[:, None] * x_h + pairs[None, :]
        a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(at + PAIRS, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, (a * cos - b * sin).to(x_ptr.dtype.element_ty), mask=inside)
        tl.store(at + PAIRS, (b * cos + a * sin).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gate(x_ptr, units, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, block): activation(gate) x up of a row [2 units], in the place of the gate."""
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < units
    at = x_ptr + tl.program_id(0).to(tl.int64) * 2 * units + cols
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + units, mask=inside, other=0.0).to(tl.float32)
    x = activated(x, KIND)
    tl.store(at, (x * up).to(x_ptr.dtype.element_ty), mask=inside)
