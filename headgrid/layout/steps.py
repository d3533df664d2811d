"""What a forward call holds, in bytes: norms, products, embedding, logits, step by step as `runtime.stage` takes them.

Letters as in `held`; r bytes of an element of the hidden states.
"""

from collections.abc import Iterator
from dataclasses import replace

from headgrid.layout.held import INDEX_BYTES, Shape, attention_shape, exchange_bytes, gathered, tokens_of_ranks
from headgrid.layout.layout import Layout
from headgrid.layout.quantised import FP8_BYTES, SCALE_BYTES
from headgrid.layout.shards import head_shards
from headgrid.layout.span import balanced
from headgrid.spec.model import ModelSpec


def _norm_bytes(shape: Shape, tokens: int, r: int) -> int:
    """A norm of hidden states of r bytes an element, its result included, and the weights it converts for that."""
    width, wide = shape.model.hidden_size, max(4, r)
    out, cast = tokens * width * r, width * r if r != shape.e else 0
    if shape.model.norm == "layer":  # with mean and reciprocal deviation
        return 2 * cast + out + 2 * tokens * wide
    if not shape.model.norm_unit_offset:
        return cast + out
    widened, whole = tokens * width * wide if wide != r else 0, tokens * width * wide
    making = max(width * wide * (2 if wide != shape.e else 1), widened + width * wide + whole)
    return max(making, whole + out if widened else 0)


def _normed_bytes(shape: Shape, tokens: int) -> int:
    """A norm whose result is in the model's dtype."""
    width, r = shape.model.hidden_size, shape.residual
    return max(_norm_bytes(shape, tokens, r), tokens * width * (r + shape.e) if r != shape.e else 0)


def is_shared(shape: Shape) -> bool:
    """Whether a half of a layer works on the hidden states themselves, not on normed or converted or gathered ones."""
    plain = shape.layout.residual == "replicated" and shape.residual == shape.e
    return shape.model.norm_placement == "post" and plain


def _enter_bytes(shape: Shape) -> int:
    """What a half of a layer gets, and what it is made of."""
    own, post = shape.own_tokens * shape.model.hidden_size * shape.e, shape.model.norm_placement == "post"
    size = 0 if post and shape.residual == shape.e else own
    if shape.layout.residual == "sharded":
        width = shape.model.hidden_size * shape.e
        size += gathered([tokens * width for tokens in tokens_of_ranks(shape)], shape.tp_index)
    return size if post else max(size, _normed_bytes(shape, shape.own_tokens))


def _entered_bytes(shape: Shape) -> int:
    """Of that, what stays while it is used."""
    return 0 if is_shared(shape) else shape.whole_bytes


def _sum_bytes(shape: Shape) -> int:
    """What a half of a layer gives, with the norm of that or of the sum, where there is one."""
    given = shape.own_tokens * shape.model.hidden_size * shape.e
    if shape.model.norm_placement == "both":
        return given + _norm_bytes(shape, shape.own_tokens, shape.e)
    if shape.model.norm_placement == "post":
        return max(given, _norm_bytes(shape, shape.own_tokens, shape.residual))
    return given


def _leave_bytes(shape: Shape) -> int:
    """A product of all tokens, and the own tokens' share of its sum; uneven parts are received, then added up."""
    if shape.layout.residual != "sharded":
        return shape.whole_bytes
    shares, mine = tokens_of_ranks(shape), shape.own_tokens * shape.model.hidden_size
    if len(set(shares)) == 1:
        return shape.whole_bytes + mine * shape.e
    copy = shape.e if shape.wide != shape.e else 0
    return shape.whole_bytes + mine * (len(shares) * shape.e + shape.wide + copy)


def embed_bytes(shape: Shape) -> int:
    """The embedding of a call, its result included, beside the token ids."""
    local, bools = shape.tokens * INDEX_BYTES, shape.tokens
    own = shape.own_tokens * shape.model.hidden_size
    sizes = [local + 3 * bools, local + bools + _leave_bytes(shape)]
    if shape.residual != shape.e:
        summed = own * shape.e if shape.layout.residual == "sharded" else 0
        sizes.append(local + bools + shape.whole_bytes + summed + own * shape.residual)
    if shape.model.positions == "learned":
        sizes.append(local + bools + own * shape.residual + (shape.whole_bytes if shape.rows > 1 else 0))
    if shape.model.embedding_norm:
        normed = _norm_bytes(shape, shape.own_tokens, shape.residual)
        sizes.append(local + bools + own * shape.residual + normed)
    return max(sizes)


def _head_norm_bytes(shape: Shape) -> Iterator[int]:
    """RMS norms of heads; the projections are held throughout."""
    e, wide, held = shape.e, shape.wide, shape.projections_bytes
    q, k = (shape.tokens * heads * shape.own.qk_width for heads in (shape.heads, shape.kv_heads))
    q_sums, k_sums = shape.tokens * shape.heads * wide, shape.tokens * shape.kv_heads * wide
    widened = wide if wide != e else 0
    yield held + max(q * (wide + widened), q * wide + q_sums)
    yield held + q_sums + max(k * (wide + widened), k * wide + k_sums)
    sums = held + 3 * (q_sums + k_sums)
    # x in fp32, times its size, back in the model's dtype, times the weight: two of these at a time
    yield sums + q * (2 * wide if widened else 2 * e)
    yield sums + q * e + k * (2 * wide if widened else 2 * e)
    yield sums + (q + k) * e + shape.projections_bytes


def _rotation_bytes(shape: Shape) -> int:
    """Three products of half the turned channels at a time, in place; behind norms of heads in a copy."""
    held = shape.projections_bytes * (2 if shape.model.qk_norm else 1)
    return held + 3 * shape.tokens * shape.heads * shape.pairs * shape.e


def _product_bytes(shape: Shape, inputs: int, outputs: int) -> int:
    """A product of all tokens with a weight [outputs, inputs], its result included.

    In FP8 as a CPU emulates it, in fp32 or wider (a GPU holds the rounded input and the result): the input in that
    width and rounded; then both factors widened, and their product; then that in two dtypes.
    """
    t, wide, result = shape.tokens, shape.wide, shape.tokens * outputs * shape.e
    if shape.layout.linears == "model":
        return result
    scales = t * SCALE_BYTES
    rounding, rounded = t * inputs * (wide + FP8_BYTES) + scales, t * inputs * FP8_BYTES + scales
    multiplying = rounded + (t * inputs + inputs * outputs + t * outputs) * wide
    return max(rounding, multiplying, rounded + t * outputs * wide + (result if wide != shape.e else 0))


def _output_bytes(shape: Shape) -> Iterator[int]:
    model, layout, e, out = shape.model, shape.layout, shape.e, shape.out_bytes
    if layout.output == "reduce":
        inputs = shape.heads * len(shape.own.v_channels)
        yield out + max(_product_bytes(shape, inputs, model.hidden_size), _leave_bytes(shape))
        return
    widths = [len(owner.heads) * len(owner.v_channels) for owner in head_shards(model, layout)]
    columns = [len(span) for span in balanced(model.hidden_size, layout.tp)]
    mine = shape.tokens * columns[shape.tp_index] * e
    for beside, own, sizes in ((0, out, widths), (out, mine, columns)):
        yield beside + own + _concat_bytes([shape.tokens * size * e for size in sizes], shape.tp_index)
    whole = sum(widths)
    yield out + shape.tokens * whole * e + _product_bytes(shape, whole, columns[shape.tp_index])


def _concat_bytes(sizes: list[int], index: int) -> int:
    """An all-gather of columns and the copy that puts them side by side."""
    return max(gathered(sizes, index), 2 * sum(sizes)) if len(sizes) > 1 else sum(sizes)


def _layer_bytes(shape: Shape) -> Iterator[int]:
    """Bytes held beside the residual at each step of a layer."""
    half = attention_shape(shape)
    yield _enter_bytes(half)
    yield _entered_bytes(half) + _product_bytes(half, half.model.hidden_size, half.own.row_width)
    if half.model.qk_norm:
        yield from _head_norm_bytes(half)
    yield _rotation_bytes(half)
    yield from exchange_bytes(half)
    yield from _output_bytes(half)
    yield _enter_bytes(shape)
    yield _sum_bytes(shape)
    outputs = shape.units * (2 if shape.model.gated_mlp else 1)
    yield _entered_bytes(shape) + _product_bytes(shape, shape.model.hidden_size, outputs)
    units = shape.tokens * outputs * shape.e
    yield units + max(_product_bytes(shape, shape.units, shape.model.hidden_size), _leave_bytes(shape))


def steps_bytes(shape: Shape, windows: frozenset[int]) -> int:
    """The most that a layer holds beside the residual, whatever its window."""
    return max(max(_layer_bytes(replace(shape, window=window))) for window in windows)


def last_bytes(shape: Shape) -> int:
    """Last tokens picked and normed."""
    width, n = shape.model.hidden_size, shape.ending
    picked = (
        0 if n == shape.tokens and shape.layout.residual != "sharded" else n * (width * shape.residual + INDEX_BYTES)
    )
    more = n * width * shape.residual + INDEX_BYTES * n if shape.layout.residual == "sharded" else 0
    converted = n * width * shape.e if shape.residual != shape.e else 0
    return picked + max(more, _normed_bytes(shape, n) if shape.model.has_final_norm else converted)


def logits_bytes(model: ModelSpec, layout: Layout, index: int, rows: int, e: int) -> int:
    """Normed last tokens, this rank's part of their logits, and whole logits."""
    if model.head == "none":
        return rows * model.hidden_size * e
    sizes = [rows * len(span) * e for span in balanced(model.vocab_size, layout.tp)]
    return rows * model.hidden_size * e + sizes[index] + _concat_bytes(sizes, index)
