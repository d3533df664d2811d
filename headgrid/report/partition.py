"""Draws which rank owns which heads and channels: x = channels of a head, y = heads."""

from collections.abc import Iterator, Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

from headgrid.layout.layout import Layout
from headgrid.layout.shards import Cell, partition
from headgrid.layout.span import Span
from headgrid.report.format import TIMES, ranks
from headgrid.report.svg import INK, MUTED, PAPER, inline
from headgrid.spec.model import ModelSpec

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 374, 300, 46, 6, 34
TEXT = 10
MIN_LABEL_WIDTH, MIN_LABEL_HEIGHT = 17, 12


def draw(name: str, model: ModelSpec, layout: Layout) -> Markup:
    """The cut of Q and K in the first replica's first stage, as an SVG element; all others are cut alike."""
    cells = [cell for cell in partition(model, layout) if cell.dp == 0 and cell.pp == 0]
    root = Element("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "font-size": str(TEXT)})
    alike = layout.attention == "dp-attention"  # one box stands for all
    for cell in cells[:1] if alike else cells:
        for channels in cell.channels:
            who = f"each of {layout.tp} ranks" if alike else f"rank {cell.rank}"
            _rectangle(root, model, cell, channels, _colour(cell, layout), who)
    _axis(root, model, cells)
    return inline(tostring(root, encoding="unicode"), name, _alternative(model, layout, cells))


def _x(model: ModelSpec, channel: int) -> float:
    return LEFT + (WIDTH - LEFT - 8) * channel / model.head_dim


def _y(model: ModelSpec, head: int) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * head / model.num_heads


def _colour(cell: Cell, layout: Layout) -> str:
    """A hue for each head group, from dark to light over its slices; dark text reads on all of them."""
    hue = (215 + 360 * cell.head_group / layout.num_head_groups) % 360
    return f"hsl({hue:.0f} 42% {62 + 24 * cell.slice / layout.num_dim_slices:.0f}%)"


def _rectangle(root: Element, model: ModelSpec, cell: Cell, channels: Span, colour: str, who: str) -> None:
    left, right = _x(model, channels.start), _x(model, channels.stop)
    top, bottom = _y(model, cell.heads.start), _y(model, cell.heads.stop)
    shape = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    texts = {key: f"{value:.1f}" for key, value in shape.items()}
    box = SubElement(root, "rect", {**texts, "fill": colour, "stroke": PAPER, "stroke-width": "1.2"})
    SubElement(box, "title").text = f"{who}: {_owns(cell)}"
    if right - left >= MIN_LABEL_WIDTH and bottom - top >= MIN_LABEL_HEIGHT:
        text = who if right - left > 48 else str(cell.rank)
        middle = (top + bottom) / 2 + TEXT * 0.36
        _text(root, (left + right) / 2, middle, text, "middle", "#16181a")


def _text(root: Element, x: float, y: float, text: str, anchor: str, colour: str) -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "fill": colour}
    SubElement(root, "text", place).text = text


def _axis(root: Element, model: ModelSpec, cells: Sequence[Cell]) -> None:
    """Labels at the cuts, as far as there is room between them."""
    channels = {edge for cell in cells for span in cell.channels for edge in (span.start, span.stop)}
    for edge in _spaced(sorted(channels), (WIDTH - LEFT) / model.head_dim, 22):
        last = edge == model.head_dim  # of three digits it would be cut off
        x, anchor = (WIDTH - 1, "end") if last else (_x(model, edge), "middle")
        _text(root, x, HEIGHT - BOTTOM + 14, str(edge), anchor, MUTED)
    heads = {edge for cell in cells for edge in (cell.heads.start, cell.heads.stop)}
    for edge in _spaced(sorted(heads), (HEIGHT - TOP - BOTTOM) / model.num_heads, 13):
        _text(root, LEFT - 6, _y(model, edge) + TEXT * 0.36, str(edge), "end", MUTED)
    _text(root, (LEFT + WIDTH) / 2, HEIGHT - 4, "channels of a head", "middle", INK)
    middle = (TOP + HEIGHT - BOTTOM) / 2
    label = {"transform": f"translate(12 {middle}) rotate(-90)", "text-anchor": "middle", "fill": INK}
    SubElement(root, "text", label).text = "query heads"


def _spaced(edges: Sequence[int], unit: float, room: float) -> Iterator[int]:
    """The edges that lie at least `room` apart; the first and the last always."""
    last = None
    for edge in edges:
        from_end = (edges[-1] - edge) * unit
        if last is None or edge == edges[-1] or ((edge - last) * unit >= room and from_end >= room):
            yield edge
            last = edge


def _spans(spans: Sequence[Span]) -> str:
    return " and ".join(f"{s.start} to {s.stop - 1}" if len(s) > 1 else str(s.start) for s in spans if len(s)) or "none"


def _owns(cell: Cell) -> str:
    return f"heads {_spans([cell.heads])}, channels {_spans(cell.channels)}"


def _alternative(model: ModelSpec, layout: Layout, cells: Sequence[Cell]) -> str:
    listed = "; ".join(f"rank {cell.rank} {_owns(cell)}" for cell in cells[:16])
    more = f"; and {len(cells) - 16} more ranks" if len(cells) > 16 else ""
    return f"{layout}: {model.num_heads} heads by {model.head_dim} channels. {listed}{more}."


def caption(model: ModelSpec, layout: Layout) -> str:
    """What the drawing cannot show: slices, stages, replicas, and what is stored more than once."""
    cells = partition(model, layout)
    parts = [_copied(layout)] if layout.attention == "dp-attention" else list(_cut(model, layout, cells))
    if layout.pp > 1:
        parts.append(f"{layout.pp} pipeline stages: {'; '.join(_stages(cells, layout))}. All are cut alike.")
    if layout.dp > 1:
        step = layout.ranks // layout.dp
        higher = "k" if step == 1 else f"{step} k"
        parts.append(f"{layout.dp} replicas, each with its own sequences; the ranks of replica k are {higher} higher.")
    return " ".join(parts)


def _copied(layout: Layout) -> str:
    return (
        f"Data-parallel attention: its weights are stored {layout.tp} times, whole on each rank, which attends to"
        " sequences of its own and caches the keys and values of these. The MLP and the vocabulary are cut among ranks."
    )


def _cut(model: ModelSpec, layout: Layout, cells: Sequence[Cell]) -> Iterator[str]:
    n, m = layout.num_head_groups, layout.num_dim_slices
    groups = _count(n, "head group")
    yield f"{groups} {TIMES} {_count(m, 'channel slice')}." if m > 1 else f"{groups}."
    owners = [cell.kv_heads for cell in cells if cell.dp == cell.pp == cell.slice == 0]
    copies = sum(len(span) for span in owners) / model.num_kv_heads
    kv_heads = _count(model.num_kv_heads, "KV head")
    once = "none stored twice in a replica" if layout.dp > 1 else "none stored twice"
    yield f"{kv_heads}, {once}." if copies == 1 else f"{kv_heads}, each stored {copies:g} times."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _stages(cells: Sequence[Cell], layout: Layout) -> Iterator[str]:
    for stage in range(layout.pp):
        mine = [cell for cell in cells if cell.pp == stage and cell.dp == 0]
        on = f"{'rank' if len(mine) == 1 else 'ranks'} {ranks([cell.rank for cell in mine])}"
        yield f"stage {stage} has layers {_spans([mine[0].layers])} on {on}"


def rows(model: ModelSpec, layout: Layout) -> Iterator[tuple[str, ...]]:
    """Exactly what each rank owns: rank, replica, stage, layers, query heads, KV heads, channels."""
    for cell in partition(model, layout):
        owned = (_spans([cell.layers]), _spans([cell.heads]), _spans([cell.kv_heads]), _spans(cell.channels))
        yield (str(cell.rank), str(cell.dp), str(cell.pp), *owned)
