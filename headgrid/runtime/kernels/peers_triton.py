"""The Triton kernels of `runtime.peers`: they load from the memory of the axis's other GPUs over NVLink.

Every kernel first meets its twins on the other ranks, block by block: when block i goes on, block i of every rank has
been started, so whatever ran before it in their streams has been written. Signals are set and taken back by
compare-and-swap, so the pad is zero again afterwards and a CUDA graph can be replayed, as in PyTorch's own barriers of
symmetric memory.
"""

import triton
import triton.language as tl

from headgrid.runtime.kernels.fused_triton import normed


@triton.jit
def meet(signals, RANK: tl.constexpr, SIZE: tl.constexpr):
    """Wait until this block runs on every rank; memory written before it there can then be read here."""
    thread = tl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r", [], dtype=tl.uint32, is_pure=True, pack=1)
    others = tl.arange(0, SIZE)
    pads = signals.to(tl.pointer_type(tl.uint64))
    block = tl.program_id(0) * SIZE
    theirs = tl.load(pads + others).to(tl.pointer_type(tl.uint32)) + block + RANK
    own = tl.load(pads + RANK).to(tl.pointer_type(tl.uint32)) + block + others
    if thread < SIZE:
        tl.inline_asm_elementwise(
            """
            {
                .reg .u32 %seen;
                .reg .pred %done;
                send:
                    atom.global.release.sys.cas.b32 %seen, [$1], 0, 1;
                    setp.eq.u32 %done, %seen, 0;
                    @!%done bra send;
                take:
                    atom.global.acquire.sys.cas.b32 %seen, [$2], 1, 0;
                    setp.eq.u32 %done, %seen, 1;
                    @!%done bra take;
                mov.u32 $0, %seen;
            }
            """,
            "=r, l, l",
            [theirs, own],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    tl.inline_asm_elementwise("bar.sync 0; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def sum_add_norm(
    buffers, signals, offset, x_ptr, weight_ptr, shift_ptr, out_ptr, rows, width, eps,
    RANK: tl.constexpr, SIZE: tl.constexpr, NORM: tl.constexpr, RMS: tl.constexpr, SHIFT: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x += the sum over ranks of their rows at `offset` of the buffer, in fp32 and in rank order; then the norm."""
    meet(signals, RANK, SIZE)
    pointers = buffers.to(tl.pointer_type(tl.uint64))
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = row.to(tl.int64) * width + cols
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        for rank in tl.static_range(SIZE):
            part = tl.load(pointers + rank).to(tl.pointer_type(out_ptr.dtype.element_ty)) + offset
            x += tl.load(part + at, mask=inside, other=0.0).to(tl.float32)
        kept = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + at, kept, mask=inside)
        if NORM:
            x = normed(kept.to(tl.float32), weight_ptr, shift_ptr, cols, inside, width, eps, RMS, SHIFT, UNIT)
            tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def copy_heads(source, target, heads, FROM: tl.constexpr, TO: tl.constexpr, W: tl.constexpr, W_BLOCK: tl.constexpr,
               HEADS: tl.constexpr):  # fmt: skip
    """W channels of each head, from heads that lie FROM elements apart to such that lie TO apart."""
    cols = tl.arange(0, W_BLOCK)
    for start in range(0, heads, HEADS):
        rows = start + tl.arange(0, HEADS)
        inside = (rows[:, None] < heads) & (cols[None, :] < W)
        x = tl.load(source + rows[:, None] * FROM + cols[None, :], mask=inside)
        tl.store(target + rows[:, None] * TO + cols[None, :], x, mask=inside)


@triton.jit
def to_rows(
    buffers, signals, q_ptr, k_ptr, v_ptr, position_ptr, first_row, rows, k_b, k_s, v_b, v_s, heads, kv_heads,
    RANK: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, W: tl.constexpr, W_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Program (own sequence): its query from all slices, its key and value into the cache at its position."""
    meet(signals, RANK, SIZE)
    row = tl.program_id(0).to(tl.int64)
    if row < rows:
        position = tl.load(position_ptr + row)
        key, value = k_ptr + row * k_b + position * k_s, v_ptr + row * v_b + position * v_s
        join(
            buffers, first_row + row, row, q_ptr, key, value, True, heads, kv_heads, RANK, SIZE, D, D, W, W_BLOCK, HEADS
        )


@triton.jit
def to_all(
    buffers, signals, q_ptr, k_ptr, v_ptr, position_ptr, k_b, k_s, v_b, v_s, heads, kv_heads,
    RANK: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, W: tl.constexpr, W_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Program (sequence): its query from all slices; its key and value into the cache of the rank that keeps their
    position, which is each `SIZE`-th.
    """
    meet(signals, RANK, SIZE)
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + row)
    slot, kept = position // SIZE, position % SIZE == RANK
    key, value = k_ptr + row * k_b + slot * k_s, v_ptr + row * v_b + slot * v_s
    join(buffers, row, row, q_ptr, key, value, kept, heads, kv_heads, RANK, SIZE, D, D, W, W_BLOCK, HEADS)


@triton.jit
def to_keys(
    buffers, signals, q_ptr, k_ptr, v_ptr, position_ptr, k_b, k_s, v_b, v_s, heads, kv_heads,
    RANK: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, W: tl.constexpr, W_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Program (sequence): its query from all slices, and its key into the cache; its value there as sliced as it is."""
    meet(signals, RANK, SIZE)
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + row)
    key, value = k_ptr + row * k_b + position * k_s, v_ptr + row * v_b + position * v_s
    join(buffers, row, row, q_ptr, key, value, True, heads, kv_heads, RANK, SIZE, D, W, W, W_BLOCK, HEADS)


@triton.jit
def join(buffers, theirs, row, q_ptr, key, value, kept, heads, kv_heads, RANK: tl.constexpr, SIZE: tl.constexpr,
         D: tl.constexpr, V_D: tl.constexpr, W: tl.constexpr, W_BLOCK: tl.constexpr,
         HEADS: tl.constexpr):  # fmt: skip
    """Row `theirs` of all slices' buffers: whole heads of queries to `row`, where `kept` those of keys, and of values,
    of which only this slice's columns are wanted if heads of them have `V_D` = W channels.
    """
    pointers = buffers.to(tl.pointer_type(tl.uint64))
    width = (heads + 2 * kv_heads) * W
    for rank in tl.static_range(SIZE):
        source = tl.load(pointers + rank).to(tl.pointer_type(q_ptr.dtype.element_ty)) + theirs * width
        own = rank * W  # this slice's columns of a whole head
        copy_heads(source, q_ptr + row * heads * D + own, heads, W, D, W, W_BLOCK, HEADS)
        if kept:
            copy_heads(source + heads * W, key + own, kv_heads, W, D, W, W_BLOCK, HEADS)
            if V_D == D:
                copy_heads(source + (heads + kv_heads) * W, value + own, kv_heads, W, D, W, W_BLOCK, HEADS)
            elif rank == RANK:
                copy_heads(source + (heads + kv_heads) * W, value, kv_heads, W, W, W, W_BLOCK, HEADS)


@triton.jit
def to_channels(
    buffers, signals, out_ptr, owner_ptr, place_ptr, offset, heads,
    RANK: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, W: tl.constexpr, W_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Program (sequence): this slice's channels [heads, W] of the attention output of the rank that attended to it."""
    meet(signals, RANK, SIZE)
    row = tl.program_id(0).to(tl.int64)
    owner, place = tl.load(owner_ptr + row), tl.load(place_ptr + row)
    base = tl.load(buffers.to(tl.pointer_type(tl.uint64)) + owner).to(tl.pointer_type(out_ptr.dtype.element_ty))
    source = base + offset + place * heads * D + RANK * W
    copy_heads(source, out_ptr + row * heads * W, heads, D, W, W, W_BLOCK, HEADS)


@triton.jit
def merge_parts(
    buffers, signals, out_ptr, sums_at, heads,
    RANK: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, W: tl.constexpr, W_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Program (sequence): this slice's channels [heads, W] of attention to all keys, from what each rank has of its own
    keys: outputs [heads, D] at the start of the buffer, their log-sum-exps [heads] at `sums_at`, all in fp32.

    As `attention.merge`: a part with -inf counts nothing, and the ranks are added in their order.
    """
    meet(signals, RANK, SIZE)
    pointers = buffers.to(tl.pointer_type(tl.uint64))
    row, cols = tl.program_id(0).to(tl.int64) * heads, tl.arange(0, W_BLOCK)
    for start in range(0, heads, HEADS):
        mine = start + tl.arange(0, HEADS)
        inside = (mine[:, None] < heads) & (cols[None, :] < W)
        top = tl.full([HEADS], -3.0e38, tl.float32)  # finite: -inf less -inf is NaN
        for rank in tl.static_range(SIZE):
            sums = tl.load(pointers + rank).to(tl.pointer_type(tl.float32)) + sums_at + row
            top = tl.maximum(top, tl.load(sums + mine, mask=mine < heads, other=float("-inf")))
        norm = tl.zeros([HEADS], tl.float32)
        out = tl.zeros([HEADS, W_BLOCK], tl.float32)
        for rank in tl.static_range(SIZE):
            base = tl.load(pointers + rank).to(tl.pointer_type(tl.float32))
            part = base + (row + mine[:, None]) * D + RANK * W + cols[None, :]
            weight = tl.exp(tl.load(base + sums_at + row + mine, mask=mine < heads, other=float("-inf")) - top)
            out += weight[:, None] * tl.load(part, mask=inside, other=0.0)
            norm += weight
        out = out / tl.where(norm > 0, norm, 1.0)[:, None]
        tl.store(out_ptr + (row + mine[:, None]) * W + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
