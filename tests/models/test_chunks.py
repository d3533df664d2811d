"""The plan of a load, against counting by hand: everything once, nothing else, and never more than fits."""

import itertools
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.shards import parameters
from headgrid.layout.span import Span, indices
from headgrid.models.chunks import Cut, Want, Wants, blocks, chunks, stored_shapes, union, wants
from headgrid.models.names import Source
from headgrid.models.safetensors import StoredTensor
from headgrid.spec.model import ModelSpec

LARGE = ModelSpec(
    name="as wide as 8B",
    num_layers=6,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_hidden_size=14336,
    vocab_size=128_256,
    max_positions=8192,
    norm="rms",
    gated_mlp=True,
)
SMALL = replace(
    LARGE, num_layers=2, hidden_size=10, num_heads=6, num_kv_heads=2, head_dim=6, mlp_hidden_size=13, vocab_size=17
)
MIB = 1 << 20


def drawn_cut(rng: random.Random, size: int, offset: int) -> tuple[Cut, dict[int, int]]:
    """A cut of disjoint spans in any order, and where each stored index is in the owner's tensor."""
    edges = sorted(rng.sample(range(size + 1), min(size + 1, 2 * rng.randint(1, 4))))
    spans = [Span(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False)] + [Span(0, 0)]
    rng.shuffle(spans)
    places = {index + offset: local for local, index in enumerate(indices(spans))}
    return Cut(tuple(spans), offset), places


def test_cuts_count_and_intersect_as_sets_of_indices_do() -> None:
    rng = random.Random(0)
    for _ in range(300):
        offset = rng.choice((0, 5))
        cut, places = drawn_cut(rng, rng.randint(1, 20), offset)
        assert cut.size == len(places)
        for stop in range(30):
            assert cut.below(stop) == sum(index < stop for index in places)
        for start, stop in itertools.combinations(range(0, 30, 3), 2):
            outer = Span(start, stop)
            found = {
                start + index: place.local + k
                for place in cut.within(outer)
                for k, index in enumerate(range(place.span.start, place.span.stop))
            }
            assert found == {index: local for index, local in places.items() if start <= index < stop}


def test_the_union_of_spans_holds_each_index_once() -> None:
    rng = random.Random(1)
    for _ in range(300):
        ends = [sorted(rng.choices(range(1, 20), k=2)) for _ in range(rng.randint(0, 5))]
        spans = [Span(start, stop) for start, stop in ends if start < stop]
        joined = union(spans)
        assert indices(joined) == sorted(set(indices(spans)))
        assert all(a.stop < b.start for a, b in itertools.pairwise(joined)), "neighbours are one"


def plain_sources(model: ModelSpec) -> dict[str, Source]:
    return {name: Source(name) for name in parameters(model, Layout(), 0)}


def laid(shapes: Mapping[str, tuple[int, ...]], element_bytes: int = 2) -> list[StoredTensor]:
    """Stored tensors one behind the other."""
    found: list[StoredTensor] = []
    for name, shape in shapes.items():
        start = found[-1].stop_byte if found else 100
        size = element_bytes * shape[0] * (shape[1] if len(shape) > 1 else 1)
        found.append(StoredTensor(name, "f", "BF16", shape, start, start + size))
    return found


def held(everyone: list[Wants]) -> list[set[tuple[str, int, int]]]:
    """The stored elements that each rank wants: (tensor, row, column)."""

    def cells(want: Want) -> itertools.product:
        rows, cols = ([k for p in cut.placed for k in indices((p.span,))] for cut in (want.rows, want.cols))
        return itertools.product(rows, cols)

    return [
        {(name, *cell) for name, several in mine.items() for want in several for cell in cells(want)}
        for mine in everyone
    ]


@pytest.mark.parametrize(
    "text", ["tp1", "tp2", "tp6", "n2m3:batch", "n1m2pp2:gather+concat", "tp2dp3", "n2m2:gather+concat"]
)
@pytest.mark.parametrize("stage_bytes", [1, 150, 10_000])
def test_every_byte_is_read_once_and_every_element_goes_where_it_is_wanted(text: str, stage_bytes: int) -> None:
    layout, sources = parse_layout(text), plain_sources(SMALL)
    tensors = laid(stored_shapes(SMALL, sources))
    everyone = wants(SMALL, layout, range(layout.ranks), sources)
    plan = list(chunks(tensors, everyone, 4, stage_bytes))
    segments = [segment for chunk in plan for share in chunk for segment in share]
    assert [(a.start_byte + a.num_bytes) for a in segments[:-1]] == [b.start_byte for b in segments[1:]], (
        "in file order"
    )
    assert sum(segment.num_bytes for segment in segments) == tensors[-1].stop_byte - 100
    got: list[Counter[tuple[str, int, int]]] = [Counter() for _ in everyone]
    for chunk in plan:
        assert len(chunk) == layout.ranks
        for share, (rank, mine) in itertools.product(chunk, enumerate(everyone)):
            for block in blocks(share, mine):
                segment = share[block.segment]
                rows = indices((block.rows.shift(segment.rows.start),))
                got[rank].update((segment.tensor.name, row, col) for row in rows for col in indices((block.cols,)))
    assert [set(counter) for counter in got] == held(everyone)
    assert all(max(counter.values()) == 1 for counter in got)
    if stage_bytes == 1:
        assert len(plan) > 100, "one row at a time"
    if stage_bytes == 10_000 and layout.dp == 1 < layout.ranks:
        assert len(plan) == 1, "as much at a time as fits"


LARGE_LAYOUTS = ("tp1", "tp4", "n1m8:batch", "n4m4:gather+concat", "dp8", "n8m2pp2:batch")


@pytest.mark.parametrize("text", LARGE_LAYOUTS)
def test_a_large_model_is_planned_within_bounds(text: str) -> None:
    """No rank reads, sends or gets more than fits, and chunks are not much smaller than they could be."""
    layout, sources, fits = parse_layout(text), plain_sources(LARGE), 32 * MIB
    everyone = wants(LARGE, layout, range(layout.ranks), sources)
    plan = list(chunks(laid(stored_shapes(LARGE, sources)), everyone, 2, fits))
    count = 0
    for chunk in plan[:: max(1, len(plan) // 8)]:
        got = [0] * layout.ranks
        for share in chunk:
            parts = [blocks(share, mine) for mine in everyone]
            sent = [2 * sum(block.num_elements for block in part) for part in parts]
            got = [a + b for a, b in zip(got, sent, strict=True)]
            count += sum(map(len, parts))
            assert sum(segment.num_bytes for segment in share) + sum(sent) <= fits + MIB // 4
        assert max(got) <= fits
    copies = layout.dp * max(1, layout.num_head_groups // 8)
    least = 2 * LARGE.num_parameters * max(1 + copies, 2) / layout.ranks / fits
    assert len(plan) < 4 * least + 40
    assert count < 1_500 * layout.ranks, "spans are whole, not elements"


def test_the_bounds_can_be_exceeded() -> None:
    """A chunk that fits ranks which share a model is too much for as many replicas."""
    alone, replicas = (wants(LARGE, parse_layout(text), range(8), plain_sources(LARGE)) for text in ("tp8", "dp8"))
    tensors = laid(stored_shapes(LARGE, plain_sources(LARGE)))
    first_shares = [chunk[0] for chunk in chunks(tensors, alone, 2, 32 * MIB)]
    share = max(first_shares, key=lambda share: sum(segment.num_bytes for segment in share))
    sent = [
        2 * sum(block.num_elements for mine in everyone for block in blocks(share, mine))
        for everyone in (alone, replicas)
    ]
    assert sent[0] <= 32 * MIB < sent[1]


def test_transposed_and_fused_tensors_have_the_shape_that_holds_all() -> None:
    names = {name: Source(name) for name in parameters(SMALL, Layout(), 0)}
    fused = dict(names)
    for part, first in (("q", 0), ("k", 36), ("v", 48)):
        fused[f"layers.1.attention.{part}.weight"] = Source("fused", transposed=True, first_row=first)
    assert stored_shapes(SMALL, fused)["fused"] == (10, 60)
    upright = {name: replace(source, transposed=False) for name, source in fused.items()}
    assert stored_shapes(SMALL, upright)["fused"] == (60, 10)


Change = Callable[[dict[str, Source]], object]
PARTLY: Mapping[str, Change] = {
    "a gap": lambda s: s.update({"layers.1.attention.k.weight": Source("fused", first_row=37)}),
    "an overlap": lambda s: s.update({"layers.1.attention.k.weight": Source("fused", first_row=35)}),
    "one twice": lambda s: s.update({"layers.1.attention.k.weight": Source("fused", first_row=36)}),
    "rows and columns": lambda s: s.update({"layers.1.attention.k.weight": Source("fused", True, 36)}),
    "the first missing": lambda s: s.update({"final.norm.weight": Source("n", first_row=1)}),
    "other widths": lambda s: s.update({"layers.1.mlp.down.weight": Source("layers.0.mlp.up.weight", first_row=13)}),
}


@pytest.mark.parametrize("kind", PARTLY)
def test_a_stored_tensor_that_is_partly_covered_is_a_mistake(kind: str) -> None:
    sources = plain_sources(SMALL)
    sources["layers.1.attention.q.weight"] = Source("fused")
    sources["layers.1.attention.v.weight"] = Source("fused", first_row=36)
    PARTLY[kind](sources)
    with pytest.raises(ValueError, match="exactly once"):
        stored_shapes(SMALL, sources)


HEAVY = ("torch", "numpy", "safetensors")
SCRIPT = f"import sys, headgrid.models.chunks; print([name for name in {HEAVY} if name in sys.modules])"


def test_reading_headers_and_planning_need_no_torch() -> None:
    """`test_layering.py` shows that such a check can fail."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
