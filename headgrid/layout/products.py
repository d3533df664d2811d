"""Which FP8 products a layout computes, and whether a GPU's kernels take them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from headgrid.errors import InvalidLayout
from headgrid.layout.layout import Layout
from headgrid.layout.legal import legal_layouts
from headgrid.layout.shards import head_shards
from headgrid.layout.span import balanced
from headgrid.layout.traffic import over_heads
from headgrid.spec.model import ModelSpec

MULTIPLE = 16
"""Of the inputs and of the outputs of a product: torch's scaled matrix product takes no others on CUDA."""


@dataclass(frozen=True, slots=True, order=True)
class Product:
    """x [tokens, inputs] times weight [outputs, inputs]^T on one rank."""

    name: str
    inputs: int
    outputs: int

    @property
    def fits(self) -> bool:
        """Whether a GPU's kernels take it."""
        return not (self.inputs % MULTIPLE or self.outputs % MULTIPLE)


def products(model: ModelSpec, layout: Layout) -> frozenset[Product]:
    """The different products of a layer on any rank, on the weights as they are stored and as they are gathered."""
    found = set(_stationary(model, layout))
    return frozenset(found | set(_stationary(model, over_heads(layout))) if layout.weights == "gathered" else found)


def _stationary(model: ModelSpec, layout: Layout) -> Iterator[Product]:
    hidden, columns = model.hidden_size, balanced(model.hidden_size, layout.tp)
    for own, units, mine in zip(
        head_shards(model, layout), balanced(model.mlp_hidden_size, layout.tp), columns, strict=True
    ):
        yield Product("qkv", hidden, own.row_width)
        if layout.output == "reduce":
            yield Product("o", len(own.heads) * len(own.v_channels), hidden)
        else:
            yield Product("o", model.num_heads * model.head_dim, len(mine))
        yield Product("up", hidden, len(units) * (2 if model.gated_mlp else 1))
        yield Product("down", len(units), hidden)


def check_products(model: ModelSpec, layout: Layout) -> None:
    """Raise InvalidLayout, with the numbers and what would do, if a GPU cannot compute this layout's FP8 products."""
    if layout.linears != "fp8":
        return
    misfits = sorted(product for product in products(model, layout) if not product.fits)
    if not misfits:
        return
    others = (replace(other, linears="fp8") for other in legal_layouts(model, layout.ranks))
    fitting = [str(other) for other in others if all(product.fits for product in products(model, other))]
    raise InvalidLayout(
        f"{layout}: a GPU's FP8 products take multiples of {MULTIPLE} only",
        numbers="; ".join(f"{p.name}: {p.inputs} inputs, {p.outputs} outputs on some rank" for p in misfits[:4]),
        why="slices, heads or MLP units do not divide evenly enough; on a CPU, and in the model's dtype, any do",
        legal=[str(replace(layout, linears="model")), *fitting],
    )
