"""SVG that lives inside a page: coloured by the page's style, without metadata, with ids of its own."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

# Colours that a drawing uses, and what the page makes of them in its light or dark style. They are almost black, so
# that a drawing outside of a page shows at least its shape.
INK, MUTED, RULE, BAND, PAPER, GOOD, BAD = (f"#0102{index:02x}" for index in range(1, 8))
SERIES = tuple(f"#0103{index:02x}" for index in range(8))
STYLE = dict(
    zip(
        (INK, MUTED, RULE, BAND, PAPER, GOOD, BAD, *SERIES),
        ("ink", "muted", "rule", "band", "paper", "good", "bad", *(f"s{index}" for index in range(8))),
        strict=True,
    )
)
_COLOUR = re.compile("|".join(STYLE))
_REFERENCE = re.compile(r"#(?=[\w-])")
_FINER = re.compile(r"(\.\d\d)\d+")
_PLACES = ("d", "x", "y", "width", "height", "points")
"""Attributes whose numbers are places on a page of some hundred units: two decimals are more than a screen shows."""
_MARK = re.compile(r"mark-(\d+)")


@dataclass(frozen=True, slots=True)
class Mark:
    """What one group of a drawing stands for: shown and hidden with its arms, told when it is pointed at.

    `arms`: numbers of the arms in the summary. `row`: from the top, where a drawing has a row for each arm or pair.
    `points`: which blocks its marks are, in the order of the page's data.
    """

    arms: tuple[int, ...]
    text: str = ""
    row: int | None = None
    points: tuple[int, ...] = ()


class Marks(list[Mark]):
    """The marks of one drawing."""

    def add(self, *arms: int, text: str = "", row: int | None = None, points: Sequence[int] = ()) -> str:
        """Note a mark; returns the id that its element has to have in the drawing."""
        self.append(Mark(arms, text, row, tuple(points)))
        return f"mark-{len(self) - 1}"


def inline(drawing: str, name: str, alternative: str, marks: Sequence[Mark] = (), pitch: float = 0.0) -> Markup:
    """`drawing` (an SVG document) as an element for HTML: `name` keeps ids apart, `alternative` is its text.

    `marks`: what the elements with ids of `Marks.add` stand for. `pitch`: of the rows, if a row may be taken out.
    """
    root = ElementTree.fromstring(drawing)
    for parent in list(root.iter()):
        for child in [child for child in parent if _local(child.tag) in ("metadata", "style")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
    for element in list(root.iter()):
        if found := _MARK.fullmatch(element.get("id", "")):
            _note(element, marks[int(found[1])])
    for element in root.iter():
        element.attrib = {_local(key): _attribute(_local(key), value, name) for key, value in element.attrib.items()}
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib.update({"role": "img", "aria-label": alternative} | ({"data-pitch": f"{pitch:.3f}"} if pitch else {}))
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _note(element: ElementTree.Element, mark: Mark) -> None:
    """Data attributes for the page's script, and a title, which a browser shows without one."""
    del element.attrib["id"]
    if mark.arms:
        element.set("data-arms", " ".join(map(str, mark.arms)))
    if mark.row is not None:
        element.set("data-row", str(mark.row))
    drawn = list(element.iter("use"))
    if len(drawn) == len(mark.points):  # else a mark lay outside of the drawing: no read-out rather than a wrong one
        for use, point in zip(drawn, mark.points, strict=True):
            use.set("data-point", str(point))
    if len({use.get("style") for use in drawn}) == 1:  # said once for all of them
        element.set("style", drawn[0].attrib.get("style", ""))
        for use in drawn:
            use.attrib.pop("style", None)
    if mark.text:
        title = ElementTree.Element("title")
        title.text = mark.text
        element.insert(0, title)


_ON_PAPER = {"ink": "#24292f", "muted": "#6b7280", "paper": "#ffffff"}


def standalone(element: str) -> str:
    """An inline drawing as a file of its own, on white paper whatever the reader's theme."""
    coloured = re.sub(r"var\(--([\w-]+)\)", lambda match: _ON_PAPER.get(match[1], _ON_PAPER["muted"]), element)
    opened = '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" style="background:#ffffff"'
    return coloured.replace("<svg", opened, 1) + "\n"


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href" or "url(#" in value:
        return _REFERENCE.sub(f"#{name}-", value, count=1)
    if key in ("style", "fill", "stroke"):
        return _COLOUR.sub(lambda match: f"var(--{STYLE[match.group()]})", value)
    return _FINER.sub(r"\1", value) if key in _PLACES else value
