"""SVG that lives inside a page: coloured by the page's style, without metadata, with ids of its own."""

import re
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


def inline(drawing: str, name: str, alternative: str) -> Markup:
    """`drawing` (an SVG document) as an element for HTML: `name` keeps ids apart, `alternative` is its text."""
    root = ElementTree.fromstring(drawing)
    for parent in list(root.iter()):
        for child in [child for child in parent if _local(child.tag) in ("metadata", "style")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): _attribute(_local(key), value, name) for key, value in element.attrib.items()}
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib.update({"role": "img", "aria-label": alternative})
    return Markup(ElementTree.tostring(root, encoding="unicode"))


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
    return value
