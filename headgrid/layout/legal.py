"""Which layouts can run a model: refusals with reasons, and the list of the legal ones."""

from collections.abc import Iterator

from headgrid.errors import InvalidLayout
from headgrid.layout.layout import EXCHANGES, Exchange, Layout, Output, WeightMode
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload


def divisors(number: int) -> tuple[int, ...]:
    """All divisors, ascending."""
    return tuple(k for k in range(1, number + 1) if number % k == 0)


def head_group_counts(model: ModelSpec) -> tuple[int, ...]:
    """The legal n: divisors of the KV heads, so that no KV head is copied."""
    return divisors(model.num_kv_heads)


def _copies_kv(model: ModelSpec, layout: Layout) -> bool:
    n, k = layout.num_head_groups, model.num_kv_heads
    return layout.num_dim_slices == 1 and n > k and n % k == 0 and model.num_heads % n == 0


def check(model: ModelSpec, layout: Layout, workload: Workload | None = None, ranks: int | None = None) -> None:
    """Raise InvalidLayout with the numbers and the legal alternatives if this combination cannot run."""
    names = f"{model.name}: {model.num_heads} heads, {model.num_kv_heads} KV heads, head_dim {model.head_dim}"
    n, m, total = layout.num_head_groups, layout.num_dim_slices, ranks or layout.ranks
    legal = [str(other) for other in legal_layouts(model, total)]
    command = f"headgrid layouts --model {model.name} --ranks {total}"

    def refuse(what: str, why: str) -> None:
        raise InvalidLayout(f"{layout}: {what}", numbers=names, why=why, legal=legal, command=command)

    if ranks is not None and layout.ranks != ranks:
        product = f"dp {layout.dp} x pp {layout.pp} x n {n} x m {m} = {layout.ranks}"
        refuse(f"needs {layout.ranks} ranks, not {ranks}", product)
    if model.num_kv_heads % n and not _copies_kv(model, layout):
        refuse(
            f"{n} head groups cannot share {model.num_kv_heads} KV heads",
            f"n must divide them ({model.num_kv_heads} % {n} = {model.num_kv_heads % n}); slices (m) take the rest",
        )
    if m > max(1, model.head_dim // 2):
        refuse(f"{m} slices of {model.head_dim} channels", "a slice holds at least one pair of channels")
    if layout.pp > model.num_layers:
        refuse(f"{layout.pp} stages for {model.num_layers} layers", "a stage needs a layer")
    for name, size in (("MLP units", model.mlp_hidden_size), ("vocabulary", model.vocab_size)):
        if layout.tp > size:
            refuse(f"{layout.tp} ranks share {size} ({name})", "every rank owns at least one")
    if layout.output == "concat" and layout.tp > model.hidden_size:
        refuse(f"{layout.tp} ranks share {model.hidden_size} output columns", "every rank owns at least one")
    if workload is not None:
        _check_workload(model, layout, workload)


def _check_workload(model: ModelSpec, layout: Layout, workload: Workload) -> None:
    if layout.dp > workload.batch:
        raise InvalidLayout(
            f"{layout}: {layout.dp} replicas share {workload.batch} sequences",
            why="a replica needs a sequence",
            legal=(f"--batch {layout.dp}",),
        )
    if layout.weights == "gathered" and layout.pp > 1 and layout.dp * layout.num_dim_slices > workload.batch:
        raise InvalidLayout(
            f"{layout}: {layout.dp} x {layout.num_dim_slices} slices share {workload.batch} sequences",
            why="with gathered weights every slice of a stage passes its own sequences on",
            legal=(f"--batch {layout.dp * layout.num_dim_slices}",),
        )
    if workload.cache_positions > model.max_positions:
        raise InvalidLayout(
            f"{workload.seq} + {workload.decode_steps} positions, but {model.name} has {model.max_positions}",
            legal=(f"--seq {model.max_positions - workload.decode_steps}",),
        )


def is_legal(model: ModelSpec, layout: Layout) -> bool:
    """Whether `check` accepts the layout for some workload."""
    n, m = layout.num_head_groups, layout.num_dim_slices
    return (
        (model.num_kv_heads % n == 0 or _copies_kv(model, layout))
        and m <= max(1, model.head_dim // 2)
        and layout.pp <= model.num_layers
        and layout.tp <= min(model.mlp_hidden_size, model.vocab_size)
        and (layout.output == "reduce" or layout.tp <= model.hidden_size)
    )


def _all(ranks: int) -> Iterator[Layout]:
    for tp in reversed(divisors(ranks)):
        for pp in divisors(ranks // tp):
            for n in reversed(divisors(tp)):
                degrees = {"num_head_groups": n, "num_dim_slices": tp // n, "pp": pp, "dp": ranks // tp // pp}
                for exchange, output, weights in _choices(n, tp // n):
                    yield Layout(**degrees, exchange=exchange, output=output, weights=weights)


def _choices(n: int, m: int) -> Iterator[tuple[Exchange, Output, WeightMode]]:
    """Exchange, output and weights that go together on an n x m grid."""
    exchanges: tuple[Exchange, ...] = EXCHANGES if m > 1 else ("none",)  # type: ignore[assignment]
    for exchange in exchanges:
        yield exchange, "reduce", "stationary"
        if n * m > 1:
            yield exchange, "concat", "stationary"
    if m > 1:
        yield "batch", "reduce", "gathered"


def legal_layouts(model: ModelSpec, ranks: int) -> tuple[Layout, ...]:
    """Every layout of the family on exactly `ranks` devices: n x m first, then with stages, then with replicas."""
    legal = [layout for layout in _all(ranks) if is_legal(model, layout)]
    return tuple(sorted(legal, key=lambda lay: (lay.output != "reduce", lay.dp * lay.pp, lay.dp)))
