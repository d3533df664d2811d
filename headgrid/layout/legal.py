"""Which layouts can run a model: refusals with reasons, and the list of the legal ones."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from headgrid.errors import InvalidLayout
from headgrid.layout.layout import EXCHANGES, Layout
from headgrid.spec.model import ModelSpec, named_models
from headgrid.spec.workload import Workload


def divisors(number: int) -> tuple[int, ...]:
    """All divisors, ascending."""
    return tuple(k for k in range(1, number + 1) if number % k == 0)


def _copies_kv(model: ModelSpec, layout: Layout) -> bool:
    n, k = layout.num_head_groups, model.num_kv_heads
    return layout.num_dim_slices == 1 and n > k and n % k == 0 and model.num_heads % n == 0


def _problem(model: ModelSpec, layout: Layout) -> tuple[str, str] | None:
    """What keeps this layout from running this model, and why; None if nothing does."""
    n, m = layout.num_head_groups, layout.num_dim_slices
    if layout.attention == "cut" and model.num_kv_heads % n and not _copies_kv(model, layout):
        remainder = f"{model.num_kv_heads} % {n} = {model.num_kv_heads % n}"
        return (
            f"{n} head groups cannot share {model.num_kv_heads} KV heads",
            f"n must divide them ({remainder}); slices (m) take the rest",
        )
    if m > max(1, model.head_dim // 2):
        return f"{m} slices of {model.head_dim} channels", "a slice holds at least one pair of channels"
    if layout.pp > model.num_layers:
        return f"{layout.pp} stages for {model.num_layers} layers", "a stage needs a layer"
    shared = {"(MLP units)": model.mlp_hidden_size, "(vocabulary)": model.vocab_size}
    shared |= {"output columns": model.hidden_size} if layout.output == "concat" else {}
    for name, size in shared.items():
        if layout.tp > size:
            return f"{layout.tp} ranks share {size} {name}", "every rank owns at least one"
    return None


def check(model: ModelSpec, layout: Layout, workload: Workload | None = None, ranks: int | None = None) -> None:
    """Raise InvalidLayout with the numbers and the legal alternatives if this combination cannot run."""
    if ranks is not None and layout.ranks != ranks:
        degrees = f"dp {layout.dp} x pp {layout.pp} x n {layout.num_head_groups} x m {layout.num_dim_slices}"
        problem = f"needs {layout.ranks} ranks, not {ranks}", f"{degrees} = {layout.ranks}"
    else:
        problem = _problem(model, layout)
    if problem is not None:
        total = ranks or layout.ranks
        raise InvalidLayout(
            f"{layout}: {problem[0]}",
            numbers=f"{model.name}: {model.num_heads} heads, {model.num_kv_heads} KV heads, head_dim {model.head_dim}",
            why=problem[1],
            legal=[str(other) for other in legal_layouts(model, total)],
            command=f"headgrid layouts --model {model.name} --ranks {total}" if model.name in named_models() else "",
        )
    if workload is not None:
        _check_workload(model, layout, workload)


def _check_workload(model: ModelSpec, layout: Layout, workload: Workload) -> None:
    if layout.dp > workload.batch:
        raise InvalidLayout(
            f"{layout}: {layout.dp} replicas share {workload.batch} sequences",
            why="a replica needs a sequence",
            legal=(f"--batch {layout.dp}",),
        )
    shares = layout.dp * layout.row_owners
    if layout.attention == "dp-attention" and shares > workload.batch:
        raise InvalidLayout(
            f"{layout}: {shares} ranks attend to {workload.batch} sequences",
            numbers=f"dp {layout.dp} x tp {layout.tp} = {shares}",
            why="data-parallel attention divides the batch: a rank without a sequence would only wait",
            legal=(f"--batch {shares}",),
        )
    if layout.communication == "overlapped" and workload.batch <= shares:
        raise InvalidLayout(
            f"{layout}: nothing overlaps in a batch of {workload.batch}",
            numbers=f"{shares} parts of the batch, each of at most one sequence",
            why="two calls of different sequences take turns",
            legal=(f"--batch {2 * shares}", str(replace(layout, communication="exposed"))),
        )
    if layout.weights == "gathered" and layout.pp > 1 and layout.dp * layout.num_dim_slices > workload.batch:
        raise InvalidLayout(
            f"{layout}: {layout.dp} x {layout.num_dim_slices} slices share {workload.batch} sequences",
            why="with gathered weights every slice of a stage passes its own sequences on",
            legal=(f"--batch {layout.dp * layout.num_dim_slices}",),
        )
    if not model.is_causal and (workload.decode_steps or workload.chunk_positions):
        raise InvalidLayout(
            f"{model.name} is bidirectional: it is neither decoded nor prefilled in chunks",
            numbers=f"decode_steps {workload.decode_steps}, chunk_positions {workload.chunk_positions}",
            why="every position attends to all others, which must all be there",
            legal=("decode_steps 0 and chunk_positions 0",),
        )
    if workload.cache_positions > model.max_positions:
        longest = model.max_positions - workload.decode_steps
        raise InvalidLayout(
            f"{workload.seq} + {workload.decode_steps} positions, but {model.name} has {model.max_positions}",
            legal=(f"--seq {longest}",) if longest > 0 else (f"--decode-steps {model.max_positions - 1} --seq 1",),
        )


def check_training(model: ModelSpec, layout: Layout, workload: Workload, ranks: int | None = None) -> None:
    """Raise InvalidLayout with the legal alternatives if gradients of this combination cannot be had."""
    check(model, layout, workload, ranks)
    if layout.communication == "overlapped":
        raise InvalidLayout(
            f"{layout}: training does not overlap communication",
            why="calls take turns in prefill only; backward runs each collective's counterpart by itself",
            legal=(str(replace(layout, communication="exposed")),),
        )
    if layout.linears != "model":
        raise InvalidLayout(
            f"{layout}: there are no gradients of FP8 linears",
            why="rounding to FP8 has no useful derivative, and rounded weights cannot be updated",
            legal=(str(replace(layout, linears="model")),),
        )
    if workload.chunk_positions:
        raise InvalidLayout(
            "training takes whole sequences",
            numbers=f"chunk_positions {workload.chunk_positions}",
            why="earlier chunks would need their gradients from later ones",
            legal=("chunk_positions 0",),
        )
    slices = layout.dp * layout.num_dim_slices
    if layout.weights == "gathered" and slices > workload.batch:
        raise InvalidLayout(
            f"{layout}: {layout.dp} x {layout.num_dim_slices} slices share {workload.batch} sequences",
            why="a slice without a sequence has no part in the gradients",
            legal=(f"--batch {slices}",),
        )


def is_legal(model: ModelSpec, layout: Layout) -> bool:
    """Whether `check` accepts the layout for some workload."""
    return _problem(model, layout) is None


def _all(ranks: int) -> Iterator[Layout]:
    for tp in reversed(divisors(ranks)):
        for pp in divisors(ranks // tp):
            for n in reversed(divisors(tp)):
                degrees = {"num_head_groups": n, "num_dim_slices": tp // n, "pp": pp, "dp": ranks // tp // pp}
                for choice in _choices(n, tp // n):
                    yield Layout(**degrees, **choice)


def _choices(n: int, m: int) -> Iterator[dict[str, Any]]:
    """Exchange, output, weights and residual that go together on an n x m grid, each with its hidden states and its
    linears left in the model's dtype.
    """
    for exchange in EXCHANGES if m > 1 else ("none",):
        yield {"exchange": exchange}
        if n * m > 1:
            yield {"exchange": exchange, "residual": "sharded"}
            yield {"exchange": exchange, "output": "concat"}
    if m > 1:
        yield {"exchange": "batch", "weights": "gathered"}
        yield {"exchange": "batch", "weights": "gathered", "residual": "sharded"}


def legal_layouts(model: ModelSpec, ranks: int) -> tuple[Layout, ...]:
    """Every layout of the family on exactly `ranks` devices: n x m first, then with stages, then with replicas.

    Each may also keep its hidden states in fp32 and run its linears in FP8, and each whose ranks share the work on a
    token may overlap it.
    """
    legal = [layout for layout in _all(ranks) if is_legal(model, layout)]
    order = {lay: (lay.output != "reduce", lay.residual != "replicated", lay.dp * lay.pp, lay.dp) for lay in legal}
    return tuple(sorted(legal, key=order.__getitem__))


def default_layout(model: ModelSpec, ranks: int, batch: int) -> Layout:
    """As many head groups as the KV heads allow, slices for the rest, with the exchange that divides the cache evenly:
    by batch rows where there are enough, else by positions.

    Raises InvalidLayout if no n x m grid of so many ranks is legal.
    """
    for n in reversed(divisors(ranks)):
        m = ranks // n
        exchange = "none" if m == 1 else "batch" if batch >= m else "sequence"
        layout = Layout(num_head_groups=n, num_dim_slices=m, exchange=exchange)
        if not model.num_kv_heads % n and is_legal(model, layout):
            return layout
    raise InvalidLayout(
        f"no n x m grid of {ranks} ranks can run {model.name}",
        numbers=f"{model.num_kv_heads} KV heads, head_dim {model.head_dim}",
        legal=[str(layout) for layout in legal_layouts(model, ranks)],
    )
