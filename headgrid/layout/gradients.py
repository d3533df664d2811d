"""Training: which ranks' gradients add up, and the predicted collectives of a forward and a backward pass.

Each collective of the forward pass has its counterpart in the backward pass: all-gather and reduce-scatter are each
other's, an all-to-all goes the other way, a sum that all ranks go on to use alike needs nothing, and where ranks use
something alike for parts of the work their gradients are summed (Megatron-LM's f and g; Shoeybi et al. 2019).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from headgrid.layout.batching import Call, prefill_calls, query_share
from headgrid.layout.layout import Coordinates, Layout
from headgrid.layout.shards import head_groups, head_shard, parameters, stacks, stage_layers
from headgrid.layout.span import total
from headgrid.layout.traffic import (
    EXCHANGE_CALLS,
    Collective,
    Step,
    all_reduce_bytes,
    enter_calls,
    gathered_steps,
    gathered_weights,
    hidden_bytes,
    layer_calls,
    leave_calls,
    logits_calls,
    message,
    qk_norm_calls,
    residual_bytes,
    stationary_step,
)
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload


def copies_of_kv_heads(model: ModelSpec, layout: Layout) -> tuple[tuple[int, ...], ...]:
    """Groups of ranks that hold the same KV heads and channels of the same layers; of one rank each where n <= K."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for rank in range(layout.ranks):
        at = layout.coordinates(rank)
        kv_heads = head_groups(model, layout)[at.head_group][1]
        groups.setdefault((at.dp, at.pp, kv_heads, at.slice), []).append(rank)
    return tuple(map(tuple, groups.values()))


def ends_of_pipelines(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """Groups of the ranks in the first and the last stage that hold the same part; the others alone."""
    ends = [(ranks[0], ranks[-1]) if layout.pp > 1 else ranks for ranks in layout.axis_ranks("pp")]
    inner = [(rank,) for ranks in layout.axis_ranks("pp") for rank in ranks[1:-1]]
    return tuple(ends + inner)


def summed_over(model: ModelSpec, layout: Layout, name: str) -> tuple[str, ...]:
    """The axes over which the gradients of a stored weight are summed, in order; `kv_copies` concerns K and V only.

    Where the residual is sharded, or sequences are divided over the slices (gathered weights), ranks apply norms and
    biases to different tokens; else they all apply them to all tokens, and their gradients are whole already. With
    data-parallel attention so they do all weights of attention.
    """
    part, kind = name.split(".")[-2:]
    axes: list[str] = []
    if layout.attention == "dp-attention" and part in ("qkv", "q", "k", "v", "o", "q_norm", "k_norm"):
        return ("tp", "dp")
    if name == "embedding.weight" and model.tied_embeddings and layout.pp > 1:
        axes.append("pp_ends")
    elif part in ("q_norm", "k_norm"):
        axes.append("tp_head")
    elif name.startswith("final.norm"):
        axes += ["tp_slice"] * (layout.weights == "gathered")
    elif part in ("norm", "post_norm", "positions", "token_types") or (kind == "bias" and part in ("o", "down")):
        axes += ["tp"] if layout.residual == "sharded" else ["tp_slice"] * (layout.weights == "gathered")
    if part in ("qkv", "k", "v") and layout.num_head_groups > model.num_kv_heads:
        axes.append("kv_copies")
    return (*axes, "dp")


def _exchange_back(step: Step) -> Iterator[Collective]:
    """The counterparts of an exchange's calls."""
    own, layout, e, d = step.own, step.layout, step.element_bytes, step.model.head_dim
    heads, kv, w, u = len(own.heads), len(own.kv_heads), own.qk_width, len(own.v_channels)
    if layout.exchange == "gather":
        yield Collective("reduce_scatter", "tp_slice", step.tokens * (heads + kv) * (d - w) * e)
    elif layout.exchange == "batch":
        mine = len(step.micro_batch.parts[step.slice]) * step.queries
        others = (heads + 2 * kv) * d - own.row_width
        yield Collective("all_to_all", "tp_slice", (step.tokens - mine) * heads * u * e)
        yield Collective("all_to_all", "tp_slice", mine * others * e)
    elif layout.exchange == "sequence":
        mine = total(query_share(step.queries, layout.num_dim_slices, step.slice)) * step.micro_batch.size
        yield Collective("all_to_all", "tp_slice", (step.tokens - mine) * heads * u * e)
        yield Collective("reduce_scatter", "tp_slice", step.tokens * kv * (2 * d - w - u) * e)
        yield Collective("all_to_all", "tp_slice", mine * heads * (d - w) * e)
    else:
        yield from EXCHANGE_CALLS[layout.exchange](step)  # sums of scores, and of their gradients


def _layer_back(step: Step) -> Iterator[Collective]:
    """Backwards through both halves: gradients enter where results left, and leave where hidden states entered."""
    yield from enter_calls(step)
    yield from leave_calls(step)
    if step.layout.attention == "dp-attention":
        return
    if step.layout.output == "reduce":
        yield from enter_calls(step)
    elif step.layout.tp > 1:
        others = step.model.num_heads * step.model.head_dim - len(step.own.heads) * len(step.own.v_channels)
        yield Collective("reduce_scatter", step.axis, step.tokens * others * step.element_bytes)
    yield from _exchange_back(step)
    yield from qk_norm_calls(step)
    yield from leave_calls(step)


def _whole_hidden(step: Step) -> Iterator[Collective]:
    """Hidden states of all tokens on every rank, for logits of every token."""
    if step.layout.residual == "sharded":
        size = step.own_tokens * step.model.hidden_size * residual_bytes(step.layout, step.element_bytes)
        yield Collective("all_gather", step.axis, (step.layout.tp - 1) * size)


def _head(model: ModelSpec, layout: Layout, rank: int, tokens: int, element_bytes: int) -> Iterator[Collective]:
    """Logits of every token, and the sum of the gradients of the hidden states that they come from."""
    yield from logits_calls(model, layout, rank, tokens, element_bytes)
    if layout.tp > 1 and model.head == "vocabulary":
        size = tokens * model.hidden_size * element_bytes
        yield Collective("all_reduce", "tp", all_reduce_bytes(size, layout.tp))


def _between_stages(layout: Layout, rank: int, size: int) -> Iterator[Collective]:
    """Hidden states one way, their gradients back."""
    stage = layout.coordinates(rank).pp
    if stage > 0:
        yield from message("recv", size)
        yield from message("send", size, "pp_back")
    if stage < layout.pp - 1:
        yield from message("send", size)
        yield from message("recv", size, "pp_back")


def _stationary(model: ModelSpec, layout: Layout, workload: Workload, rank: int, call: Call) -> Iterator[Collective]:
    step, stage = stationary_step(model, layout, workload, rank, call), layout.coordinates(rank).pp
    yield from _between_stages(layout, rank, hidden_bytes(step))
    if stage == 0:
        yield from leave_calls(step)
        yield from enter_calls(step)
    for _ in range(len(stage_layers(model, layout)[stage])):
        yield from layer_calls(step)
        yield from _layer_back(step)
    if stage == layout.pp - 1:
        yield from _whole_hidden(step)
        yield from _head(model, layout, rank, step.tokens, workload.element_bytes)


def _gathered(model: ModelSpec, layout: Layout, workload: Workload, rank: int, call: Call) -> Iterator[Collective]:
    at, e = layout.coordinates(rank), workload.element_bytes
    steps = gathered_steps(model, layout, workload, rank, call.micro_batch)
    yield from _between_stages(layout, rank, sum(map(hidden_bytes, steps)))
    for _ in range(len(stage_layers(model, layout)[at.pp])):
        for sizes in gathered_weights(model, layout, rank, e).values():
            yield from _gathered_both_ways(layout, list(sizes), at.slice)
        for step in steps:
            yield from layer_calls(step)
            yield from _layer_back(step)
    if at.pp == 0:
        peers = [layout.rank(Coordinates(at.dp, at.pp, at.head_group, j)) for j in range(layout.num_dim_slices)]
        table = [parameters(model, layout, peer)["embedding.weight"].num_elements * e for peer in peers]
        yield from _gathered_both_ways(layout, table, at.slice)
        for step in steps:
            yield from leave_calls(step)
            yield from enter_calls(step)
    if at.pp == layout.pp - 1:
        for step in steps:
            yield from _whole_hidden(step)
        hidden = len(call.micro_batch.parts[at.slice]) * workload.seq * model.hidden_size * e
        yield Collective("all_gather", "tp_slice", (layout.num_dim_slices - 1) * hidden)
        yield from _head(model, layout, rank, call.micro_batch.size * workload.seq, e)


def _gathered_both_ways(layout: Layout, sizes: list[int], own: int) -> Iterator[Collective]:
    """Weights of which slice r holds `sizes[r]` bytes, and the sums of their gradients."""
    yield Collective("all_gather", "tp_slice", (layout.num_dim_slices - 1) * sizes[own])
    yield Collective("reduce_scatter", "tp_slice", sum(sizes) - sizes[own])


def _sums(model: ModelSpec, layout: Layout, rank: int, element_bytes: int) -> Iterator[Collective]:
    """Of gradients of what several ranks hold a copy of."""
    at = layout.coordinates(rank)
    copies = next(group for group in copies_of_kv_heads(model, layout) if rank in group)
    inner = at.pp not in (0, layout.pp - 1)
    sizes = {"tp": layout.tp, "tp_slice": layout.num_dim_slices, "tp_head": layout.num_head_groups, "dp": layout.dp}
    sizes |= {"pp_ends": 1 if inner else 2, "kv_copies": len(copies)}
    for name, elements in _stored(model, layout, rank).items():
        for axis in summed_over(model, layout, name):
            part = elements
            if axis == "kv_copies":
                own = head_shard(model, layout, at.head_group, at.slice)
                part = elements * (own.row_width - len(own.heads) * own.qk_width) // own.row_width
            if sizes[axis] > 1:
                yield Collective("all_reduce", axis, all_reduce_bytes(part * element_bytes, sizes[axis]))


def _stored(model: ModelSpec, layout: Layout, rank: int) -> dict[str, int]:
    """Elements of the weights as they are stored."""
    shards = parameters(model, layout, rank)
    return {name: sum(shards[part].num_elements for part in parts) for name, parts in stacks(shards).items()}


def training_collectives(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> Counter[Collective]:
    """All calls of one forward and backward pass over the batch by `rank`, with their numbers."""
    whole = replace(workload, prompt_lengths=())
    issued: Counter[Collective] = Counter()
    for call in prefill_calls(layout, whole, layout.coordinates(rank).dp):
        calls = _gathered if layout.weights == "gathered" else _stationary
        issued.update(calls(model, layout, whole, rank, call))
    issued.update(_sums(model, layout, rank, workload.element_bytes))
    return issued
