"""Models and layouts that the unit tests of the algebra go through exhaustively."""

from collections.abc import Iterator
from functools import cache

from headgrid.layout.layout import Layout
from headgrid.layout.legal import legal_layouts
from headgrid.spec.model import ModelSpec

MAX_RANKS = 16


def model(heads: int, kv_heads: int, head_dim: int, **other: object) -> ModelSpec:
    """A small model; sizes that are not named seldom divide by the number of ranks."""
    sizes: dict[str, object] = {
        "name": f"H{heads}K{kv_heads}d{head_dim}",
        "num_layers": 3,
        "hidden_size": 18,
        "mlp_hidden_size": 37,
        "vocab_size": 29,
        "max_positions": 11,
    }
    return ModelSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, **sizes | other)  # type: ignore[arg-type]


MODELS = (
    model(28, 4, 10),  # 28 heads on 8 ranks: no head-parallel system divides it
    model(14, 2, 8, linear_bias=("qkv", "o", "mlp")),
    model(12, 12, 6, positions="learned", linear_bias=("qkv", "o", "mlp"), tied_embeddings=True),
    model(16, 8, 4, positions="learned"),
    model(5, 1, 32, tied_embeddings=True),
    model(8, 8, 2),
    model(3, 3, 7, positions="learned", linear_bias=("qkv", "o", "mlp")),
    model(12, 4, 11, rotary_dim=4, qk_norm=True, linear_bias=("qkv", "o", "mlp")),
)
EVERY_MODEL = [(spec.name, spec) for spec in MODELS]


@cache
def legal_pairs(spec: ModelSpec) -> tuple[Layout, ...]:
    """Every legal layout of a model on 1 to 16 ranks."""
    return tuple(layout for ranks in range(1, MAX_RANKS + 1) for layout in legal_layouts(spec, ranks))


@cache
def cuts(spec: ModelSpec) -> tuple[Layout, ...]:
    """Legal layouts that differ in who owns what: exchange, residual and the like do not matter to that."""
    found: dict[tuple[object, ...], Layout] = {}
    for layout in legal_pairs(spec):
        cut = layout.num_head_groups, layout.num_dim_slices, layout.pp, layout.dp, layout.output
        found.setdefault(cut, layout)
    return tuple(found.values())


def every_cut() -> Iterator[tuple[ModelSpec, Layout]]:
    """Every model with its layouts that differ in who owns what."""
    for spec in MODELS:
        for layout in cuts(spec):
            yield spec, layout


def every_pair() -> Iterator[tuple[ModelSpec, Layout]]:
    """Every model with every one of its legal layouts."""
    for spec in MODELS:
        for layout in legal_pairs(spec):
            yield spec, layout


def tp_ranks(layout: Layout) -> Iterator[tuple[int, ...]]:
    """The groups of ranks that share layers: one for each replica and stage."""
    yield from layout.axis_ranks("tp")
